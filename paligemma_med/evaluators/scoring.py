"""Every figure of an evaluation, from the rows of its predictions.jsonl.

The evaluators and `tools.report` call the same function, so a figure can't differ from what the
predictions say. It knows no model and no file.

A figure is called `{who}/{group}/{figure}`.

who      "model" or a control: CONTROLS says what each is.
group    "overall", "answer_type/CLOSED", "content_type/Organ", "modality/CT", …: see GROUPS.
figure   acc         equal after `answers.normalise`; the figure of the tables
         acc_strict  equal but for case and blanks around: the usual "exact match"
         acc_set     as acc, but the parts of a comma-separated answer may come in any order
         acc_low, acc_high   95 % of acc, Wilson's interval
         Of several samples of a question the first counts. Where there are several:
         acc_mean, acc_sd    mean over the runs, and the runs' standard deviation; run i is sample i
                             of every question
         nonrobust           share of questions whose samples are three different answers or more
         acc_penalised_item, acc_penalised_total   acc_mean, docked for those by either reading
Then n (questions), `n/{group}`, n_images, truncated (prompts that lost tokens) and unfinished (the
model's answers, all samples, without EOS within max_new_tokens).
"""

import numpy as np

from paligemma_med.evaluators import answers, stats

# What needs no model: the most frequent answer in training, to the same question and to any
# question of the same answer type; the question itself as the answer.
TEXT_CONTROLS = ("majority", "majority_type", "echo")
# The same model and prompts with other images: another question's, mid-grey, noise.
IMAGE_CONTROLS = ("shuffled_images", "blank_image", "noise_image")
CONTROLS = (*TEXT_CONTROLS, *IMAGE_CONTROLS)
PROTOCOLS = ("vqa", "closed", "open", "multiple_choice")
# Keys of a row by whose values questions are told apart in the tables.
GROUPS = ("answer_type", "content_type", "modality", "location")

_FORMS = dict(acc=answers.normalise, acc_strict=answers.strict, acc_set=answers.as_set)
FIGURES = tuple(_FORMS)


def score(prediction, answer):
    """{figure: bool} for the three figures."""
    return {k: form(prediction) == form(answer) for k, form in _FORMS.items()}


def correct(prediction, answer, prefix=""):
    """The same by the keys of a row: {prefix + "correct", …_strict, …_set: bool}."""
    return {
        prefix + figure.replace("acc", "correct"): x
        for figure, x in score(prediction, answer).items()
    }


def texts(row, who):
    """What model or control said to a question: a list of strings, one a sample."""
    if who == "model":
        return row["predictions"]
    return [row[f"{who}_prediction"]] if who in TEXT_CONTROLS else row[f"{who}_predictions"]


def controls_of(rows):
    """The controls that rows of predictions.jsonl hold, in the order of the tables."""
    return tuple(c for c in CONTROLS if rows and f"{c}_correct" in rows[0])


def summarise(rows, protocol="vqa", controls=None, groups=GROUPS):
    """Figures of an evaluation, as the top of this file describes them.

    Args:
      rows: dicts of predictions.jsonl, one or more.
      protocol: one of PROTOCOLS.
      controls: those to give figures of; None: all that the rows hold.
      groups: keys of a row; those that rows lack are left out.

    Returns:
      {name: number}.

    Raises:
      ValueError: no rows, or an unknown protocol.
    """
    if not rows:
        raise ValueError("there are no questions to evaluate on.")
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}; expected one of {list(PROTOCOLS)}.")
    columns = ("model", *(controls_of(rows) if controls is None else controls))
    members = {"overall": rows}
    for key in groups:
        for value in sorted({str(row[key]) for row in rows if row.get(key)}):
            members[f"{key}/{value}"] = [row for row in rows if str(row.get(key)) == value]
    metrics = {"n": len(rows)}
    for group, inside in members.items():
        if group != "overall":
            metrics[f"n/{group}"] = len(inside)
        for who in columns:
            found = _figures(inside, who)
            metrics |= {f"{who}/{group}/{figure}": x for figure, x in found.items()}
    for name, count in (("tokens_cut", lambda x: x > 0), ("unfinished", int)):
        if name in rows[0]:
            key = {"tokens_cut": "truncated"}.get(name, name)
            metrics[key] = sum(int(count(row[name])) for row in rows)
    return metrics


def _figures(rows, who):
    prefix = "" if who == "model" else f"{who}_"
    out = {}
    for figure in FIGURES:
        key = prefix + figure.replace("acc", "correct")
        out[figure] = float(np.mean([row[key] for row in rows]))
    hits = sum(row[f"{prefix}correct"] for row in rows)
    out["acc_low"], out["acc_high"] = stats.wilson(hits, len(rows))
    return out


# --- Table ---

TITLES = {
    "model": "model",
    "majority": "majority answer",
    "majority_type": "majority of type",
    "echo": "question echoed",
    "shuffled_images": "images shuffled",
    "blank_image": "grey image",
    "noise_image": "noise image",
}


def format_table(metrics):
    """Figures of `summarise` as a Markdown table: percent and 95 % interval."""
    columns = [who for who in TITLES if f"{who}/overall/acc" in metrics]
    groups = [("overall", metrics["n"])]
    groups += [(k.removeprefix("n/"), n) for k, n in metrics.items() if k.startswith("n/")]

    def cell(who, group):
        acc, low, high = (
            100 * metrics[f"{who}/{group}/{figure}"] for figure in ("acc", "acc_low", "acc_high")
        )
        return f"{acc:.1f} ({low:.1f}–{high:.1f})"

    table = [["exact match, %", *(TITLES[who] for who in columns), "n"]]
    for group, n in groups:
        title = group.partition("/")[2] or group
        table.append([title, *(cell(who, group) for who in columns), f"{n:,}"])
    for figure, title in (("acc_strict", "overall, strict"), ("acc_set", "overall, any order")):
        values = (f"{100 * metrics[f'{who}/overall/{figure}']:.1f}" for who in columns)
        table.append([title, *values, f"{metrics['n']:,}"])
    return to_markdown(table)


def to_markdown(table):
    """[[cell, …], …], the head first → an aligned Markdown table, numbers to the right."""
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))]
        for row in table
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
