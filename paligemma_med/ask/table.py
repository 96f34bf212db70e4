"""Asks every question of an own table, and keeps the answers as they come."""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import paligemma_med
from paligemma_med.ask.answering import Answerer, Question
from paligemma_med.ask.sheet import Sheet
from paligemma_med.checkpoints import fingerprint
from paligemma_med.config import files as config_files
from paligemma_med.evaluation import progress
from paligemma_med.parallel import notes


class Asked(NamedTuple):
    """What came of a table.

    Attributes:
      path: of answers.csv.
      rows: that it has; `failed` of them have an error, and `before` were there already.
      images: that went through the image tower, in this start.
      escaped: cells with an apostrophe in front, in this start.
    """

    path: pathlib.Path
    rows: int
    failed: int
    before: int
    images: int
    escaped: int


def questions_of(table, start=0) -> Iterator[Question]:
    """The `Question`s of a `pp.own_table.OwnTable` from row `start` on, each read when it is its turn."""
    for i in range(start, len(table)):
        yield Question(table[i], lambda i=i: table.image_bytes(i), i)


def check_images(table) -> None:
    """Raises ValueError if not one of the image files that a table names is there: its folder is another."""
    if not table.image_sizes.any() and (path := table.image_path(0)) is not None:
        raise ValueError(
            f"{table.name}: none of the images that it names is there; the first would be {path}. --images names the "
            "folder that they are in."
        )


def identity_of(answerer: Answerer, table, **settings) -> dict[str, Any]:
    """All that the answers to a table depend on, as JSON-able values."""
    with notes.stage("taking the weights' fingerprint"):
        weights = fingerprint.of_params(answerer.params)
    return dict(
        table=table.digest,
        weights=weights,
        config=config_files.to_json(answerer.config),
        software=paligemma_med.__version__,
        columns=table.own,
        **settings,
    )


def ask_table(answerer: Answerer, table, out, identity, **kw) -> Asked:
    """Writes `out`/answers.csv: a line for each row of the table. Killed, the same call goes on.

    Args:
      table: a `pp.own_table.OwnTable`.
      identity: from `identity_of`.
      **kw: of `Sheet`.

    Raises:
      ValueError: answers.csv is of other questions.
    """
    with Sheet(out, list(table.own.values()), identity, delimiter=table.delimiter, **kw) as sheet:
        before, total = sheet.done, len(table)
        if before < total:
            _ask(answerer, table, sheet, progress.bar("ask", total, done=before))
        return Asked(sheet.path, total, sheet.failed, before, answerer.encoded, sheet.escaped)


def _ask(answerer, table, sheet, bar):
    """Asks what is left of a table."""
    start = sheet.done
    with bar:
        for answered in answerer.answers(questions_of(table, start), len(table) - start):
            sheet.add(
                ({theirs: question.texts[ours] for ours, theirs in table.own.items()}, answer)
                for question, answer in answered
            )
            bar.update(len(answered))
