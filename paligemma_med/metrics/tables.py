"""Figures as text: titles of figures and columns, and the table that `evaluate` prints."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from paligemma_med.metrics import coco, losses, peers, text_metrics
from paligemma_med.pp import markdown

# Columns: the model, the controls, and other ways of asking.
COLUMNS = {
    "model": "model",
    "majority": "majority answer",
    "majority_type": "majority of type",
    "echo": "question echoed",
    "mean_box": "mean box",
    "shuffled_images": "images shuffled",
    "blank_image": "grey image",
    "noise_image": "noise image",
    "question_only": "question only",
    "true_history": "true history",
    "single_turn": "single turn",
}
# Figures, in the order of the tables. Metrics of open answers have their own titles (`Metric.titles`).
FIGURES = {
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
    **{name: title for metric in text_metrics.METRICS for name, title in metric.titles.items()},
    **{name: title for metric in coco.METRICS for name, title in metric.titles.items()},
    **peers.TITLES,
    "iou": "IoU",
    "pointing": "pointing",
    "ap50": "AP50",
    "ap": "AP50:95",
    "words": "words before boxes",
    "no_box": "no box",
    "malformed": "malformed",
    "nonrobust": "non-robust",
    "acc_penalised_item": "penalised by item",
    "acc_penalised_total": "penalised in total",
}


class Value(NamedTuple):
    """A group's figure: mean and standard deviation over several runs, or else the first sample's figure;
    and the ends of its interval, if possible the one that keeps questions on one image together."""

    value: float
    sd: float | None
    low: float | None
    high: float | None


def value_of(metrics: Mapping[str, float], who: str, group: str, figure: str = "acc") -> Value | None:
    """One of the figures of `scoring.summarise`, or None if it isn't among them."""

    def get(ending):
        return metrics.get(f"{who}/{group}/{figure}{ending}")

    if get("") is None:
        return None
    several = get("_mean") is not None
    value, sd = (get("_mean"), get("_sd")) if several else (get(""), None)
    for kind in ["_mean"] if several else ["_cluster", ""]:
        if get(f"{kind}_low") is not None:
            return Value(value, sd, get(f"{kind}_low"), get(f"{kind}_high"))
    return Value(value, sd, None, None)


def as_text(metrics: Mapping[str, float], who: str, group: str, figure: str = "acc", none: str = "–") -> str:
    """Percent: "79.1 (75.2–82.9)", or "79.1 ± 0.8 (75.2–82.9)" for several runs; `none` without a figure."""
    x = value_of(metrics, who, group, figure)
    if x is None:
        return none
    text = f"{100 * x.value:.1f}" + ("" if x.sd is None else f" ± {100 * x.sd:.1f}")
    return text + ("" if x.low is None or x.high is None else f" ({100 * x.low:.1f}–{100 * x.high:.1f})")


def group_of(figure: str, metrics: Mapping[str, float]) -> str:
    """The group of questions that a figure is shown for: all, except that LLaVA-Med's closed is only
    meaningful for closed questions."""
    if figure == "llava_closed" and "n/answer_type/CLOSED" in metrics:
        return "answer_type/CLOSED"
    return "overall"


def format_table(metrics: Mapping[str, float], text: Callable[[str], str] = str) -> str:
    """Figures of `scoring.summarise` as a Markdown table: percent, and the 95 % interval in brackets, with
    questions on one image kept together; for several runs the mean ± standard deviation.

    Args:
      metrics: those of `losses.summarise` give the table of a loss.
      text: applied to the names of groups, which are from a data set: `markdown.escape` for a page.
    """
    if "per_token" in metrics:
        return _loss_table(metrics, text)
    columns = [who for who in COLUMNS if f"{who}/overall/acc" in metrics]
    groups = {"overall": metrics["n"]}
    groups |= {k.removeprefix("n/"): n for k, n in metrics.items() if k.startswith("n/")}
    first = "iou" if "model/overall/iou" in metrics else "acc"
    table = [[f"{FIGURES[first]}, %", *(COLUMNS[who] for who in columns), "n"]]
    for group, n in groups.items():
        title = group.replace("turn/", "turn/turn ").partition("/")[2] or group
        table.append([text(title), *(as_text(metrics, who, group, first, none="") for who in columns), f"{n:,}"])
    for figure, title in FIGURES.items():
        group = group_of(figure, metrics)
        cells = [as_text(metrics, who, group, figure, none="") for who in columns]
        if any(cells) and figure != first:
            title = f"{group.rpartition('/')[2]}, {title.removeprefix('exact match, ')}"
            table.append([text(title), *cells, f"{groups[group]:,}"])
    units = "patients" if "patients" in metrics else "images"
    notes = f"In brackets 95 %, by {metrics[units]:,} {units}."
    if any(k.endswith("_sd") for k in metrics):
        notes += " ±: standard deviation over runs."
    if truncated := metrics.get("truncated"):
        notes += f" {truncated:,} prompts lost tokens: they didn't fit."
    if unfinished := metrics.get("unfinished"):
        notes += f" {unfinished:,} answers were cut off at max_new_tokens."
    return markdown.table(table) + "\n\n" + notes


_LOSSES = {
    "avg": "mean of examples",
    "per_token": "mean of tokens",
    "sum": "nats an answer",
    "perplexity": "perplexity",
}


def _loss_table(metrics, text):
    endings = [name.removeprefix("n") for name in metrics if name == "n" or name.startswith("n/")]
    table = [["evaluation loss, nats", *(_LOSSES[name] for name in losses.FIGURES), "tokens", "n"]]
    for ending in endings:
        title = text(ending.split("/", 2)[2]) if ending else "overall"
        cells = [f"{metrics[name + ending]:.4f}" for name in losses.FIGURES]
        if f"avg_low{ending}" in metrics:
            cells[0] += f" ({metrics[f'avg_low{ending}']:.4f}–{metrics[f'avg_high{ending}']:.4f})"
        table.append([title, *cells, f"{metrics[f'tokens{ending}']:,}", f"{metrics[f'n{ending}']:,}"])
    notes = "In brackets 95 %, by images."
    if truncated := metrics.get("truncated"):
        notes += f" {truncated:,} rows lost tokens: they didn't fit."
    if missing := metrics.get("no_answer"):
        notes += f" {missing:,} rows have no answer to predict, and are left out."
    return markdown.table(table) + "\n\n" + notes
