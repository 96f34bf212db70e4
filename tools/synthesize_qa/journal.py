"""The journal of a synthesis: every reply of the language model, as it came, for good.

Replies are the expensive thing, so that they are written first and everything else (pairs, scores,
what is dropped, files) is derived from them as often as one likes. It is the judge's `Cache`: an
append-only file of JSON lines, one process's at a time, on the disk before the next step is taken,
a last line or batch that a crash cut off dropped. Both backends write it.

`units` says what a line holds.
"""

import glob
import re

from paligemma_med.judge.replies import Cache

WHAT = "a reply in a journal of tools.synthesize_qa"


def path_of(output, shard=None):
    """The journal of an output file: of qa.jsonl qa.journal, that of shard (i, n)
    qa.journal.i-of-n."""
    own = str(output).removesuffix(".jsonl") + ".journal"
    return own + (f".{shard[0]}-of-{shard[1]}" if shard else "")


def paths_of(output):
    """All journals of an output file that there are: its own, then those of shards by n and i."""
    own, found = path_of(output), []
    for path in glob.glob(glob.escape(own) + "*"):
        if shard := re.fullmatch(r"(?:\.(\d+)-of-(\d+))?", path.removeprefix(own)):
            found.append(([int(x or 0) for x in shard.groups()[::-1]], path))
    return [path for _, path in sorted(found)]


def open_journal(path):
    """Opens or begins a journal to write to: `count`, `score`, `replies` of a key, `add`,
    `add_many`, `close`; a context manager.

    Raises:
      ValueError: a line of another form; another process writes to it.
    """
    return Cache(path, WHAT)


class Journals:
    """Several journals to read as one, such as those of shards. Methods as of `Cache`.

    A key that stands in several of them has the records of the first, then those of the next.
    """

    def __init__(self, paths):
        """Opens them; ValueError: none given or there, or one that is being written to."""
        self.paths, self._parts = list(paths), []
        if not self.paths:
            raise ValueError("there is no journal; expected those of a run or of its shards.")
        try:
            for path in self.paths:
                self._parts.append(Cache(path, WHAT, write=False))
        except BaseException:
            self.close()
            raise

    def count(self, key):
        return sum(part.count(key) for part in self._parts)

    def score(self, key):
        return next((s for part in self._parts if (s := part.score(key)) is not None), None)

    def replies(self, key):
        return [record for part in self._parts for record in part.replies(key)]

    def close(self):
        for part in self._parts:
            part.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
