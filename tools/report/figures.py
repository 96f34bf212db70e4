"""Which figures of an evaluation a report shows, and which answers count as right.

What figures are called, and how one is written, is in `paligemma_med.metrics.tables`.
"""

from paligemma_med.metrics import answers, protocols, scoring, tables

_ENDINGS = ("_low", "_high", "_mean", "_sd")


# How right answers are told: by exact match; in multiple choice by the letter that is named if the
# truth is one, else by the nearest choice.
RULES = {"acc": "exact match", "acc_letter": "by letter", "acc_text": "by nearest choice"}


def rule_of(rows):
    """The one of RULES that these rows of predictions.jsonl ask for."""
    if not rows or not all(row.get("choices") and row.get("answer_letter") for row in rows):
        return "acc"
    letters = all(row["answer"] == row["answer_letter"] for row in rows)
    return "acc_letter" if letters else "acc_text"


def forms(row, rule="acc", who="model"):
    """The answers to a question, in the form in which two count as the same."""
    said = scoring.texts(row, who)
    if rule == "acc_letter":
        return [protocols.letter(text, row["choices"]) for text in said]
    return [answers.normalise(text) for text in said]


def hits(row, rule="acc", who="model"):
    """Which of the answers to a question are right: list of bools."""
    if rule == "acc":
        return [said == answers.normalise(row["answer"]) for said in forms(row, rule, who)]
    if rule == "acc_letter":
        return [said == row["answer_letter"] for said in forms(row, rule, who)]
    right = ord(row["answer_letter"]) - ord("A")
    choices = row["choices"]
    return [protocols.closest_option(x, choices) == right for x in scoring.texts(row, who)]


def who_of(evaluation):
    """The columns of its tables: the model, and the controls that were run."""
    return ("model", *evaluation.controls)


def title_of(who):
    return tables.COLUMNS.get(who, who)


def groups_of(metrics):
    """[(group, its key or "", its value, n)], all questions first."""
    out = [("overall", "", "overall", metrics["n"])]
    for name, n in metrics.items():
        if name.startswith("n/"):
            group = name.removeprefix("n/")
            key, _, value = group.partition("/")
            out.append((group, key.replace("_", " "), value, n))
    return out


def names(metrics, who="model"):
    """The figures of all questions, without the endings that mean intervals and runs."""
    prefix = f"{who}/overall/"
    found = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]

    def is_base(name):
        return not any(
            name.endswith(end) and name.removesuffix(end).removesuffix("_cluster") in found for end in _ENDINGS
        )

    # "acc_mean_low" ends on "_low" behind "acc_mean", which is no base itself.
    return [name for name in found if is_base(name)]
