"""Tables as people and spreadsheets write them: CSV with commas, semicolons or tabs, its first line the header.

A spreadsheet set to a decimal comma writes semicolons, and cells hold line breaks, quotes, U+2028 and whatever else was
typed. One reader for all tables from outside, so that a file which one program takes is taken by every other.
`encoding_of` tells apart in what such a file is written: spreadsheets still save Windows-1252 and UTF-16.
"""

import csv
import io
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from paligemma_med.pp.files import is_lfs_pointer, lfs_message

# Why a line is no row.
OTHER_WIDTH = "another number of cells than the header"
NO_CSV = "a line that is no CSV"
TOO_LONG = f"a cell of over {csv.field_size_limit():,} characters"


def read(
    lines: Iterable[str], where: os.PathLike | str, *, quotes: bool = True, error: type[ValueError] = ValueError
) -> tuple[list[str], Iterator[tuple[int, dict[str, str] | str]]]:
    """The columns of a table, and its rows in order; lines without text are left out.

    Args:
      lines: a text file opened with newline="", or an `io.StringIO` made so (`str.splitlines` would also split at
        U+2028, form feeds and others, which are characters of a cell).
      where: the file's name, for messages.
      quotes: False: in a table with tabs a quote is a character unless it surrounds the cell, as most programs write
        such tables; a stray one then swallows no lines.
      error: the class of what is raised, here or while rows are read.

    Returns:
      (names without surrounding blanks, none if there is no header; (number of the line where a row begins, from 1;
      row) each). A row is {column: cell} of all columns, or a string: why this line is no row.

    Raises:
      error: a column stands there twice, ignoring case; a quote is never closed.
    """
    return layout(lines, where, quotes=quotes, error=error)[:2]


class Layout(NamedTuple):
    """What `layout` finds: columns and rows as `read` gives them, and the character between cells."""

    columns: list[str]
    rows: Iterator[tuple[int, dict[str, str] | str]]
    delimiter: str


def layout(
    lines: Iterable[str], where: os.PathLike | str, *, quotes: bool = True, error: type[ValueError] = ValueError
) -> Layout:
    """Like `read`, for who will read single rows again, by `row`. No line behind a row is taken before it is given."""
    lines = iter(lines)
    before, delimiter, head = _head(lines)
    delimiter = delimiter or max(",;\t", key=re.sub(r'"[^"]*"?', "", head).count)
    bare = delimiter == "\t" and not quotes
    kind = dict(quoting=csv.QUOTE_NONE) if bare else dict(strict=True)
    reader = csv.reader(itertools.chain([head], lines), delimiter=delimiter, **kind)
    found = _records(reader, before, where, error)
    if bare:
        found = ((line, x if isinstance(x, str) else [_unquoted(c) for c in x]) for line, x in found)
    number, header = next(found, (1, []))
    if isinstance(header, str):
        raise error(f"{where} line {number}: {header}; expected a table's header")
    header = [c.strip() for c in header]
    small = [c.lower() for c in header if c]
    if again := [c for c in small if small.count(c) > 1]:
        raise error(f"{where} line {number}: the column {again[0]} stands there twice; expected once")
    return Layout(header, ((line, x if isinstance(x, str) else _row(header, x)) for line, x in found), delimiter)


def row(text: str, columns: list[str], delimiter: str) -> dict[str, str]:
    """The row that `text`, its lines and perhaps blank ones before them, was with `layout`, quotes meaning quotes."""
    lines = io.StringIO(text, newline="")
    return next(_row(columns, x) for x in csv.reader(lines, delimiter=delimiter, strict=True) if any(map(str.strip, x)))


def _head(lines):
    """(lines before the header, the delimiter if the file says it, the header's first line); takes these lines."""
    delimiter, before = "", 0
    for before, line in enumerate(lines):
        said = re.fullmatch(r"sep=([,;\t])\s*", line)  # by which Excel is told
        if said and not delimiter:
            delimiter = said[1]
        elif line.strip():
            return before, delimiter, line
    return before, delimiter, ""


def _records(reader, before, where, error):
    """(line, cells or why there are none) of all lines with text."""
    while True:
        number = before + reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            if "unexpected end" in str(e):
                raise error(f"{where} line {number}: a quote opens there and is never closed; expected CSV") from None
            yield number, TOO_LONG if "field larger than" in str(e) else NO_CSV
            continue
        if any(c.strip() for c in cells):
            yield number, cells


