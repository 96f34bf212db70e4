"""Markdown tables: one writer for everything that prints figures or writes a report.

It lives in `pp` because data sets' reports may import no other package of the library.
"""

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

    Texts from outside need more: see `tools.report.blocks.escape`.
    """
    return str(value).replace("|", "\\|").replace("\n", " ")
