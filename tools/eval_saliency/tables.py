"""The summary as Markdown tables."""

import math

from paligemma_med.pp import markdown as tables
from tools.eval_saliency.measure import BOX_FIGURES, CURVES, SANITY

_TITLES = {
    "pointing": "pointing",
    "touching": "touching",
    "energy": "energy in box",
    "iou": "IoU, best threshold",
    "deletion": "deletion ↓",
    "insertion": "insertion ↑",
    "randomised": "randomised weights",
    "other_question": "another question, same image",
    "other_image": "another image",
}


def markdown(summary) -> str:
    """The tables of `summarise` as Markdown, in %; rank correlations as they are."""
    lines = _subsets(summary, "", (*BOX_FIGURES, *CURVES))
    if "own" in summary:
        lines += _subsets(summary["own"], "Against the model's own boxes, ", BOX_FIGURES)
        if not summary["own"]["all"]["questions"]:
            lines += ["The model gave no boxes of its own: was it trained on them (docs/grounding.md)?", ""]
    lines += [
        "## Sanity: rank correlation with the map of …",
        "",
        *_grid("", (*SANITY, "other_image"), summary["sanity"], _correlation),
    ]
    return "\n".join(lines)


def _subsets(summary, what, figures):
    lines = []
    for subset in ("correct", "all"):
        found = summary[subset]
        if "table" not in found:
            continue
        table, title = found["table"], what + subset
        lines += [
            f"## {title[0].upper()}{title[1:]}: {found['questions']:,} questions, {found['images']:,} "
            f"images; boxes cover {100 * found['area']:.1f} % of them",
            "",
            *_grid("%", figures, table, _interval),
        ]
        for base, title in (("centre", "the centre prior"), ("body", "the patient's area")):
            lines += [
                f"Differences to {title} (bold: p < 0.05 after Holm):",
                "",
                *_grid("%", figures, table, lambda cell, base=base: _difference(cell[base])),
            ]
    return lines


def _grid(corner, columns, table, text):
    """Lines of the table {row: {column: cell}}; `text` turns a cell into text, and – marks a missing one."""
    rows = [[corner, *(_TITLES[c] for c in columns)]]
    rows += [[name, *(text(cells[c]) if c in cells else "–" for c in columns)] for name, cells in table.items()]
    return [tables.table(rows), ""]


def _interval(x):
    return f"{100 * x['mean']:.1f} ({_number(x['low'])}–{_number(x['high'])})"


def _difference(x):
    text = f"{_number(x['difference'], '+')} ({_number(x['low'], '+')} to "
    text += f"{_number(x['high'], '+')})"
    return f"**{text}**" if x.get("p_holm", 1) < 0.05 else text


def _correlation(x):
    return f"{x['mean']:.2f}" + (f" ({x['low']:.2f} to {x['high']:.2f})" if "low" in x else "")


def _number(x, sign=""):
    return "–" if math.isnan(x) else f"{100 * x:{sign}.1f}"