def _row(header, cells):
    return dict(zip(header, cells)) if len(cells) == len(header) else OTHER_WIDTH


def _unquoted(cell):
    return cell[1:-1].replace('""', '"') if len(cell) > 1 and cell[0] == cell[-1] == '"' else cell


def read_file(path: os.PathLike | str, needed: Iterable[str] = ()) -> list[tuple[int, dict[str, str]]]:
    """All rows of a small table in which each line must be right, as [(line number, row), …].

    Args:
      path: a UTF-8 file; a byte-order mark is left out.
      needed: columns that it must have, in lower case. Their names in the rows are these, however the file spells them.

    Raises:
      ValueError: not UTF-8, a column is missing, or a line is no row; names file and line.
      OSError: can't be read.
    """
    needed = list(needed)
    try:
        with pathlib.Path(path).open(encoding="utf-8-sig", newline="") as f:
            columns, lines = read(f, path)
            names = {c: c.lower() if c.lower() in needed else c for c in columns}
            if missing := [c for c in needed if c not in names.values()]:
                raise ValueError(f"{path}: no column {' and '.join(missing)}; found {', '.join(columns) or 'none'}.")
            rows = list(lines)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: not UTF-8 ({e.reason} at byte {e.start}); save it as CSV UTF-8.") from None
    if wrong := next(((line, why) for line, why in rows if isinstance(why, str)), None):
        raise ValueError(f"{path} line {wrong[0]}: {wrong[1]}.")
    return [(line, {names[c]: cell for c, cell in row.items()}) for line, row in rows]


# --- Encodings ---

_MARKS = ((b"\xef\xbb\xbf", "utf-8"), (b"\xff\xfe", "utf-16-le"), (b"\xfe\xff", "utf-16-be"))
# What `encoding_of` gives, as one would call it.
ENCODINGS = {"utf-8": "UTF-8", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16", "cp1252": "Windows-1252"}


def encoding_of(path: os.PathLike | str) -> tuple[str, int]:
    """(encoding, bytes of its mark at the file's beginning) of a text file: a key of `ENCODINGS`.

    A byte-order mark decides; without one, NUL in every other byte of the beginning means UTF-16. What is UTF-8 to the
    end is read as that. A file in which no letter outside ASCII is UTF-8 is Windows-1252, if it has none of the five
    bytes that aren't defined there.

    Raises:
      ValueError: names the line: neither of these; both at once, as when two files were joined; NUL characters.
      OSError: can't be read.
    """
    with open(path, "rb") as f:
        start = f.read(4096)
        if is_lfs_pointer(start):
            raise ValueError(f"{path}: {lfs_message('a table')}")
        found = [(mark, encoding) for mark, encoding in _MARKS if start.startswith(mark)]
        mark, encoding = found[0] if found else (b"", _without_mark(start))
        f.seek(len(mark))
        if encoding != "utf-8":
            return encoding, len(mark)
        return _eight_bits(f, path, marked=bool(mark)), len(mark)


def _without_mark(start):
    if start.count(b"\0") * 4 < len(start):
        return "utf-8"
    return "utf-16-le" if start[1::2].count(b"\0") >= start[::2].count(b"\0") else "utf-16-be"


def _eight_bits(f, path, marked):
    """utf-8 or cp1252: line by line, so that a large file needs no memory, and the wrong line is known."""
    first_utf8 = first_other = None
    for number, line in enumerate(f, 1):
        if b"\0" in line:
            raise ValueError(f"{path} line {number}: NUL characters, so this is no text; expected a table.")
        if line.isascii():
            continue
        try:
            line.decode("utf-8")
            first_utf8 = first_utf8 or number
        except UnicodeDecodeError as e:
            first_other = first_other or (number, e.start)
            try:
                line.decode("cp1252")
            except UnicodeDecodeError:
                raise ValueError(_neither(path, number, e.start)) from None
        if first_other and (first_utf8 or marked):
            other, at = first_other
            said = "by the mark at its beginning" if marked else f"in line {first_utf8}"
            raise ValueError(
                f"{path} line {other}: byte {at + 1} is not UTF-8, which the file is {said}; save all of it as UTF-8."
            )
    return "cp1252" if first_other else "utf-8"


def _neither(path, number, at):
    return f"{path} line {number}: byte {at + 1} is neither UTF-8 nor Windows-1252; save the file as UTF-8."
