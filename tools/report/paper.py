"""The paper's Tables 1, 2, 4 and 5: the published figures next to ours, or "not run".

Published figures are those of "Adapting Lightweight Vision Language Models for Radiological Visual
Question Answering" (Shourya, Dumontier, Sun). Protocols differ, so each table states both: a figure here
is comparable with one there only as far as these agree.
"""

import math

import numpy as np

from paligemma_med.metrics import scoring, tables, text_metrics
from tools.report import blocks, figures

NOT_RUN = "not run"
# Controls shown with ours: what the question alone gives, and the same model without the image.
CONTROLS = ("majority", "shuffled_images")
TEXT_CONTROLS = ("majority", "echo", "shuffled_images")

# Data set of the paper → beginnings of our data sets' names.
SETS = {
    "SLAKE": ("slake",),
    "PMC-VQA": ("pmc_vqa",),
    "ROCO v2.0": ("rocov2", "roco_v1"),
    "MedPix v2.0": ("medpix2",),
    "ROCO + MedPix": ("rocov2", "roco_v1", "medpix2"),
}
TABLE1 = (
    ("SLAKE (Closed)", "SLAKE", "CLOSED", "–", "79.00 ± 2.75", "86.50 ± 1.60"),
    ("PMC-VQA (Short)", "PMC-VQA", None, "32.22 ± 2.23", "33.15 ± 3.15", "58.44 ± 2.53"),
    ("ROCO v2.0 (Open)", "ROCO v2.0", None, "32.25 ± 3.60", "34.00 ± 3.95", "56.56 ± 3.57"),
    ("ROCO + MedPix (Annealing)", "ROCO + MedPix", None, "39.53 ± 3.22", "41.48 ± 3.90", "56.63 ± 3.22"),
)
# Region → (published, LLaVA-Med, our locations as SLAKE and MedPix write them).
TABLE2 = (
    ("Chest", "15/50", "19/50", ("lung", "chest_heart", "chest_mediastinal", "chest, pulmonary", "thorax")),
    ("Gastrointestinal", "28/50", "32/50", ("abdomen", "gastrointestinal")),
    ("Musculoskeletal", "39/50", "41/50", ("musculoskeletal", "spine", "spine and muscles")),
    ("Brain and Neuro", "14/50", "22/50", ("brain", "brain_tissue", "brain_face", "brain and neuro", "nerve, central")),
)
_TEXT_ROWS = ("ROUGE-S", "ROUGE-M", "ROUGE-L", "BLEU", "Accuracy")
TABLE4 = {
    "MedPix v2.0": ("0.311 ± 0.255", "0.167 ± 0.082", "0.308 ± 0.125", "0.055 ± 0.111", "34/200 (82/200)"),
    "ROCO v2.0": ("0.325 ± 0.132", "0.179 ± 0.124", "0.278 ± 0.120", "0.059 ± 0.090", "63/200 (113/200)"),
    "ROCO + MedPix": ("0.334 ± 0.122", "0.181 ± 0.124", "0.304 ± 0.180", "0.077 ± 0.065", "71/200 (113/200)"),
    "PMC-VQA": ("–", "–", "–", "–", "0.3002"),
}
TABLE5 = {
    "SLAKE": ("–", "–", "–", "–", "0.26 (0.59)"),
    "MedPix v2.0": ("0.322 ± 0.240", "0.165 ± 0.088", "0.318 ± 0.125", "0.024 ± 0.212", "33/200 (82/200)"),
    "ROCO v2.0": ("0.325 ± 0.182", "0.196 ± 0.122", "0.266 ± 0.080", "0.008 ± 0.121", "68/200 (113/200)"),
    "ROCO + MedPix": ("0.380 ± 0.077", "0.219 ± 0.111", "0.412 ± 0.109", "0.430 ± 0.086", "74/200 (113/200)"),
    "PMC-VQA": ("–", "–", "–", "–", "0.31046"),
}

_PUBLISHED1 = (
    "Published (in italics): mean ± standard deviation over five inference runs, each on a sample "
    "of 200; SLAKE and PMC-VQA by exact answers with an unclear penalty for non-robust ones, the "
    "others by a language model's 0/1 verdict. At 200 questions the standard error of an accuracy "
    "is about 3.4 points, more than what stage 1 gains in this table."
)
_PUBLISHED2 = (
    "Published (in italics): one answer to each of 50 questions a region, judged by the authors by "
    "eye. Ours: all questions of the split whose image shows the region, exact match. Of our "
    "regions, SLAKE's and MedPix' abdomen, kidneys included, is the nearest to gastrointestinal."
)
_PUBLISHED45 = (
    "Published (in italics): ± 1 standard deviation over answers; accuracy of 200 (LLaVA-Med's in "
    "brackets). ROUGE-S, -M and -L are ROUGE-1, -2 and -L by their size, BLEU is NLTK's for a "
    "sentence. The rows that the authors have shown score the prompt as part of the answer, and "
    "echoing the question without seeing the image reaches ROUGE-1/2/L of .360/.205/.278 on ROCO: "
    "compare with the echo column, not with 0. Their accuracies differ from Table 1's: 71 and 74 "
    "of 200 are 35.5 and 37.0 % where that has 39.53 and 41.48, SLAKE's 0.26 stands for 79.00."
)


