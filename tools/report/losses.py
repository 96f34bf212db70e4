"""Evaluation loss over tokens seen, a curve a run: the main paper's figure 5 (papers/001), of our own runs.

Read from metrics.jsonl, where a run with an eval of type perplexity logs both.
"""

import dataclasses
import math
import pathlib

from paligemma_med.checkpoints import step_lines
from tools.report import blocks, plots


@dataclasses.dataclass
class Curve:
    """One evaluation's losses in one run.

    folder: the workdir as it was named; run: its short name; name: of the evaluation; group: "" for all
    rows, or "answer_type/OPEN";
    points: [(tokens seen, mean loss of examples, its low end, its high end)], ends None where there is no interval.
    """

    folder: str
    run: str
    name: str
    group: str
    points: list


def read(workdirs) -> list[Curve]:
    """The curves of these workdirs; [] where none has logged any."""
    paths = [pathlib.Path(path) for path in workdirs]
    labels = [path.resolve().name for path in paths]
    out = []
    for path, label in zip(paths, labels):
        run = label if labels.count(label) == 1 else str(path)
        out += _of_run(str(path), run, [row for _, row in step_lines.read(path / "metrics.jsonl")])
    return out


def _of_run(folder, run, rows):
    curves = {}
    for row in rows:
        seen = row.get("tokens_seen")
        for key in row:
            # NAME/per_token is of this kind of evaluation alone; NAME may have slashes itself.
            name, found, group = key.partition("/per_token")
            if not found or (group and not group.startswith("/")):
                continue
            point = (seen, *(row.get(f"{name}/{figure}{group}") for figure in ("avg", "avg_low", "avg_high")))
            if all(isinstance(x, int | float) and math.isfinite(x) for x in point[:2]):
                curves.setdefault((name, group[1:]), []).append(point)
    return [Curve(folder, run, name, group, points) for (name, group), points in curves.items()]


def section(curves) -> blocks.Section:
    """A figure for each evaluation, with a panel for each answer type, and a table of all; one curve or more."""
    parts = [
        blocks.Text(
            "Evaluation loss: nats a token of the true answers, the mean over examples of each one's mean over its "
            "tokens; bands are 95 % intervals by images. Tokens seen: of questions and answers, padding and images not "
            "counted, again in every epoch. Curves compare between models with one tokenizer and prompts of one kind."
        )
    ]
    rows = []
    for name in dict.fromkeys(c.name for c in curves):
        of_name = [c for c in curves if c.name == name]
        groups = dict.fromkeys(c.group for c in of_name)
        shown = [group for group in groups if not group or group.startswith("answer_type/")]
        panels = [(_title(g), {c.run: c.points for c in of_name if c.group == g}) for g in shown]
        ends = "; ".join(f"{c.run} {c.points[0][1]:.3f} to {c.points[-1][1]:.3f}" for c in of_name if not c.group)
        parts.append(
            blocks.Figure(
                plots.losses(f"loss {name}", panels),
                f"{name}: loss over tokens seen.",
                f"Loss of {name} over tokens seen, all questions: {ends}. The table below has the numbers.",
            )
        )
        for c in (c for group in groups for c in of_name if c.group == group):
            best = min(c.points, key=lambda point: point[1])
            last = c.points[-1]
            cells = [f"{len(c.points):,}", f"{last[0]:,}", _loss(last), _loss(best), f"{best[0]:,}"]
            rows.append([name, _title(c.group), c.run, *cells])
    head = ["evaluation", "questions", "run", "times", "tokens seen", "last loss", "lowest loss", "at tokens"]
    parts.append(blocks.Table(head, rows, "Losses", ["95 % in brackets, by images."], left=3))
    return blocks.Section("Evaluation loss", parts)


def _title(group):
    return group.rpartition("/")[2] or "all"


def _loss(point):
    _, loss, low, high = point
    return f"{loss:.3f}" if low is None or high is None else f"{loss:.3f} ({low:.3f}–{high:.3f})"
