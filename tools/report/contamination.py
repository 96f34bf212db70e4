"""Signs that figures don't measure what they seem to, in our predictions and in others' files.

Two are known from the released predictions of the paper's authors (reference/medm.md, 4 and 6): each
answer contains the prompt, which is scored with it, and the answers were generated without the image.
Neither shows in an average of ROUGE; both show here.
"""

import collections

import numpy as np

from paligemma_med.metrics import answers, protocols, scoring, text_metrics
from tools.report import blocks


def ours(evaluation) -> list:
    """Rows of `examine`, dict(question, prediction, answer, image), from an evaluation's first answers; image is its
    key, or None if it isn't known."""
    return [
        dict(
            question=row["question"],
            prediction=row["predictions"][0],
            answer=row["answer"],
            image=str(row.get("image_key") or row.get("image_id") or "") or None,
        )
        for row in evaluation.rows
    ]


def examine(rows) -> dict:
    """Counts signs of contamination.

    Returns dict(
      n,
      with_prompt: predictions that contain their question (of three words or more), as text;
      starts_with_prompt: those that begin with it, after at most a few words such as "answer en";
      repeated: questions asked about two or more images, and repeated_rows: how often in total,
      always_same: repeated questions that always got the same answer,
      truth_same: repeated questions whose true answer is always the same; a model that looks should be
        close to this number, while one that is blind to images always gives the same answer to each,
      right, constant_right: right answers among repeated_rows, and those of the best single answer
        to each question, chosen knowing the truth,
      images_known: whether images could be identified).
    """
    # By the exact string: another spelling is another prompt, and may have another answer.
    by_question = collections.defaultdict(list)
    for row in rows:
        by_question[row["question"]].append(row)
    known = all(row["image"] is not None for row in rows)
    repeated = []
    for members in by_question.values():
        if known and len({row["image"] for row in members}) < 2 or len(members) < 2:
            continue
        repeated.append(members)
    out = dict(n=len(rows), images_known=known, questions=len(by_question))
    out["with_prompt"] = sum(_holds(row) for row in rows)
    out["starts_with_prompt"] = sum(bool(prompt_of(row)) for row in rows)
    out["repeated"] = len(repeated)
    out["repeated_rows"] = sum(map(len, repeated))
    answered = [[answers.normalise(stripped(row)) for row in members] for members in repeated]
    true = [[answers.normalise(row["answer"]) for row in members] for members in repeated]
    out["always_same"] = sum(len(set(x)) == 1 for x in answered)
    out["truth_same"] = sum(len(set(x)) == 1 for x in true)
    out["right"] = sum(a == t for x, y in zip(answered, true) for a, t in zip(x, y))
    out["constant_right"] = sum(max(collections.Counter(y).values()) for y in true)
    return out


def _holds(row):
    question = answers.normalise(row["question"])
    return len(question.split()) >= 3 and question in answers.normalise(row["prediction"])


def prompt_of(row) -> str:
    """The part of a prediction that is its prompt: up to the end of the question, if at most three words
    precede the question; otherwise ""."""
    question = row["question"].strip()
    at = row["prediction"].find(question) if len(question.split()) >= 2 else -1
    before = row["prediction"][: max(at, 0)]
    return before + question if at >= 0 and len(before.split()) <= 3 else ""


def stripped(row) -> str:
    """The prediction without its prompt."""
    return row["prediction"][len(prompt_of(row)) :].strip()


def scores(rows) -> dict:
    """{what is scored: {metric: mean}}: predictions as they are, without the prompt, and what a model
    without images could answer: the prompt, the question."""
    truths = [row["answer"] for row in rows]
    variants = {
        "predictions as given": [row["prediction"] for row in rows],
        "without the prompt": [stripped(row) for row in rows],
        "the prompt alone": [prompt_of(row) or row["question"] for row in rows],
        "the question alone": [row["question"] for row in rows],
    }
    if variants["predictions as given"] == variants["without the prompt"]:
        del variants["without the prompt"], variants["the prompt alone"]
    out = {}
    for name, said in variants.items():
        rouge = text_metrics.rouge(said, truths)
        out[name] = {
            "exact match": np.mean([scoring.score(s, t)["acc"] for s, t in zip(said, truths)]),
            "token F1": np.mean([protocols.token_f1(s, t) for s, t in zip(said, truths)]),
            "ROUGE-1": rouge["rouge1"].mean(),
            "ROUGE-2": rouge["rouge2"].mean(),
            "ROUGE-L": rouge["rougeL"].mean(),
        }
    return out


def section(title, rows, level=2, extra=()) -> blocks.Section:
    """The results of `examine` and `scores` as a `Section`; extra: more blocks for its end."""
    found = examine(rows)
    n, repeated = found["n"], found["repeated"]
    parts = []
    if found["starts_with_prompt"] > n / 100:
        parts.append(
            blocks.Warning(
                f"{_share(found['starts_with_prompt'], n)} of the predictions begin with the "
                "prompt. Scored as they stand, these figures reward the prompt's words."
            )
        )
    # One question about two images may well have one answer; ten such questions hardly.
    blind = repeated and found["always_same"] == repeated and found["truth_same"] < repeated
    if blind and repeated >= 5:
        parts.append(
            blocks.Warning(
                f"All {repeated:,} questions that were asked of several images got one and the "
                f"same answer each, though the truth differs in {repeated - found['truth_same']:,} "
                "of them: the answers do not depend on the image."
            )
        )
    means = scores(rows)
    metrics = list(next(iter(means.values())))
    given, echo = means["predictions as given"], means["the question alone"]
    echo = means.get("the prompt alone", echo)
    if echo["ROUGE-1"] > max(0.1, 0.9 * given["ROUGE-1"]):
        parts.append(
            blocks.Warning(
                "Repeating the prompt, without image or model, scores "
                f"{echo['ROUGE-1']:.3f} / {echo['ROUGE-2']:.3f} / {echo['ROUGE-L']:.3f} in "
                f"ROUGE-1/2/L; the predictions as given score {given['ROUGE-1']:.3f} / "
                f"{given['ROUGE-2']:.3f} / {given['ROUGE-L']:.3f}."
            )
        )
    table = [
        ["answers that hold the text of their question", _share(found["with_prompt"], n)],
        ["answers that begin with the prompt", _share(found["starts_with_prompt"], n)],
        ["questions asked more than once, of different images", f"{repeated:,}"],
    ]
    if repeated:
        table += [
            ["· always answered the same", _share(found["always_same"], repeated)],
            ["· by a majority answer, which sees no image", _share(repeated, repeated)],
            ["· whose true answer is always the same", _share(found["truth_same"], repeated)],
            [
                f"right among these {found['repeated_rows']:,} answers",
                _share(found["right"], found["repeated_rows"]),
            ],
            [
                "· by the best single answer to each question",
                _share(found["constant_right"], found["repeated_rows"]),
            ],
        ]
    notes = []
    if not found["images_known"]:
        notes.append("The file doesn't tell images apart; each row is taken for one of its own.")
    parts.append(blocks.Table(["sign", "found"], table, "Signs of contamination", notes))
    parts.append(
        blocks.Table(
            ["scored text", *metrics],
            [[name, *(f"{values[m]:.3f}" for m in metrics)] for name, values in means.items()],
            "What an answer without the image would score",
            [
                "Means over all rows. Where the question alone comes near to the predictions, the "
                "metric measures the question."
            ],
        )
    )
    return blocks.Section(title, [*parts, *extra], level)


def _share(k, n):
    return f"{k:,} of {n:,} ({100 * k / n:.1f} %)" if n else "none"
