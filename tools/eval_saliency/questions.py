"""Which questions saliency is measured on: those whose answer names something with a box."""

import re

from paligemma_med.metrics import answers

_PAIRS = ("kidney", "lung", "mandible", "temporal lobe", "eye", "ear", "parotid", "femoral head")
# SLAKE's answers -> the names that its boxes use. Words with a wider or different meaning ("intestine",
# "brain", "left lobe") are left out.
NAMES = {
    "large bowel": {"colon"},
    "pleural effusion": {"effusion"},
    "pulmonary mass": {"mass"},
    "pulmonary nodule": {"nodule"},
    "pulmonary infiltration": {"infiltrate"},
    "infiltration": {"infiltrate"},
    "brain tumor": {"brain enhancing tumor", "brain non-enhancing tumor"},
    **{
        form.format(name): {f"left {name}", f"right {name}"}
        for name in _PAIRS
        for form in ("{}", "{}s", "both {}", "both {}s")
    },
}


def named(answer, labels) -> list:
    """The labels that an answer names, as a sorted list.

    The answer is cut at commas and "and"; ignoring case, each part must be a label of the image, or a
    word of NAMES for one or both of a pair.

    Args:
      answer: str.
      labels: labels of the image's boxes.

    Returns:
      Labels in lower case; [] unless every part has a box: if only a part has one, a map may rightly
      point at another part.
    """
    there = {label.lower() for label in labels}
    parts = [answers.normalise(p) for p in re.split(r",|\band\b", answers.normalise(answer))]
    found = [there & ({part} | NAMES.get(part, set())) for part in parts if part]
    return sorted(set().union(*found)) if found and all(found) else []


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
