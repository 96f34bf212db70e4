"""Figures of `scoring.summarise` as numbers to draw and texts to print.

One rule for tables and plots: of several runs their mean, else the first sample; the interval is
the one that keeps questions on one image together, where there is one.
"""

from paligemma_med.metrics import answers, protocols, scoring

# What `scoring` calls a figure → how it's called here; others keep their names.
TITLES = {
    "acc": "exact match",
    "acc_strict": "exact match, strict",
    "acc_set": "exact match, any order",
    "llava_closed": "LLaVA-Med's closed",
    "acc_letter": "by letter",
    "no_letter": "no letter named",
    "acc_text": "by nearest text",
    "qa_score": "QA-score",
    "acc_likelihood": "by likelihood",
    "acc_likelihood_token": "by likelihood a token",
    "f1": "token F1",
    "recall": "token recall",
    "llava_recall": "LLaVA-Med's recall",
    "bleu": "BLEU of the corpus",
    "bleu_rows": "BLEU, mean of questions",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "cider": "CIDEr × 100",
    "nonrobust": "non-robust",
    "acc_penalised_item": "penalised by item",
    "acc_penalised_total": "penalised in total",
}
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
    return scoring.TITLES.get(who, who)


def groups_of(metrics):
    """[(group, its key or "", its value, n)], all questions first."""
    out = [("overall", "", "overall", metrics["n"])]
    for name, n in metrics.items():
        if name.startswith("n/"):
            group = name.removeprefix("n/")
            key, _, value = group.partition("/")
            out.append((group, key.replace("_", " "), value, n))
    return out


def of_figure(metrics, who, group, figure="acc"):
    """(value, sd over runs or None, low or None, high or None), or None if there is no such."""

    def get(ending):
        return metrics.get(f"{who}/{group}/{figure}{ending}")

    if get("") is None:
        return None
    several = get("_mean") is not None
    value, sd = (get("_mean"), get("_sd")) if several else (get(""), None)
    for kind in ["_mean"] if several else ["_cluster", ""]:
        if get(f"{kind}_low") is not None:
            return value, sd, get(f"{kind}_low"), get(f"{kind}_high")
    return value, sd, None, None


def as_text(metrics, who, group, figure="acc"):
    """Percent: "79.1 (75.2–82.9)", of several runs "79.1 ± 0.8 (75.2–82.9)"; "–" for none."""
    found = of_figure(metrics, who, group, figure)
    if found is None:
        return "–"
    value, sd, low, high = found
    text = f"{100 * value:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")
    return text + ("" if low is None or high is None else f" ({100 * low:.1f}–{100 * high:.1f})")


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