def section(evaluations, judged=None, locations=None) -> blocks.Section:
    """The four tables as a `Section`.

    Args:
      evaluations: list of `Evaluation`.
      judged: function of an Evaluation → its judge's part of judge.json under the paper's 0/1
        criterion, or None.
      locations: function of an Evaluation → {question_id: location} for rows that don't say.
    """
    judged, locations = judged or (lambda e: None), locations or (lambda e: {})
    runs = list(dict.fromkeys(e.run for e in evaluations))
    by_run = {run: [e for e in evaluations if e.run == run] for run in runs}
    return blocks.Section(
        "Beside the paper's tables",
        [
            _table1(by_run, judged),
            _table2(by_run, locations),
            _table45("Table 4: without stage 1", TABLE4, by_run, judged, stage1=False),
            _table45("Table 5: with stage 1", TABLE5, by_run, judged, stage1=True),
        ],
    )


def belongs(evaluations) -> bool:
    """Whether one of these is on a data set of the paper; else its tables would say "not run" and nothing more."""
    return any(find(evaluations, dataset) for dataset in SETS)


def find(evaluations, dataset) -> list:
    """The evaluations of a run that stand for a data set of the paper, one for each of our data sets.

    Of several, the test split wins, then the most answers per question, then the most questions;
    "ROCO + MedPix" needs both. Dialogues are another task.
    """
    best = {}
    for e in evaluations:
        if "dialogue_id" in e.rows[0]:
            continue
        name = str(e.data.get("name", ""))
        for prefix in SETS[dataset]:
            if name.startswith(prefix):
                key = "roco" if prefix.startswith("roco") else prefix
                rank = ("test" in str(e.data.get("split", "")), e.samples, len(e.rows))
                if key not in best or rank > best[key][0]:
                    best[key] = rank, e
    found = [e for _, e in best.values()]
    return found if dataset != "ROCO + MedPix" or len(found) == 2 else []


def _rows(evaluations, answer_type=None):
    return [row for e in evaluations for row in e.rows if answer_type is None or row["answer_type"] == answer_type]


def accuracy(rows, who="model") -> str:
    """The accuracy of these rows, written as in `tables.as_text`; multiple choice by letter or nearest
    choice."""
    if not rows or (who != "model" and who not in scoring.controls_of(rows)):
        return NOT_RUN
    rule = figures.rule_of(rows)
    protocol = "vqa" if rule == "acc" else "multiple_choice"
    metrics = scoring.summarise(rows, protocol, [] if who == "model" else [who], groups=())
    text = tables.as_text(metrics, who, "overall", rule)
    return text if rule == "acc" else f"{text}, {figures.RULES[rule]}"


def _said(dataset, run, found):
    """How our figures for a data set came about."""
    out = []
    for e in found:
        split = e.about.get("split") or f"{e.data['name']} {e.data.get('split', '')}"
        out.append(f"{run}, {dataset}: {split} ({e.name}), {e.protocol}")
    return out


def _table1(by_run, judged):
    head = ["Dataset", "w/o Stage 1", "with Stage 1", "LLaVA-Med"]
    columns = [(run, who) for run in by_run for who in ("model", *CONTROLS)]
    head += [_title(run, who) for run, who in columns]
    rows, notes = [], [_PUBLISHED1]
    for title, dataset, answer_type, *published in TABLE1:
        row = [title, *published]
        for run, who in columns:
            found = find(by_run[run], dataset)
            text = accuracy(_rows(found, answer_type), who)
            if who == "model" and found:
                notes += _said(dataset, run, found)
                text += _verdicts(found, judged)
            row.append(text)
        rows.append(row)
    notes.append(f"Ours: {_OURS}")
    return blocks.Table(head, rows, "Table 1: accuracy in %", list(dict.fromkeys(notes)), published=(1, 2, 3))


_OURS = (
    "exact match after normalisation (multiple choice: as it says), all questions of the split, "
    "95 % interval in brackets; ± is the standard deviation over runs where there are several "
    "answers a question. "
    '"Judge" is the language model\'s 0/1 verdict, where it was run.'
)


