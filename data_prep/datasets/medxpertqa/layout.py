"""Reads MedXpertQA's multimodal questions, in the Hub's form or in that of its evaluation.

A question may have up to six images, a row has one: what that leaves out is said, whichever way it is done.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from data_prep import files
from data_prep.builders.figures import first_there
from data_prep.builders.questioned import Asked, Questions
from data_prep.files import DataError
from data_prep.images import store as image_store
from paligemma_med.pp import json_text
from paligemma_med.pp.rows import ANSWER_LETTER

LETTERS = "ABCDE"
CHOICES = tuple(f"choice_{letter.lower()}" for letter in LETTERS)
TABLES = {
    "validate": ("MM/dev.jsonl", "dev.jsonl"),
    "test": ("MM/test.jsonl", "test.jsonl", "eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl"),
}
IMAGES = ("images", "MM/images", "images.zip", "MM/images.zip")
EXPECTED = "MM/test.jsonl (perhaps MM/dev.jsonl) and images.zip or images/"
FEATURES = ("content_type", "body_system", "medical_task", "images", "options_text", *CHOICES, ANSWER_LETTER)
_MARK = "\nAnswer Choices:"


def table(folder: pathlib.Path, split: str) -> pathlib.Path | None:
    """The file with a split's questions, or None."""
    return first_there(folder, *TABLES[split])


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds the multimodal test questions. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    if table(folder, "test") is None:
        raise DataError(f"{folder}: none of {', '.join(TABLES['test'])} found; expected {EXPECTED}")
    return folder


def read_folder(folder: pathlib.Path | str, first_image: bool) -> Questions:
    """All questions.

    Args:
      folder: see `check_folder`.
      first_image: keep questions about several images, with the first of them; else they are dropped.

    Raises:
      DataError: as `check_folder`; no images; a line of another form.
    """
    folder = check_folder(folder)
    images = first_there(folder, *IMAGES)
    if images is None:
        raise DataError(f"{folder}: found none of {', '.join(IMAGES)}; expected the images there")
    asked = [
        _row(split, row, where, first_image)
        for split in TABLES
        if (path := table(folder, split))
        for where, row in _lines(path)
    ]
    several = sum(row.features["images"] != "1" for row in asked)
    notes = {"questions about several images, of which a row has one": several}
    store = image_store.open_store(images, by_name=True)
    return Questions(asked, {"images": store}, notes=notes, may_be_empty=True)


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(files.read_bytes(path, "lines of questions").split(b"\n"), 1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, json_text.parse(line, where, "a question as a JSON object", root=dict, error=DataError)


def _row(split: str, row: dict[str, Any], where: str, first_image: bool) -> Asked:
    texts = {key: row.get(key) for key in ("id", "question", "medical_task", "body_system", "question_type")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise DataError(f"{where}: {key} is {value!r:.60}; expected text")
    options, letter, images = _options(row, where), _letter(row.get("label"), where), _images(row, where)
    question, mark, _ = texts["question"].rpartition(_MARK)
    flags = [] if mark else ["the question doesn't repeat its choices"]
    shown = [f"{c}: {o}" for c, o in zip(LETTERS, options)]
    features = {
        "question_id": texts["id"],
        "image_id": images[0] if images else "",
        "question": " ".join((question if mark else texts["question"]).split()),
        "answer": options[LETTERS.index(letter)],
        "answer_type": "CLOSED",
        "content_type": texts["question_type"],
        "body_system": texts["body_system"],
        "medical_task": texts["medical_task"],
        "images": str(len(images)),
        "options_text": " ".join(shown),
        **dict(zip(CHOICES, options)),
        ANSWER_LETTER: letter,
    }
    dropped = ""
    if len(images) > 1:
        what = f"about {len(images)} images"
        dropped = "" if first_image else what
        flags += [f"{what}, only the first is here"] if first_image else []
    return Asked(split, "images", features["image_id"], features, dropped, tuple(flags))


def _options(row: dict[str, Any], where: str) -> list[str]:
    """The five texts, of {"A": text} or [{"letter": "A", "content": text}]."""
    found = row.get("options")
    if isinstance(found, list) and all(isinstance(x, dict) for x in found):
        found = {x.get("letter"): x.get("content") for x in found}
    if not isinstance(found, dict) or [*found] != [*LETTERS] or not all(isinstance(x, str) for x in found.values()):
        raise DataError(f"{where}: options is {row.get('options')!r:.60}; expected texts of {', '.join(LETTERS)}")
    return [found[letter].strip() for letter in LETTERS]


def _letter(label: Any, where: str) -> str:
    letter = label[0] if isinstance(label, list) and len(label) == 1 else label
    if not isinstance(letter, str) or letter not in LETTERS or len(letter) != 1:
        raise DataError(f"{where}: label is {label!r:.60}; expected one of {', '.join(LETTERS)}")
    return letter


def _images(row: dict[str, Any], where: str) -> list[str]:
    """The names, of ["name"] or [{"image_path": "name"}]."""
    found = row.get("images")
    names = [x.get("image_path") if isinstance(x, dict) else x for x in found] if isinstance(found, list) else [None]
    for name in names:
        try:
            files.path_inside("images", name)
        except DataError as e:
            raise DataError(f"{where}: images: {e}") from None
    return names
