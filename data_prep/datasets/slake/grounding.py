"""Rows with boxes, made from SLAKE's questions and its boxes of organs and findings.

detect   a row for each name that has a box in an image: "detect liver" → all its boxes and the name
ground   the questions about something that has a box: "ground Where is the liver?" → "Right <loc…>"

Texts are those of `paligemma_med.pp.boxes`, of the whole image; the boxes in pixels are in the row, too, so that a crop
can move them.
"""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from data_prep.datasets.slake import layout
from data_prep.files import DataError
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import images

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
# Names of boxes that are findings; the others are organs.
FINDINGS = {
    *("atelectasis", "brain edema", "brain enhancing tumor", "brain non-enhancing tumor", "cardiomegaly", "effusion"),
    *("infiltrate", "liver cancer", "lung cancer", "mass", "nodule", "pneumonia", "pneumothorax"),
}


def _form(text):
    return re.sub(r"\s+", " ", text.lower()).strip().rstrip(" .,;:!?，、。；：！？")


def named(answer: str, labels: Sequence[str]) -> list[str]:
    """The labels that an answer names, sorted and in lower case.

    The answer is cut at commas and "and"; ignoring case, each part must be a label of the image, or a word of NAMES for
    one or both of a pair. [] unless every part has a box.
    """
    there = {label.lower() for label in labels}
    parts = [_form(part) for part in re.split(r"[,，、]|\band\b", answer.lower())]
    found = [there & ({part} | NAMES.get(part, set())) for part in parts if part]
    return sorted(set().union(*found)) if found and all(found) else []


def shown(question: str, answer: str, labels: Sequence[str]) -> list[str]:
    """The labels whose boxes show what a question is about, sorted and in lower case; [] for none.

    "Where is …" and questions answered with Yes are about what the question names ("abnormality": all findings); others
    about what the answer names, as `named` reads it.
    """
    there, asked, said = {label.lower() for label in labels}, question.lower(), _form(answer)
    if not asked.strip().startswith("where") and said != "yes":
        return [] if said == "no" else named(answer, labels)
    names = {name: {name} | NAMES.get(name, set()) for name in {*there, *NAMES}}
    found = set().union(*(of for name, of in names.items() if re.search(rf"\b{re.escape(name)}s?\b", asked)))
    if "abnormalit" in asked:
        found |= FINDINGS
    return sorted(found & there)


def detect(folder: layout.Folder) -> layout.Folder:
    """The folder with a row for each name of a box in place of its questions."""
    rows, counts = {}, {}
    for split, questions in folder.rows.items():
        rows[split], counts[split] = [], {"images": 0, "images_without_boxes": 0, "boxes": 0}
        for image, first in {row.image: row.features for row in reversed(questions)}.items():
            boxes = _in_image(folder, image)
            counts[split]["images"] += 1
            counts[split]["images_without_boxes"] += not boxes
            counts[split]["boxes"] += len(boxes)
            for name in sorted({box["label"].lower() for box in boxes}):
                rows[split].append(_detect_row(image, first, name, [b for b in boxes if b["label"].lower() == name]))
        rows[split].sort(key=lambda row: row.features["question_id"])
    return _folder(folder, rows, {"kind": "detect", "splits": counts})


def _detect_row(image, features, name, boxes):
    kept = {key: features[key] for key in ("image_id", "q_lang", "location", "modality")}
    made = dict(
        question_id=f"{features['image_id']}_{re.sub(r'[^a-z0-9]+', '_', name)}",
        question=f"detect {name}",
        answer=_text(image, boxes, [name] * len(boxes)),
        answer_type="OPEN",
        base_type="detect",
        content_type="Detect finding" if name in FINDINGS else "Detect organ",
    )
    return layout.Row(image, kept | made, boxes)


def ground(folder: layout.Folder) -> layout.Folder:
    """The folder with those of its questions that are about something with a box; their answers end in the boxes."""
    rows, counts = {}, {}
    for split, questions in folder.rows.items():
        rows[split] = []
        for row in questions:
            boxes = _in_image(folder, row.image)
            text = row.features
            names = shown(text["question"], text["answer"], [box["label"] for box in boxes])
            if boxes := [box for box in boxes if box["label"].lower() in names]:
                answer = _text(row.image, boxes, (), text["answer"].strip())
                made = dict(question=f"ground {text['question'].strip()}", answer=answer, base_type="ground")
                rows[split].append(layout.Row(row.image, text | made, boxes))
        counts[split] = {"questions": len(questions), "about_no_box": len(questions) - len(rows[split])}
    return _folder(folder, rows, {"kind": "ground", "splits": counts})


def _in_image(folder: layout.Folder, image: pathlib.Path) -> list[dict[str, Any]]:
    """The image's boxes, in reading order, without those that lie outside of it."""
    found = folder.boxes[image]
    shares, which = boxes_lib.from_pixels([box["bbox"] for box in found], *_size(image))
    order = sorted(range(len(which)), key=lambda i: (shares[i][0], shares[i][1]))
    return [found[which[i]] for i in order]


def _size(image):
    return images.size(image.read_bytes())


def _text(image, boxes, labels, answer=""):
    shares, _ = boxes_lib.from_pixels([box["bbox"] for box in boxes], *_size(image))
    try:
        return boxes_lib.to_text(shares, labels, answer)
    except ValueError as e:
        raise DataError(f"{image.parent / 'detection.json'}: {e}") from None


def _folder(folder, rows, report):
    splits = {split: found | layout.kept(rows[split]) for split, found in folder.report["splits"].items()}
    for split in rows:
        if not rows[split]:
            raise DataError(f"{split}: no row has a box; expected a detection.json beside its images")
    return dataclasses.replace(folder, rows=rows, report=folder.report | {"splits": splits, "made": report})


def describe(report: dict[str, Any]) -> list[str]:
    """The report of `detect` or `ground` as lines of text."""
    made = report["made"]
    if made["kind"] == "detect":
        form = "{split}: {n:,} rows of {boxes:,} boxes in {images:,} images, {images_without_boxes:,} of them without"
    else:
        form = "{split}: {n:,} of {questions:,} questions are about something with a box"
    counts = {split: r["rows_kept"] for split, r in report["splits"].items()}
    return [form.format(split=split, n=counts[split], **found) for split, found in made["splits"].items()]