def _verdicts(found, judged):
    """ "; judge 41.0 (…)" if every evaluation has a judge's verdict."""
    parts = [judged(e) for e in found]
    if len(parts) != 1 or parts[0] is None:
        return ""
    m = {k.rpartition("/")[2]: x for k, x in parts[0]["metrics"].items() if k.startswith("model/overall/")}
    if m.get("mean") is None or math.isnan(m["mean"]):
        return "; judge: none"
    sd = f" ± {100 * m['sd']:.1f}" if m.get("sd") is not None else ""
    ends = "" if m.get("mean_low") is None else (f" ({100 * m['mean_low']:.1f}–{100 * m['mean_high']:.1f})")
    return f"; judge {100 * m['mean']:.1f}{sd}{ends}, {m.get('unjudged', 0):,} unjudged"


def _title(run, who):
    return f"{run}: {figures.title_of(who)}"


def _table2(by_run, locations):
    columns = [(run, who) for run in by_run for who in ("model", *CONTROLS)]
    head = ["Organ-level pathologies", "published", "LLaVA-Med"]
    head += [_title(run, who) for run, who in columns]
    rows, notes, members = [], [_PUBLISHED2], {}
    for run, evaluations in by_run.items():
        found = find(evaluations, "MedPix v2.0") or find(evaluations, "SLAKE")
        notes += _said("regions", run, found)
        members[run] = []
        for e in found:
            known = {} if any(_places(row) for row in e.rows) else locations(e)
            if known:
                notes.append(f"{run}: locations are the data set's; predictions.jsonl has none.")
            for row in e.rows:
                looked_up = known.get(str(row["question_id"]), "").lower()
                members[run].append((row, _places(row) | ({looked_up} if looked_up else set())))
    for title, published, other, places in TABLE2:
        row = [title, published, other]
        for run, who in columns:
            inside = [r for r, where in members[run] if where & set(places)]
            text = accuracy(inside, who)
            if who == "model" and inside:
                text += f", n = {len(inside):,}"
            row.append(text)
        rows.append(row)
    return blocks.Table(head, rows, "Table 2: accuracy by region", list(dict.fromkeys(notes)), published=(1, 2))


def _places(row):
    return {str(row[key]).lower() for key in ("location", "location_category") if row.get(key)}


def _table45(title, published, by_run, judged, stage1):
    ours, notes = [], [_PUBLISHED45]
    for run, evaluations in by_run.items():
        if has_stage1(evaluations[0].config) != stage1:
            continue
        for dataset in SETS:
            found = find(evaluations, dataset)
            for who in ("model", *TEXT_CONTROLS) if found else ():
                column = _text_column(found, who, judged)
                ours.append((f"{_title(run, who)}, {dataset}", column))
            notes += _said(dataset, run, found)
    head = ["Metrics", *(f"{name}" for name in published), *(name for name, _ in ours)]
    if not ours:
        head.append("ours")
        notes.append("Ours: no evaluated run of this kind.")
    rows = []
    for i, name in enumerate(_TEXT_ROWS):
        mine = [column[i] for _, column in ours] or [NOT_RUN]
        rows.append([name, *(column[i] for column in published.values()), *mine])
    if ours:
        notes.append(
            "Ours: F-measures of ROUGE-1, -2, -L and sacrebleu's sentence BLEU, mean ± standard "
            "deviation over the first answers to all questions, closed ones included (the answer "
            f"alone is scored); accuracy in %: {_OURS}"
        )
    return blocks.Table(head, rows, title, list(dict.fromkeys(notes)), published=tuple(range(1, len(published) + 1)))


def _text_column(found, who, judged):
    rows = _rows(found)
    if who == "echo":  # needs no run: the question as the answer
        said = [row["question"] for row in rows]
    elif who == "model" or who in scoring.controls_of(rows):
        said = [scoring.texts(row, who)[0] for row in rows]
    else:
        return [NOT_RUN] * len(_TEXT_ROWS)
    truths = [row["answer"] for row in rows]
    rouge = text_metrics.rouge(said, truths)
    columns = [rouge[name] for name in text_metrics.ROUGES]
    columns.append(text_metrics.sentence_bleu(said, truths))
    out = [f"{np.mean(x):.3f} ± {np.std(x):.3f}" for x in columns]
    if who == "echo" and "echo" not in scoring.controls_of(rows):
        right = np.mean([scoring.score(s, t)["acc"] for s, t in zip(said, truths)])
        return [*out, f"{100 * right:.1f}"]
    return [*out, accuracy(rows, who) + (_verdicts(found, judged) if who == "model" else "")]


def has_stage1(config) -> bool:
    """Whether a run started from stage 1, or is stage 1: its weights' path or its data says slake."""
    data = (config.get("input") or {}).get("data") or {}
    trained = [str(data.get("name", ""))] if isinstance(data, dict) else []
    return "stage1" in str(config.get("model_init") or "") or any(name.startswith("slake") for name in trained)
