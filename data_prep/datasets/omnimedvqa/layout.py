"""Reads OmniMedVQA's files: a JSON list of questions for each source data set, in an open and a restricted part.

The right option is told by its text, not by a letter, and an image by its path: one name lies in many folders, so it
is never looked up by its last part alone.
"""

import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_prep import files
from data_prep.builders.questioned import Asked
from data_prep.files import DataError
from data_prep.images import store as image_store
from paligemma_med.pp.rows import ANSWER_LETTER, CHOICES, LETTERS

PARTS = {"open_access": "Open-access", "restricted": "Restricted-access"}
INFORMATION = "QA_information"
# Where images are looked for, and what stands before a path there.
IMAGES = ("Images", "Images.zip", "OmniMedVQA.zip")
_BEFORE = ("", "Images/", "OmniMedVQA/Images/")
EXPECTED = "QA_information/Open-access/*.json (or Restricted-access) and Images/ (or Images.zip, or OmniMedVQA.zip)"
FEATURES = ("content_type", "modality", "dataset", "options_text", *CHOICES, ANSWER_LETTER)
OPTIONS = tuple(f"option_{letter}" for letter in LETTERS)
NEEDED = ("dataset", "question_id", "question_type", "question", "gt_answer", "image_path", OPTIONS[0])

# The release's spellings, without what isn't a letter or stands in brackets, and one name for each.
MODALITIES = {
    "ct": "CT",
    "mr": "MRI",
    "mri": "MRI",
    "oct": "OCT",
    "xray": "X-ray",
    "ultrasound": "Ultrasound",
    "fundusphotography": "Fundus photography",
    "microscopyimages": "Microscopy",
    "microscopy": "Microscopy",
    "histopathology": "Histopathology",
    "dermoscopy": "Dermoscopy",
    "endoscopy": "Endoscopy",
    "colposcopy": "Colposcopy",
    "mammography": "Mammography",
    "digitalphotography": "Digital photography",
    "infraredreflectanceimaging": "Infrared reflectance",
}


def part_files(folder: pathlib.Path, part: str) -> list[pathlib.Path]:
    """The question files of a part, a key of PARTS."""
    return sorted((folder / INFORMATION / PARTS[part]).glob("*.json"))


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds questions of OmniMedVQA. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    if any(part_files(folder, part) for part in PARTS):
        return folder
    hint = files.did_you_mean(folder, lambda p: any(part_files(p, part) for part in PARTS))
    raise DataError(f"{folder}: no file of questions found; expected {EXPECTED}{hint}")


def open_images(folder: pathlib.Path) -> image_store.Store:
    """The store of the images. DataError: neither folder nor zip file is there."""
    for name in IMAGES:
        if (folder / name).exists():
            return image_store.open_store(folder / name)
    raise DataError(f"{folder}: found none of {', '.join(IMAGES)}; expected the images there")


def read_part(folder: pathlib.Path, part: str, open_ended: bool, store: image_store.Store) -> Iterator[Asked]:
    """All rows of a part, without a split, which the release doesn't have.

    Args:
      folder: see `check_folder`.
      part: a key of PARTS.
      open_ended: the questions without their options; answer and id stay.
      store: the images.

    Raises:
      DataError: no file of this part; a file of another form; a path that leaves the folder.
    """
    paths = part_files(folder, part)
    if not paths:
        raise DataError(f"{folder}: no {INFORMATION}/{PARTS[part]}/*.json there; expected them for config {part!r}")
    ids: Counter[str] = Counter()
    for path in paths:
        content = files.read_json(path, "a list of questions")
        if not isinstance(content, list):
            raise DataError(f"{path}: found {content!r:.60}; expected a list of questions")
        for number, row in enumerate(content):
            yield _row(row, f"{path} row {number}", open_ended, store, ids)


def _row(row: Any, where: str, open_ended: bool, store: image_store.Store, ids: Counter[str]) -> Asked:
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {row!r:.80}; expected an object with {', '.join(NEEDED)}")
    if missing := [k for k in NEEDED if k not in row]:
        raise DataError(f"{where}: key {', '.join(missing)} missing; expected {', '.join(NEEDED)}")
    texts = {k: row.get(k, "") for k in (*NEEDED, *OPTIONS)} | {
        "modality": row.get("modality_type", row.get("modality"))
    }
    for key, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {key} is {text!r:.60}; expected text")
        texts[key] = text.strip()
    flags = [] if "modality_type" in row else ["the modality stands under the key modality"]
    modality, known = modality_of(texts["modality"])
    if not known:
        flags.append(f"modality {texts['modality'][:40]!r} is in no table, kept")
    qid = texts["question_id"]
    ids[qid] += 1
    if ids[qid] > 1:
        flags.append("question_id comes again, numbered")
        qid = f"{qid}#{ids[qid]}"
    options = [texts[k] for k in OPTIONS]
    while options and not options[-1]:
        options.pop()
    letter, dropped, found = _letter(options, texts["gt_answer"])
    path = re.sub(r"^(\./)?Images/", "", texts["image_path"].replace("\\", "/"))
    features = {
        "question_id": qid,
        "image_id": path,
        "question": texts["question"],
        "answer": texts["gt_answer"],
        "answer_type": "OPEN" if open_ended else "CLOSED",
        "content_type": texts["question_type"],
        "modality": modality,
        "dataset": texts["dataset"],
        **dict.fromkeys(("options_text", *CHOICES, ANSWER_LETTER), ""),
    }
    if open_ended:
        dropped, found = "", []
    elif not dropped:
        shown = [f"{c}: {o}" for c, o in zip(LETTERS, options)]
        features |= dict(zip(CHOICES, options)) | {"options_text": " ".join(shown), ANSWER_LETTER: letter}
        features["answer"] = options[LETTERS.index(letter)]
    return Asked("", "images", _file(path, store, where), features, dropped, (*flags, *found))


def _letter(options: list[str], answer: str) -> tuple[str, str, list[str]]:
    """(letter of the option with the answer's text, why there is none or "", what to tell)."""
    flags = []
    same = [i for i, o in enumerate(options) if o == answer]
    if not same and (same := [i for i, o in enumerate(options) if o and _bare(o) == _bare(answer)]):
        flags.append("option found by its text without case and full stops")
    if not all(options) or len(options) < 2:
        return "", "an empty option, or fewer than two", []
    if not same or not answer:
        return "", "no option is the answer", []
    if len(same) > 1:
        return "", "two options are the answer", []
    if len({*options}) < len(options):
        flags.append("two wrong options alike")
    return LETTERS[same[0]], "", flags


def _bare(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".")


def modality_of(written: str) -> tuple[str, bool]:
    """(one name for each of the release's spellings, whether it is known); an unknown one stays."""
    bare = re.sub(r"[^a-z]", "", re.sub(r"\(.*", "", written.lower()))
    return (MODALITIES[bare], True) if bare in MODALITIES else (written, False)


def _file(path: str, store: image_store.Store, where: str) -> str:
    """The image's name in its store; its path if it isn't there."""
    try:
        return next((f"{before}{path}" for before in _BEFORE if store.has(f"{before}{path}")), path)
    except DataError as e:
        raise DataError(f"{where}: image_path: {e}") from None
