"""The journal of a synthesis: every reply of the language model, unchanged and permanent.

Replies are expensive, so they are written first, and everything else (pairs, scores, drops, files) can be
derived from them any number of times. It is the judge's `Cache`: an append-only file of JSON lines, used
by one process at a time, on the disk before the next step; a last line or batch that a crash cut off is
dropped. Both backends write it.

`units` describes a line.
"""

import glob
import re

from paligemma_med.judge.replies import Cache

WHAT = "a reply in a journal of tools.synthesize_qa"


def path_of(output, shard=None) -> str:
    """The journal of an output file: qa.journal for qa.jsonl, and qa.journal.i-of-n for shard (i, n)."""
    own = str(output).removesuffix(".jsonl") + ".journal"
    return own + (f".{shard[0]}-of-{shard[1]}" if shard else "")


def paths_of(output) -> list:
    """All existing journals of an output file: its own, then those of shards by n and i."""
    own, found = path_of(output), []
    for path in glob.glob(glob.escape(own) + "*"):
        if shard := re.fullmatch(r"(?:\.(\d+)-of-(\d+))?", path.removeprefix(own)):
            found.append(([int(x or 0) for x in shard.groups()[::-1]], path))
    return [path for _, path in sorted(found)]


def open_journal(path) -> Cache:
    """Opens or begins a journal to write to: `count`, `score`, `replies` of a key, `add`,
    `add_many`, `close`; a context manager.

    Raises:
      ValueError: a line of another form; another process writes to it.
    """
    return Cache(path, WHAT)


class Journals:
    """Several journals to read as one, such as those of shards. Methods as in `Cache`.

    A key that occurs in several has the records of the first, then those of the next.
    """

    def __init__(self, paths):
        """Opens them. ValueError: there is none, or one is being written to."""
        self.paths, self._parts = list(paths), []
        if not self.paths:
            raise ValueError("there is no journal; expected those of a run or of its shards.")
        try:
            for path in self.paths:
                self._parts.append(Cache(path, WHAT, write=False))
        except BaseException:
            self.close()
            raise

    def count(self, key) -> int:
        return sum(part.count(key) for part in self._parts)

    def score(self, key) -> float | None:
        return next((s for part in self._parts if (s := part.score(key)) is not None), None)

    def replies(self, key) -> list:
        return [record for part in self._parts for record in part.replies(key)]

    def close(self) -> None:
        for part in self._parts:
            part.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
