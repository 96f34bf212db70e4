"""Makes the output of a journal of replies: kept rows, drops, failed units and a report.

Nothing is asked here. The same units and replies give the same bytes, however often the run that
asked was killed; the rules can be changed and the files written anew without a model.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Paths:
    """Files of a run; all lie beside the output."""

    output: pathlib.Path
    drops: pathlib.Path
    failed: pathlib.Path
    report: pathlib.Path
    journal: pathlib.Path


def paths_of(output: str | os.PathLike) -> Paths:
    """`qa.jsonl` -> also qa.drops.jsonl, qa.failed.jsonl, qa.report.json, qa.journal."""
    output = pathlib.Path(output).expanduser()
    stem = output.name.removesuffix(".jsonl")
    names = (output.name, *(stem + s for s in (".drops.jsonl", ".failed.jsonl", ".report.json")))
    return Paths(*(output.with_name(n) for n in (*names, f"{stem}.journal")))


def write(
    units: Iterable[Any],
    journals: Sequence[Any],
    output: str | os.PathLike,
    config: Mapping[str, Any],
    provenance: Mapping[str, Any],
    books: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the four files, each whole; F itself last.

    Args:
      units: in source order, each with `key`, `row` (a sources.Row) and `template` (a Template).
      journals: each with `replies(key)` -> list of records in the order in which they came. A
        record is a dict with key, reply (whole text), finish ("stop", "length", … or None), usage
        ([prompt, completion] tokens or None), model, attempt (0, 1), and, where it is measured,
        seconds: its share of the wall time (a local batch's seconds / its replies; of a server,
        the time since the reply before, or since the start), so that their sum is the run's.
        Optional: fingerprint (a server's system_fingerprint).
      output: F.
      config: see configs/default.py.
      provenance: the same for all rows: model, weights, backend, seed, settings, versions. A
        record's own `model` goes before it.
      books: the report of the sources' ledger, if there is one; stands in the report.

    Returns:
      The report. Its "speed" alone is measured; the rest is a function of units and replies.

    Raises:
      ValueError: a bad config; two units of one image and template; a file that can't be written.
    """
    raise NotImplementedError


def describe(report: Mapping[str, Any]) -> Sequence[str]:
    """The report as lines for a person."""
    raise NotImplementedError
