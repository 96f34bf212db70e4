"""What a report says about answers with boxes: `paligemma_med.metrics.detection` by group, and against the controls."""

import math

from paligemma_med.metrics import detection, scoring, stats, tables
from tools.report import blocks, figures

_FIGURES = ("pointing", "ap50", "ap", "no_box", "malformed")


def of_evaluation(e) -> list[blocks.Table]:
    """The tables of an evaluation with the protocol detection; none of another."""
    return [by_group(e), against(e)] if e.about.get("protocol") == "detection" else []


def by_group(e) -> blocks.Table:
    """IoU of the model and its controls, and the model's other figures, by name and size of the boxes and more."""
    who, rows, above = figures.who_of(e), [], None
    for group, key, value, n in figures.groups_of(e.metrics):
        cells = [tables.as_text(e.metrics, name, group, "iou") for name in who]
        cells += [tables.as_text(e.metrics, "model", group, figure) for figure in _FIGURES]
        rows.append(["" if key == above else key, value, *cells, f"{n:,}"])
        above = key
    head = ["", "%", *(f"IoU, {figures.title_of(name)}" for name in who)]
    notes = [
        "95 % in brackets, images drawn; IoU is the mean of true boxes and boxes of the same name paired one to one, "
        "boxes too many or missing counting 0. Pointing: the centre of the first box lies in a true one. AP as "
        "pycocotools computes it, mean over names, an answer's probability as the confidence of its boxes. Questions "
        "ask for what is there: no figure says how often a model sees what isn't.",
        "Sizes are shares of the image's area: "
        + ", ".join(f"{name} from {100 * least:g} %" for name, least in detection.SIZES.items())
        + ", by a question's largest box.",
    ]
    titles = [tables.FIGURES[figure] for figure in _FIGURES]
    return blocks.Table([*head, *titles, "n"], rows, "Boxes", notes, left=2)


def against(e) -> blocks.Table:
    """Whether the model's boxes are nearer to the true ones than those of each control, on the same questions."""
    rows = []
    mine = _iou(e, "model")
    for who in e.controls:
        gain, low, high, p = stats.paired_bootstrap(_iou(e, who), mine, e.clusters)
        ends = "–" if math.isnan(low) else f"{100 * low:+.1f} to {100 * high:+.1f}"
        chance = "–" if math.isnan(p) else f"{p:.3f}" if p >= 0.001 else "< 0.001"
        rows.append([figures.title_of(who), f"{100 * gain:+.1f} ({ends})", chance])
    head = ["against", "gain in IoU, points (95 %)", "p, bootstrap"]
    return blocks.Table(head, rows, "The model's boxes against its controls", ["Paired; images are drawn."])


def _iou(e, who):
    return [detection.score(scoring.texts(row, who)[0], row["answer"])["iou"] for row in e.rows]
