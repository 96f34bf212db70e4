"""Every reply of a server, on disk: none is lost, and none is paid for twice."""

import errno
import fcntl
import json
import os

from paligemma_med.pp import json_text


class Cache:
    """Every reply ever received, by key, in an append-only file of JSON lines.

    A line: key, score (None: the reply couldn't be used), reply (whole, or its beginning and end),
    finish (why it ended), usage ([prompt, completion] tokens, or None where the server didn't say),
    model (as the server calls it), time (s since 1970), and what else the caller noted. Of several
    lines of a key, the first with a score counts; each of them was paid for.

    Only places and scores are held in memory, so that hundreds of thousands of long replies take
    some tens of megabytes.
    """

    def __init__(self, path, what="a judge's reply", write=True):
        """Opens or creates the file; drops a last line that a crash cut off.

        Args:
          path: of the file.
          what: what a line is, in the message about one that isn't.
          write: whether to add to it. Without, the file must be there and is left as it is; others
            may read it at the same time, but none may write.

        Raises:
          ValueError: a line that isn't of this form; another process has the file; there is none.
        """
        self.path, self._places = path, {}
        if write:
            os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        elif not os.path.isfile(path):
            raise ValueError(f"there is no {path}; expected a file of replies.")
        self._file = open(path, "a+b" if write else "rb", buffering=0)
        try:
            lock = fcntl.LOCK_EX if write else fcntl.LOCK_SH
            fcntl.flock(self._file, lock | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise ValueError(f"{path} is in use by another process; expected to be alone.") from None
        try:
            sound = self._read(what)
            if write:
                self._file.truncate(sound)
        except BaseException:
            self._file.close()
            raise

    def _read(self, what):
        """Takes in the lines; returns how many bytes of the file are sound."""
        end, sound, waiting = 0, 0, []
        with open(self.path, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.endswith(b"\n"):
                    break
                if (record := _read_line(line)) is None:
                    raise ValueError(f"{self.path}, line {number}: found {line[:60]!r}; expected {what}.")
                waiting.append((record, end, len(line)))
                end += len(line)
                # Lines that were added together count together: a crash may have come between.
                if not record.get("rest"):
                    self._keep(waiting)
                    sound, waiting = end, []
        return sound

    def _keep(self, lines):
        for record, offset, length in lines:
            self._places.setdefault(record["key"], []).append((record["score"], offset, length))

    def count(self, key) -> int:
        """How many records a key has."""
        return len(self._places.get(key, ()))

    def score(self, key) -> int | None:
        """Its verdict, or None."""
        return next((s for s, *_ in self._places.get(key, ()) if s is not None), None)

    def replies(self, key) -> list[dict]:
        """The records of a key, in the order in which they came; read from the file."""
        fd = self._file.fileno()
        return [json.loads(os.pread(fd, n, at)) for _, at, n in self._places.get(key, ())]

    def add(self, record) -> None:
        """Appends a record; it is on the disk when this returns, or not at all (OSError)."""
        self.add_many([record])

    def add_many(self, records) -> None:
        """Appends records with one fsync; all of them are on the disk when this returns, or none.

        Each but the last has "rest", the number of those that follow: by it `Cache` knows after a
        crash that some are missing.
        """
        last = len(records) - 1
        numbered = [r if i == last else {**r, "rest": last - i} for i, r in enumerate(records)]
        lines = [(json.dumps(r) + "\n").encode() for r in numbered]
        data = b"".join(lines)
        size = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(data) < len(data):  # so a full disk begins
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as e:
            self._file.truncate(size)  # half a line would spoil the next
            raise OSError(f"{self.path} can't be written: {e.strerror}.") from e
        for record, line in zip(records, lines):
            self._keep([(record, size, len(line))])
            size += len(line)

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _read_line(line):
    """A line of the cache as a record, or None if it is of another form."""
    try:
        record = json_text.parse(line, "a line", root=dict, halves=True)
        score, usage = record["score"], record["usage"]
        # By type: True == 1 in Python, and isn't a score.
        good = isinstance(record["key"], str) and (score is None or type(score) is int)
        good = good and isinstance(record.get("reply", ""), str)
        return record if good and is_usage(usage) else None
    except (ValueError, TypeError, KeyError):
        return None


def totals(cache, keys) -> dict[str, int]:
    """What the replies to these keys took, in this and all earlier runs.

    Returns:
      {"replies", "unusable" (replies that weren't a verdict), "prompt_tokens",
      "completion_tokens", "without_usage" (replies whose tokens the server didn't tell)}.
    """
    out = dict.fromkeys(("replies", "unusable", "prompt_tokens", "completion_tokens", "without_usage"), 0)
    for record in (r for key in sorted(set(keys)) for r in cache.replies(key)):
        out["replies"] += 1
        out["unusable"] += record["score"] is None
        if record["usage"] is None:
            out["without_usage"] += 1
        else:
            out["prompt_tokens"] += record["usage"][0]
            out["completion_tokens"] += record["usage"][1]
    return out


def is_usage(x) -> bool:
    """Whether this is [prompt tokens, completion tokens], or None where the server didn't say."""
    return x is None or (isinstance(x, list) and len(x) == 2 and all(type(n) is int and 0 <= n < 2**40 for n in x))
