"""Evaluation loss over tokens seen, a curve a run: the main paper's figure 5 (papers/001), of our own runs.

Read from metrics.jsonl, where a run with an eval of type perplexity logs both. What such an eval left last, or
`evaluate` afterwards, stands in eval/<name>/losses.jsonl, from which its figures are made anew.
"""

import dataclasses
import math
import pathlib

from paligemma_med.checkpoints import step_lines
from paligemma_med.evaluation import results
from paligemma_med.metrics import losses
from paligemma_med.pp import json_text
from tools.report import blocks, plots

LOSSES = "losses.jsonl"


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


@dataclasses.dataclass
class Evaluated:
    """One eval/<name>/losses.jsonl.

    folder, run, name: as of `Curve`; figures: of `metrics.losses`, made from its rows; about: what metrics.json says;
    problems: sentences.
    """

    folder: str
    run: str
    name: str
    figures: dict
    about: dict
    problems: list


def read(workdirs) -> list[Curve]:
    """The curves of these workdirs; [] where none has logged any."""
    out = []
    for path, run in _runs(workdirs):
        out += _of_run(str(path), run, [row for _, row in step_lines.read(path / "metrics.jsonl")])
    return out


def read_evaluated(workdirs) -> list[Evaluated]:
    """The evaluations of a loss in these workdirs; ValueError names a file and row that can't be read."""
    out = []
    for path, run in _runs(workdirs):
        for file in sorted(path.glob(f"eval/**/{LOSSES}")):
            name = file.parent.relative_to(path / "eval").as_posix()
            out.append(_evaluated(str(path), run, name, file))
    return out


def _runs(workdirs):
    """[(path, short name)] of the workdirs."""
    paths = [pathlib.Path(path) for path in workdirs]
    labels = [path.resolve().name for path in paths]
    return [(path, label if labels.count(label) == 1 else str(path)) for path, label in zip(paths, labels)]


def _evaluated(folder, run, name, file):
    rows = results.read_rows(file)
    for number, row in enumerate(rows, 1):
        loss, tokens = row.get("loss"), row.get("tokens")
        if not isinstance(loss, int | float) or type(tokens) is not int or tokens < 0 or "question_id" not in row:
            raise ValueError(
                f"{file}, line {number}: loss is {json_text.name_of(loss)}, tokens is {json_text.name_of(tokens)}; "
                "expected a number, a whole number, and a question_id."
            )
    stored, about, problems = {}, {}, []
    try:
        stored, about = results.read_metrics(file.parent / results.METRICS)
    except (OSError, ValueError) as e:
        problems.append(f"metrics.json can't be read: {e}")
    groups = about.get("groups")
    figures = losses.summarise(rows, groups if isinstance(groups, list) else losses.GROUPS)
    wrong = [k for k, x in stored.items() if k in figures and not math.isclose(x, figures[k], rel_tol=1e-9)]
    if wrong:
        problems.append(f"metrics.json does NOT follow from {LOSSES}: {wrong[0]} is {stored[wrong[0]]}")
    return Evaluated(folder, run, name, figures, about, problems)


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


def section(curves, evaluated=()) -> blocks.Section:
    """A table of what was evaluated; a figure for each evaluation with curves, with a panel for each answer type, and
    a table of these. There is one or more of either."""
    parts = [
        blocks.Text(
            "Evaluation loss: nats a token of the true answers, the mean over examples of each one's mean over its "
            "tokens; bands are 95 % intervals by images. Tokens seen: of questions and answers, padding and images not "
            "counted, again in every epoch. Losses compare between models with one tokenizer and prompts of one kind."
        )
    ]
    parts += [blocks.Warning(f"{e.run}, {e.name}: {problem}.") for e in evaluated for problem in e.problems]
    return blocks.Section("Evaluation loss", [*parts, *_of_curves(curves), *_of_evaluated(evaluated)])


def _of_evaluated(evaluated):
    rows = []
    for e in evaluated:
        for group in [key.removeprefix("n") for key in e.figures if key == "n" or key.startswith("n/")]:
            ends = (e.figures.get(f"avg_{end}{group}") for end in ("low", "high"))
            cells = [_loss((0, e.figures[f"avg{group}"], *ends))]
            cells += [f"{e.figures[name + group]:.3f}" for name in ("per_token", "sum", "perplexity")]
            counts = [f"{e.figures[name + group]:,}" for name in ("tokens", "n")]
            rows.append([e.run, e.name, _title(group), str(e.about.get("split") or "?"), *cells, *counts])
    if not rows:
        return []
    head = ["run", "evaluation", "questions", "split", "mean of examples", "mean of tokens", "nats an answer"]
    head += ["perplexity", "tokens", "n"]
    return [blocks.Table(head, rows, "Evaluated last", ["95 % in brackets, by images."], left=4)]


def _of_curves(curves):
    parts = []
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
    if rows:
        parts.append(blocks.Table(head, rows, "While training", ["95 % in brackets, by images."], left=3))
    return parts


def _title(group):
    return group.rpartition("/")[2] or "all"


def _loss(point):
    _, loss, low, high = point
    return f"{loss:.3f}" if low is None or high is None else f"{loss:.3f} ({low:.3f}–{high:.3f})"
