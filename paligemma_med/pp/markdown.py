"""Markdown tables: one writer for everything that prints figures or writes a report.

It lives in `pp` because data sets' reports may import no other package of the library.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any


def row(cells: Iterable[Any]) -> str:
    """A line of a table: "| a | b |"."""
    return f"| {' | '.join(map(str, cells))} |"


def head(cells: Sequence[Any], left: int = 1) -> str:
    """The first two lines of a table whose rows are printed one by one later.

    Args:
      cells: titles of the columns.
      left: how many of the first columns hold words; the others hold numbers and are right-aligned.
    """
    return row(cells) + "\n" + row(["---" if i < left else "---:" for i in range(len(cells))])


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A whole table, aligned so that it also reads well as plain text.

    Args:
      rows: [[cell, …], …], the head first.
      left: as for `head`.

    Returns:
      Lines without a newline at the end.
    """
    widths = [max(3, *(len(cells[i]) for cells in rows)) for i in range(len(rows[0]))]

    def line(cells):
        return row([x.ljust(w) if i < left else x.rjust(w) for i, (x, w) in enumerate(zip(cells, widths))])

    rule = row(["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])


def cell(value: Any) -> str:
    """One of the project's own texts as a cell, which a bar or a line break would end.

    Texts from outside need more: see `escape`.
    """
    return str(value).replace("|", "\\|").replace("\n", " ")


def escape(text: Any) -> str:
    """A text that Markdown shows as it is, on one line, also in a table's cell."""
    text = re.sub(r"([\\`*_{}\[\]<>#|~!&])", r"\\\1", str(text))
    # Markdown blocks begin with these; a dot or minus within a line is harmless and stays readable.
    text = re.sub(r"^(\s*)([-+=])", r"\1\\\2", text)
    text = re.sub(r"^(\s*\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return re.sub(r"\s*[\r\n\u2028\u2029]+\s*", " ⏎ ", text.strip()) or " "
