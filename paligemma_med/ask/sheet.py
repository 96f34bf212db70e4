"""answers.csv: a line for each row of the table, written as soon as there is an answer, and never again.

Beside it, ask.json says what was asked of whom. Started again, the same questions go on after the last whole line;
others are refused, since their answers would stand in one column with these. The file opens in spreadsheets: it begins
with a byte-order mark, without which Excel takes UTF-8 for Windows-1252, and a cell that Excel would run as a formula
(it begins with = + - @ and is no number) gets an apostrophe in front, by which it shows the text. What a model says,
and what a table from elsewhere holds, is not to run anything where it is opened; and "- no nodule" would be an error.
"""

import contextlib
import csv
import io
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from paligemma_med import files
from paligemma_med.evaluation import results
from paligemma_med.pp import json_text

ANSWERS, ABOUT = "answers.csv", "ask.json"
OWN = ("model_answer", "logprob", "note", "error")
_BOM = "\ufeff"
_NUMBER = re.compile(r"[+-]?(\d+([.,]\d*)?|[.,]\d+)([eE][+-]?\d+)?")
# How the parts of an identity are called when they differ.
_PARTS = dict(
    table="the table",
    columns="the table's columns or their names",
    images="the folder of the images",
    weights="the weights",
    config="the config",
    settings="the settings",
    software="the version of this program",
)


class Sheet:
    """The growing file; for use in a `with`.

    Attributes:
      path: of answers.csv.
      done: rows that an earlier start has left; `failed` of them have an error.
      escaped: cells that got an apostrophe, in this start.
    """

    def __init__(self, folder, columns: Sequence[str], identity: Mapping[str, Any], *, delimiter=",", raw=False):
        """
        Args:
          folder: is made where missing.
          columns: of the table, kept in this order in front of `OWN`.
          identity: JSON-able, all that the answers depend on: keys of `_PARTS`.
          delimiter: between cells.
          raw: leaves cells as they are, for programs.

        Raises:
          ValueError: answers.csv is there, of other questions or of another program.
          OSError: another process writes it, or nobody can.
        """
        self._folder, self._columns, self._raw = pathlib.Path(folder), list(columns), raw
        self._identity = results.plain({**identity, "raw_cells": raw}, ABOUT)
        self._delimiter = delimiter
        self.path, self.done, self.failed, self.escaped = self._folder / ANSWERS, 0, 0, 0
        self._own = [_free(name, self._columns) for name in OWN]

    def __enter__(self):
        self._folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            stack.enter_context(files.sole_use(self._folder, "give another --out"))
            length = self._check()
            if length:
                os.truncate(self.path, length)
            else:
                files.write_text(self._folder / ABOUT, json.dumps(self._identity, indent=2) + "\n")
                files.write_text(self.path, _BOM + self._line([*self._columns, *self._own]))
            self._file = stack.enter_context(open(self.path, "a", encoding="utf-8", newline=""))
            self._use = stack.pop_all()
        return self

    def __exit__(self, *error):
        self._use.close()

    def add(self, rows: Iterable[tuple[Mapping[str, Any], tuple[str, float | None, str, str]]]) -> None:
        """Appends rows of (cells of the table, values of `OWN`); they are on the disk when this returns."""
        lines = []
        for cells, (answer, logprob, note, error) in rows:
            number = "" if logprob is None else f"{logprob:.6f}"
            lines.append(self._line([*(cells.get(c, "") for c in self._columns), answer, number, note, error]))
            self.failed += bool(error)
        with files.named(self.path):
            self._file.write("".join(lines))
            self._file.flush()
            os.fsync(self._file.fileno())

    def _check(self):
        """Bytes of whole lines of the same questions that are there; 0 if the file has yet to begin."""
        about = self._folder / ABOUT
        if not self.path.exists():
            return 0
        if not about.exists():
            raise ValueError(f"{self.path} is there without {ABOUT}, so it isn't of this program; give another --out.")
        then = json_text.read(about, "what an earlier start asked", root=dict)
        if differ := [key for key, x in self._identity.items() if then.get(key) != x]:
            what = _PARTS.get(differ[0], differ[0])
            raise ValueError(
                f"{self.path} has answers to other questions, or of another model; changed since: {what}. Give "
                "another --out, or --overwrite to ask all anew."
            )
        length = 0
        error = len(self._columns) + len(OWN) - 1
        with open(self.path, "rb") as f:
            for number, (end, record) in enumerate(whole_records(f)):
                length = end
                if number:
                    self.done += 1
                    cells = next(csv.reader(io.StringIO(record.decode("utf-8")), delimiter=self._delimiter), [])
                    self.failed += len(cells) > error and bool(cells[error])
        return length

    def _line(self, cells):
        out = io.StringIO()
        csv.writer(out, delimiter=self._delimiter, lineterminator="\r\n").writerow([self._safe(c) for c in cells])
        return out.getvalue()

    def _safe(self, cell):
        text = str(cell).replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
        if self._raw or not runs_in_a_spreadsheet(text):
            return text
        self.escaped += 1
        return f"'{text}"


def remove(folder) -> None:
    """Removes what an earlier start left, if it is of this program."""
    folder = pathlib.Path(folder)
    if (folder / ABOUT).exists():
        for name in (ANSWERS, ABOUT):
            (folder / name).unlink(missing_ok=True)


def runs_in_a_spreadsheet(cell: str) -> bool:
    """Whether a spreadsheet would take a cell for a formula: it begins with = + - @, a tab or a carriage return
    (OWASP, "CSV injection"), also after blanks, and is no number."""
    text = cell.lstrip(" \n\u00a0")
    return text.startswith(("=", "+", "-", "@", "\t", "\r")) and not _NUMBER.fullmatch(text.strip())


def whole_records(f) -> Iterator[tuple[int, bytes]]:
    """(where it ends, its bytes) of each record of a CSV file that ends with a line break outside of quotes."""
    end, record = 0, b""
    for line in f:
        record += line
        if line.endswith(b"\n") and record.count(b'"') % 2 == 0:
            end += len(record)
            yield end, record
            record = b""


def _free(name, taken):
    """`name`, or `name_2`, … where the table has such a column itself."""
    taken = {c.lower() for c in taken}
    return next(x for x in itertools.chain([name], (f"{name}_{i}" for i in itertools.count(2))) if x not in taken)
