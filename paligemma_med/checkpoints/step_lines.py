"""A run's files that grow by a line a step (metrics.jsonl, nonfinite.jsonl, skipped.jsonl), as they are read again.

A crash may cut off the last line, and a power cut leave a block of NULs where lines were. Such lines are left out: the
steps that they tell of are repeated, or lost, but the run can resume.
"""

import os
from typing import Any

from absl import logging

from paligemma_med.pp import json_text


def read(path: os.PathLike | str) -> list[tuple[str, dict[str, Any]]]:
    """(line, its row) of each whole line of such a file, in order; [] if there is none.

    Lines that aren't an object with a "step" are left out, with one warning that names them.
    """
    found, damaged = [], []
    try:
        with open(path, "rb") as f:
            lines = f.readlines()
    except FileNotFoundError:
        return []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            break
        try:
            row = json_text.parse(line, f"line {number}", "an object with a step", root=dict, constants=True)
            if type(row.get("step")) is not int:
                raise ValueError(f"line {number}: its step is {row.get('step')!r:.40}; expected a whole number")
            found.append((line.decode("utf-8"), row))
        except ValueError as e:
            damaged.append(str(e))
    if damaged:
        more = f" (and {len(damaged) - 1} more lines)" if len(damaged) > 1 else ""
        logging.warning("%s: left out: %s%s", path, damaged[0], more)
    return found
