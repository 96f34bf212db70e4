"""Which questions saliency is measured on: those whose answer names something with a box."""

from data_prep.datasets.slake.grounding import named
from paligemma_med.metrics import answers


def boxed_questions(source) -> list[dict]:
    """The questions of a split whose answer names something with a box.

    Questions that begin with "where" are left out: their answer is a place, even if it names an organ.

    Args:
      source: `input_pipeline.Source` with question_id, image_id, question, answer, boxes.

    Returns:
      A list of dicts: index (of the record), question_id, image_id, question, answer, labels, boxes
      [[x, y, width, height], …] in pixels of the stored image, other_question: the next one about
      the same image with another answer, or None.

    Raises:
      ValueError: data without boxes, or without such questions.
    """
    keys = ("question_id", "image_id", "question", "answer", "boxes")
    if missing := [k for k in keys if k not in source.features]:
        raise ValueError(f"{source} has no {missing[0]!r}; expected the features {keys}.")
    out, by_image = [], {}
    for index, row in enumerate(source.columns(keys)):
        texts = {k: str(row[k]) for k in keys[:4]}
        by_image.setdefault(texts["image_id"], []).append((index, texts))
        labels = named(row["answer"], row["boxes"]["label"])
        if not labels or row["question"].strip().lower().startswith("where"):
            continue
        boxes = boxes_of(row["boxes"], labels)
        out.append(dict(index=index, **texts, labels=labels, boxes=boxes))
    if not out:
        raise ValueError(f"{source} has no question whose answer names a box of its image.")
    for row in out:
        others = by_image[row["image_id"]]
        others = sorted(others, key=lambda other: (other[0] <= row["index"], other[0]))
        fit = (t["question"] for _, t in others if _differ(t, row))
        row["other_question"] = next(fit, None)
    return out


def _differ(a, b):
    same = (answers.normalise(a[k]) == answers.normalise(b[k]) for k in ("question", "answer"))
    return not any(same)


def boxes_of(boxes, labels) -> list:
    pairs = zip(boxes["label"], boxes["bbox"], strict=True)
    return [[float(x) for x in box] for label, box in pairs if label.lower() in labels]
