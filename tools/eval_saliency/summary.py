"""All questions: means with intervals, paired differences from the priors, and sanity checks."""

import numpy as np

from paligemma_med.metrics import stats
from paligemma_med.saliency import localisation, sanity
from tools.eval_saliency.measure import BOX_FIGURES, CURVES, METHODS, SANITY
from tools.eval_saliency.priors import PRIORS

BASES = ("centre", "body", "random")  # the priors that differences are taken from


def summarise(rows, seed=0) -> dict:
    """Means with intervals, and paired differences, of the rows of `measure`.

    Questions are drawn by image (`stats.bootstrap`). p_holm adjusts over the model's methods, for each
    figure separately (S. Holm, Scandinavian Journal of Statistics 6 (1979), 65-70).

    Returns:
      {"correct" and "all": dict(questions, images, area, table={method: {figure: dict(mean, low,
      high, and for each of BASES a dict(difference, low, high, p, p_holm))}}, without table if there
      are no questions), "sanity": {method: {check: dict(mean, low, high)}}}. If the model was asked for its own boxes
      also "own": the same two, of the questions with such boxes, against them.
    """
    out = _subsets(rows, seed, "figures")
    if any("own_boxes" in row for row in rows):
        out["own"] = _subsets([row for row in rows if row.get("own_boxes")], seed, "own_figures")
    out["sanity"] = {name: _sanity(rows, name, seed) for name in METHODS}
    return out


def _subsets(rows, seed, key):
    out = {}
    for subset in ("correct", "all"):
        chosen = [row for row in rows if row["correct"] or subset == "all"]
        images = [row["image_key"] for row in chosen]
        out[subset] = dict(questions=len(chosen), images=len(set(images)))
        if not chosen:
            continue
        out[subset]["area"] = float(np.mean([_area(row, key) for row in chosen]))
        out[subset]["table"] = _table(chosen, images, seed, key)
    return out


def _area(row, key):
    if key == "figures":
        return row["area"]
    return localisation.coverage(row["own_boxes"], row["size"], row["grid"]).mean()


def _table(rows, images, seed, key):
    more = () if key == "figures" else ("true_boxes",)
    table = {name: {} for name in (*METHODS, *PRIORS, *more)}
    for figure in (*BOX_FIGURES, *CURVES) if key == "figures" else BOX_FIGURES:
        values = {name: [row[key][name][figure] for row in rows] for name in table if figure in rows[0][key][name]}
        low, high = stats.bootstrap(np.stack([*values.values()], 1), images, seed=seed)
        for i, name in enumerate(values):
            cell = dict(mean=float(np.mean(values[name])), low=float(low[i]), high=float(high[i]))
            for base in BASES:
                found = stats.paired_bootstrap(values[base], values[name], images, seed=seed)
                cell[base] = dict(zip(("difference", "low", "high", "p"), found))
            table[name][figure] = cell
        for base in BASES:
            cells = [table[name][figure][base] for name in METHODS]
            for cell, p in zip(cells, holm([cell["p"] for cell in cells])):
                cell["p_holm"] = p
    return table


def _sanity(rows, name, seed):
    """The checks of `sanity_of`, and other_image: how alike the method's maps of different images are,
    which shows what all its maps share."""
    out = {}
    for check in SANITY:
        found = [(row["sanity"][name][check], row["image_key"]) for row in rows]
        values, images = zip(*[x for x in found if x[0] is not None] or [((), ())])
        if not values:
            continue
        low, high = stats.bootstrap(values, images, seed=seed)
        out[check] = dict(mean=float(np.mean(values)), low=low, high=high, questions=len(values))
    pairs = sanity.between_questions(
        [np.ravel(row["maps"][name]) for row in rows],
        [row["image_key"] for row in rows],
        [row["question_id"] for row in rows],
        seed=seed,
    )["other_image"]
    if pairs:
        out["other_image"] = dict(mean=float(np.mean(pairs)))
    return out


def holm(ps) -> list[float]:
    """p-values adjusted for multiple tests by Holm's step-down procedure."""
    out, worst = [0.0] * len(ps), 0.0
    for rank, i in enumerate(np.argsort(ps)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[i]))
        out[i] = worst
    return out
