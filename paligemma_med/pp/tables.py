"""Tables as people and spreadsheets write them: CSV with commas, semicolons or tabs, its first line the header.

A spreadsheet set to a decimal comma writes semicolons, and cells hold line breaks, quotes, U+2028 and whatever else was
typed. One reader for all tables from outside, so that a file which one program takes is taken by every other.
"""

import csv
import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Iterator

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
    return header, ((line, x if isinstance(x, str) else _row(header, x)) for line, x in found)


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
