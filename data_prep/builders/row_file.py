"""The checked rows of a split, as JSON lines in a temporary file.

A streaming builder goes over its rows twice: once to check and count them, once to write them with
their images. In between they are in such a file and not in memory, and Beam workers can each read a
part of it.
"""

import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

from data_prep.progress import progress

PART = 256  # rows that one Beam worker reads at a time


class RowWriter:
    """Writes rows (dicts that JSON can hold) to `path`; a context manager.

    Attributes: path, count (rows written), parts (where each part of PART rows starts, in bytes).
    """

    def __init__(self, path: os.PathLike | str):
        self.path = pathlib.Path(path)
        self.count = 0
        self.parts: list[int] = []
        self._file = open(self.path, "wb")

    def __enter__(self) -> "RowWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self.count % PART == 0:
            self.parts.append(self._file.tell())
        self._file.write(json.dumps(row).encode() + b"\n")
        self.count += 1


def read_rows(path: os.PathLike | str, start: int = 0, count: int | None = None) -> Iterator[dict]:
    """Rows from byte `start` on, at most `count`."""
    with open(path, "rb") as f:
        f.seek(start)
        for i, line in enumerate(f):
            if i == count:
                return
            yield json.loads(line)


def generate(rows: RowWriter, example: Callable[[dict], tuple[str, dict]], what: str, beam: bool) -> Any:
    """What `_split_generators` gives TFDS for one split: a generator, or a Beam transform.

    Args:
      rows: the split's rows; the writer must be closed.
      example: row -> (key, example); a function of a module, or a `functools.partial` of one with
        picklable arguments, since Beam sends it to its workers.
      what: label of the progress bar.
      beam: whether to return a Beam transform.
    """
    if not beam:
        return (example(row) for row in progress(read_rows(rows.path), what, rows.count))
    import apache_beam

    return (
        apache_beam.Create(rows.parts, reshuffle=True)
        | apache_beam.FlatMap(functools.partial(_read_part, rows.path))
        | apache_beam.Map(example)
    )


def _read_part(path: pathlib.Path, start: int) -> Iterator[dict]:
    return read_rows(path, start, PART)
