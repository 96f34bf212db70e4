"""Questions whose answers are boxes, or end in them: "detect liver" → "<loc…> liver", "ground Where is the liver?" →
"Right <loc…>". See `pp.boxes` for the form, which is read strictly, and `metrics.detection` for the figures.

Passes, files, resuming and the controls that take another image are those of `vqa`. What can be known without the
image is the control mean_box: where training's boxes of the same question are in the mean. Figures are also by
name of the boxes and by their size.
"""

import dataclasses
from collections.abc import Sequence

from paligemma_med.evaluators import vqa
from paligemma_med.metrics import detection, scoring

CONTROLS = (scoring.MEAN_BOX, "shuffled_images", "blank_image")
NEEDED, ARRAYS, PROGRAM = vqa.NEEDED, vqa.ARRAYS, vqa.PROGRAM
GROUPS = (*scoring.GROUPS, "box_size", "box_name")


@dataclasses.dataclass(kw_only=True, eq=False, repr=False)
class Evaluator(vqa.Evaluator):
    """As `vqa`; rows of predictions.jsonl also have box_name (of the true boxes, where they have names) and box_size
    ("small", "medium" or "large", of the largest one). train_data is needed for mean_box.

    Raises:
      ValueError: as the base class; from `run`, a true answer without boxes.
    """

    controls: Sequence[str] = CONTROLS
    protocol: str = "detection"
    groups: Sequence[str] = GROUPS

    known_controls = (*scoring.ONE_TEXT, *scoring.IMAGE_CONTROLS)

    def lines(self, batch, rows, pixels, choices=()) -> list[dict]:
        """As the base class, with box_name and box_size."""
        for row in rows:
            try:
                detection.check(row["answer"])
            except ValueError as e:
                raise ValueError(f"question {row['question_id']!r}: {e}") from None
        found = super().lines(batch, rows, pixels, choices)
        for line in found:
            line |= dict(box_name=detection.name_of(line["answer"]), box_size=detection.size_of(line["answer"]))
        return found
