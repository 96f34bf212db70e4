"""Figures of judgements: means with intervals, agreement with people, cost, and the table of them."""

import collections
import math
import re

import numpy as np

from paligemma_med.judge.criteria import PROTOCOLS
from paligemma_med.metrics import scoring, stats, tables
from paligemma_med.pp import markdown
from paligemma_med.pp import tables as text_tables


def summarise(judgements, rows, protocol) -> dict[str, float]:
    """Figures of judgements.

    Args:
      judgements: as `judge` gives them.
      rows: the predictions' rows, for groups and images.
      protocol: one of PROTOCOLS.

    Returns:
      {`{who}/{group}/{figure}`: number}; groups as in `scoring`. Figures:
        n               verdicts asked for: questions times samples
        unjudged        of these, without a score; they are in none of the next
        mean            of the scores: accuracy of a 0/1 protocol, WASM of pefomed5. NaN if none
        mean_low, mean_high   95 %, verdicts on one image kept together: Wilson's of a 0/1 protocol,
                        else the bootstrap
        mean_worst, mean_best   were all unjudged of the lowest or highest score
        runs, sd        samples a question, and the standard deviation (ddof 1) of the runs' means;
                        run i is sample i of every question; sd from two runs on
        count_{score}   verdicts by score
    """
    scores = PROTOCOLS[protocol].scores
    by_id = {row["question_id"]: row for row in rows}
    pairs = [(line, by_id[line["question_id"]]) for line in judgements]
    groups = {"overall": pairs}
    for key in scoring.GROUPS:
        for value in sorted({str(row[key]) for _, row in pairs if row.get(key)}):
            groups[f"{key}/{value}"] = [pair for pair in pairs if str(pair[1].get(key)) == value]
    out = {}
    for group, members in groups.items():
        for who in dict.fromkeys(line["who"] for line, _ in members):
            figures = _figures([pair for pair in members if pair[0]["who"] == who], scores)
            out |= {f"{who}/{group}/{name}": x for name, x in figures.items()}
    return out


def _figures(members, scores):
    verdicts = [(s, _image(row)) for line, row in members for s in line["scores"]]
    values = [s for s, _ in verdicts if s is not None]
    images = [image for s, image in verdicts if s is not None]
    missing, total = len(verdicts) - len(values), sum(values)
    out = dict(n=len(verdicts), unjudged=missing, mean=total / len(values) if values else math.nan)
    interval = stats.wilson_clustered if tuple(scores) == (0, 1) else stats.bootstrap
    out["mean_low"], out["mean_high"] = interval(values, images) if values else (math.nan, math.nan)
    out["mean_worst"] = (total + missing * scores[0]) / len(verdicts)
    out["mean_best"] = (total + missing * scores[-1]) / len(verdicts)
    runs = collections.defaultdict(list)
    for line, _ in members:
        for run, score in enumerate(line["scores"]):
            if score is not None:
                runs[run].append(score)
    out["runs"] = max(len(line["scores"]) for line, _ in members)
    if out["runs"] > 1 and len(runs) == out["runs"]:
        out["sd"] = float(np.std([np.mean(x) for x in runs.values()], ddof=1))
    counts = collections.Counter(values)
    return out | {f"count_{score}": counts[score] for score in scores}


def _image(row):
    """The key of a row's image; a question without an image has its own."""
    ids = (row.get(key) for key in ("image_key", "image_id"))
    return next((str(x) for x in ids if x is not None), f"question {row['question_id']}")


def read_labels(path, rows, protocol) -> dict[tuple, int]:
    """Human labels from a table with the columns question_id and label, see `pp.tables`.

    A column sample says which answer of the question was labelled, from 0; without it, the first.

    Returns:
      {(question_id, sample): label}, question_id as in the rows.

    Raises:
      ValueError: a missing column; a row with an unknown question, a label off the scale, or one
        that stands there twice.
    """
    scores = PROTOCOLS[protocol].scores
    ids = {str(row["question_id"]): row["question_id"] for row in rows}
    labels = {}
    for line, row in text_tables.read_file(path, ("question_id", "label")):
        where = f"{path}, line {line}"
        question, label = row["question_id"].strip(), row["label"].strip()
        sample = row.get("sample", "").strip() or "0"
        if question not in ids:
            raise ValueError(f"{where}: no question {question!r} in the predictions.")
        if label not in map(str, scores):
            raise ValueError(f"{where}: label is {label!r}; expected one of {scores}.")
        if not re.fullmatch("[0-9]{1,9}", sample):
            raise ValueError(f"{where}: sample is {sample!r}; expected a whole number from 0.")
        key = ids[question], int(sample)
        if key in labels:
            raise ValueError(f"{where}: question {question!r} has a label already.")
        labels[key] = int(label)
    if not labels:
        raise ValueError(f"{path} has no labels; expected a row a question.")
    return labels


