"""Maps that don't depend on the model but on training's boxes or the patient's area."""

import numpy as np

from paligemma_med.pp import images
from paligemma_med.saliency import checks, localisation, occlusion
from tools.eval_saliency.questions import boxed_questions, boxes_of

# They know nothing, where things mostly are, where the patient is, where training boxes are, and where
# training boxes of the same label are (which uses the true answer).
PRIORS = ("random", "centre", "body", "train_boxes", "label_boxes")


def box_priors(source, grid) -> tuple:
    """Where boxes are in training.

    Returns:
      (float[h, w] mean coverage over the questions of `boxed_questions`,
       {label: float[h, w] mean coverage by the boxes of a label over the images that have one}).
    """
    sizes = {}

    def size_of(index, image_id):
        if image_id not in sizes:
            sizes[image_id] = images.size(source[index]["image"])
        return sizes[image_id]

    questions = [
        localisation.coverage(row["boxes"], size_of(row["index"], row["image_id"]), grid)
        for row in boxed_questions(source)
    ]
    by_label, seen = {}, set()
    for index, row in enumerate(source.columns(("image_id", "boxes"))):
        if row["image_id"] in seen:
            continue
        seen.add(row["image_id"])
        for label in {label.lower() for label in row["boxes"]["label"]}:
            covered = localisation.coverage(boxes_of(row["boxes"], [label]), size_of(index, row["image_id"]), grid)
            by_label.setdefault(label, []).append(covered)
    return np.mean(questions, axis=0), {k: np.mean(v, axis=0) for k, v in by_label.items()}


def body_prior(image, grid) -> np.ndarray:
    """The share of each patch that the patient covers (`checks.body`), float64[h, w]: a map that finds the
    foreground and knows neither question nor answer."""
    rows, columns = (x.astype(np.float64) for x in occlusion.bands(image.shape[:2], grid))
    return rows @ checks.body(image) @ columns.T / np.outer(rows.sum(1), columns.sum(1))
