"""Which figures of an evaluation a report shows, and which answers count as right.

Titles of figures, and how one is written, are in `paligemma_med.metrics.tables`.
"""

from paligemma_med.metrics import answers, protocols, scoring, tables

_ENDINGS = ("_low", "_high", "_mean", "_sd")


# How right answers are recognised: by exact match; in multiple choice by the named letter if the truth is
# a letter, else by the nearest choice.
RULES = {"acc": "exact match", "acc_letter": "by letter", "acc_text": "by nearest choice"}


def rule_of(rows) -> str:
    """The one of RULES that applies to these rows of predictions.jsonl."""
    if not rows or not all(row.get("choices") and row.get("answer_letter") for row in rows):
        return "acc"
    letters = all(row["answer"] == row["answer_letter"] for row in rows)
    return "acc_letter" if letters else "acc_text"


def forms(row, rule="acc", who="model") -> list:
    """The answers to a question, in the form in which they are compared."""
    said = scoring.texts(row, who)
    if rule == "acc_letter":
        return [protocols.letter(text, row["choices"]) for text in said]
    return [answers.normalise(text) for text in said]


def hits(row, rule="acc", who="model") -> list:
    """Which of the answers to a question are right: list of bools."""
    if rule == "acc":
        return [scoring.score(said, scoring.truths(row))["acc"] for said in scoring.texts(row, who)]
    if rule == "acc_letter":
        return [said == row["answer_letter"] for said in forms(row, rule, who)]
    right = ord(row["answer_letter"]) - ord("A")
    choices = row["choices"]
    return [protocols.closest_option(x, choices) == right for x in scoring.texts(row, who)]


def who_of(evaluation) -> tuple:
    """The columns of an evaluation's tables: the model, and the controls that were run."""
    return ("model", *evaluation.controls)


def title_of(who) -> str:
    return tables.COLUMNS.get(who, who)


def groups_of(metrics) -> list[tuple]:
    """[(group, its key or "", its value, n)], all questions first."""
    out = [("overall", "", "overall", metrics["n"])]
    for name, n in metrics.items():
        if name.startswith("n/"):
            group = name.removeprefix("n/")
            key, _, value = group.partition("/")
            out.append((group, key.replace("_", " "), value, n))
    return out


def names(metrics, who="model") -> list:
    """The figures over all questions, without the endings for intervals and runs."""
    prefix = f"{who}/overall/"
    found = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]

    def is_base(name):
        return not any(
            name.endswith(end) and name.removesuffix(end).removesuffix("_cluster") in found for end in _ENDINGS
        )

    # "acc_mean_low" is "acc_mean" plus "_low", and "acc_mean" isn't a base itself.
    return [name for name in found if is_base(name)]