def agreement(judgements, labels, protocol) -> dict:
    """How far the judge agrees with people, on the model's answers.

    Returns:
      n: answers with a label and a score; unjudged: with a label alone; agree: share of equal
      ones; kappa: Cohen's, and kappa_quadratic on a scale of more than two points (`stats.kappa`;
      None where it isn't defined); table: [[human, judge, n], …].

    Raises:
      ValueError: a label of an answer that wasn't to be judged.
    """
    scores = {
        (line["question_id"], i): score
        for line in judgements
        if line["who"] == "model"
        for i, score in enumerate(line["scores"])
    }
    if missing := [key for key in labels if key not in scores]:
        raise ValueError(
            f"sample {missing[0][1]} of question {missing[0][0]!r} has a label, but isn't judged; "
            "expected labels of judged answers alone."
        )
    pairs = [(label, scores[key]) for key, label in labels.items() if scores[key] is not None]
    human, judged = [a for a, _ in pairs], [b for _, b in pairs]
    out = dict(n=len(pairs), unjudged=len(labels) - len(pairs))
    out["agree"] = sum(a == b for a, b in pairs) / len(pairs) if pairs else math.nan
    out["kappa"] = stats.kappa(human, judged)
    if len(PROTOCOLS[protocol].scores) > 2:
        out["kappa_quadratic"] = stats.kappa(human, judged, "quadratic")
    table = sorted(collections.Counter(pairs).items())
    return plain(out) | {"table": [[a, b, n] for (a, b), n in table]}


def cost(tokens, price_in, price_out) -> float | None:
    """The price of these tokens, given prices per million; None if prices or tokens are unknown."""
    if price_in is None or price_out is None or tokens["without_usage"]:
        return None
    spent = tokens["prompt_tokens"] * price_in + tokens["completion_tokens"] * price_out
    return spent / 1e6


def plain(figures: dict[str, float]) -> dict[str, float | None]:
    """The same, with None for what isn't finite, since JSON has no NaN."""
    return {k: x if math.isfinite(x) else None for k, x in figures.items()}


def format_table(entry) -> str:
    """A part of judge.json as a Markdown table, with the basis of its figures below."""
    metrics, top = entry["metrics"], entry["scores"][-1]
    unit, digits = (100, 1) if top == 1 else (1, 2)

    def number(x):
        return "–" if x is None else f"{unit * x:.{digits}f}"

    head = ["accuracy, %" if top == 1 else f"WASM, 0–{top}", "mean (95 %)", "sd over runs", "unjudged", "verdicts"]
    table = [head]
    for name in (k.removesuffix("/mean") for k in metrics if k.endswith("/mean")):
        who, _, group = name.partition("/")
        title = group.partition("/")[2] or group
        figure = {k: metrics.get(f"{name}/{k}") for k in ("mean", "mean_low", "mean_high", "sd")}
        mean, low, high, sd = map(number, figure.values())
        counts = (f"{metrics[f'{name}/{k}']:,}" for k in ("unjudged", "n"))
        if figure["mean_low"] is not None:
            mean += f" ({low}–{high})"
        table.append([f"{tables.COLUMNS[who]}, {title}", mean, sd, *counts])
    tokens, used = entry["tokens"], entry["cost"]
    lines = [markdown.table(table), ""]
    lines += [
        f"Judge {entry['model']}, prompt {entry['prompt']} ({entry['prompt_digest'][:8]}): "
        f"{entry['requests']:,} texts, {tokens['replies']:,} replies, {tokens['unusable']:,} of "
        f"them unusable; {tokens['prompt_tokens']:,} + {tokens['completion_tokens']:,} tokens"
        + ("" if used is None else f", cost {used:.4f}")
        + "."
    ]
    if human := entry["agreement"]:
        kappa = human.get("kappa_quadratic", human["kappa"])
        kind = "quadratic kappa" if "kappa_quadratic" in human else "kappa"
        lines += [
            f"Human labels: {human['n']:,} compared, {100 * (human['agree'] or 0):.1f} % equal, "
            f"Cohen's {kind} " + ("not defined." if kappa is None else f"{kappa:.3f}.")
        ]
    return "\n".join(lines)
