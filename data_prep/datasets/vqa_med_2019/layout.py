"""Reads VQA-Med 2019's files: lines `image|question|answer`, of the test `image|category|question|answers`.

Only a test answer is a pattern: `#` stands between answers that are right as well, and what stands in brackets may be
left out. Training answers keep their brackets, which are part of the names of classes.
"""

import collections
import itertools
import pathlib
import re
from collections.abc import Iterator

from data_prep import files
from data_prep.builders.questioned import Asked, Questions
from data_prep.files import DataError
from data_prep.images import store as image_store
from paligemma_med.pp import own_rows
from paligemma_med.pp.rows import ACCEPTED

# Split -> file of questions, names of the folder or zip file of its images.
QUESTIONS = {
    "train": "All_QA_Pairs_train.txt",
    "validate": "All_QA_Pairs_val.txt",
    "test": "VQAMed2019_Test_Questions_w_Ref_Answers.txt",
}
IMAGES = {
    "train": ("Train_images", "training_images"),
    "validate": ("Val_images", "validation_images"),
    "test": ("VQAMed2019_Test_Images", "test_images"),
}
BY_CATEGORY = "QAPairsByCategory"
CATEGORIES = {"c1": "Modality", "c2": "Plane", "c3": "Organ", "c4": "Abnormality"}
EXPECTED = (
    "ImageClef-2019-VQA-Med-Training/ (All_QA_Pairs_train.txt, QAPairsByCategory/, Train_images/), "
    "ImageClef-2019-VQA-Med-Validation/ (the same with val) and VQAMed2019Test/ "
    "(VQAMed2019_Test_Questions_w_Ref_Answers.txt, VQAMed2019_Test_Images/)"
)
MOST_OPTIONAL = 4  # bracketed parts of an answer that are each taken with and without: 16 forms
_SUFFIXES = (".jpg", ".jpeg", ".png")


def question_files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Split -> its file of questions, in `folder` or in one of its folders."""
    found = {}
    for split, name in QUESTIONS.items():
        there = sorted(p for pattern in ("*.txt", "*/*.txt") for p in folder.glob(pattern) if _same(p.name, name))
        if there:
            found[split] = there[0]
    return found


def _same(a: str, b: str) -> bool:
    return a.lower() == b.lower()


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds VQA-Med 2019. DataError: what is missing, and where it may be."""
    folder = files.given_folder(folder, EXPECTED)
    if question_files(folder):
        return folder
    hint = files.did_you_mean(folder, question_files)
    raise DataError(f"{folder}: no file of questions with answers found; expected {EXPECTED}{hint}")


def read_folder(folder: pathlib.Path | str) -> Questions:
    """All rows, with `accepted_answers` of the test: what counts as right, a line each.

    Raises:
      DataError: as `check_folder`; a file that isn't UTF-8; images that aren't found; a name that leaves its folder.
    """
    folder = check_folder(folder)
    paths = question_files(folder)
    asked, stores = [], {}
    for split, path in paths.items():
        stores[split] = image_store.open_store(_image_path(path, split))
        categories = _categories(path.parent)
        rows = _lines(path, 4 if split == "test" else 3)
        asked += [_row(split, number, parts, stores[split], categories) for number, parts in rows]
    return Questions(asked, stores, absent=tuple(s for s in QUESTIONS if s not in paths))


def _image_path(path: pathlib.Path, split: str) -> pathlib.Path:
    names = [n.lower() for n in IMAGES[split]]
    for place in dict.fromkeys((path.parent, path.parent.parent)):
        there = {p.name.lower(): p for p in sorted(place.iterdir(), reverse=True)}
        for name in (*names, *(f"{n}.zip" for n in names)):
            if name in there:
                return there[name]
    raise DataError(f"{path.parent}: the images of {split} not found; expected {IMAGES[split][0]}/ or a .zip of it")


def _lines(path: pathlib.Path, parts: int) -> Iterator[tuple[int, list[str]]]:
    """(line number from 1, its parts between `|`); the last part may hold more of them."""
    for number, line in enumerate(files.read_text(path, "lines of questions").split("\n"), 1):
        if line.strip():
            yield number, [part.strip() for part in line.split("|", parts - 1)]


def _categories(folder: pathlib.Path) -> dict[tuple[str, ...], collections.deque[str]]:
    """(image, question, answer) -> its categories, which only the files in QAPairsByCategory tell."""
    found = collections.defaultdict(collections.deque)
    for path in sorted((folder / BY_CATEGORY).glob("*.txt")):
        category = CATEGORIES.get(path.name[:2].lower())
        for _, parts in _lines(path, 3) if category else ():
            found[tuple(parts)].append(category)
    return found


def _row(split: str, number: int, parts: list[str], store: image_store.Store, categories: dict) -> Asked:
    image = parts[0]
    features = dict.fromkeys(("question", "answer", "content_type", ACCEPTED), "")
    features |= dict(question_id=f"{split}_{number}", image_id=image, answer_type="OPEN")
    if len(parts) != (4 if split == "test" else 3):
        return Asked(split, split, "", features, "another number of parts between | than expected")
    flags = []
    if split == "test":
        _, category, features["question"], written = parts
        features["content_type"] = category.capitalize()
        accepted = accepted_answers(written)
        features["answer"] = accepted[0] if accepted else ""
        if len(accepted) > 1:
            features[ACCEPTED] = "\n".join(accepted)
        for mark, what in (("#", "several right answers"), ("(", "parts of the answer may be left out")):
            if mark in written:
                flags.append(what)
    else:
        _, features["question"], features["answer"] = parts
        if left := categories.get(tuple(parts)):
            features["content_type"] = left.popleft()
        else:
            flags.append(f"category unknown: not in {BY_CATEGORY}")
    if own_rows.is_yes_no(features["answer"]):
        features["answer_type"] = "CLOSED"
    return Asked(split, split, _file(image, store), features, flags=tuple(flags), groups=(("MedPix image", image),))


def _file(image: str, store: image_store.Store) -> str:
    """The image's name in its store; the usual one if it isn't there."""
    names = [f"{image}{suffix}" for suffix in _SUFFIXES]
    return next((name for name in names if store.has(name)), names[0])


def accepted_answers(written: str) -> list[str]:
    """All texts that a test answer's pattern stands for, the first as it is written.

    "a (b)#c" gives "a (b)", "a b", "a", "c". Of an answer with more than `MOST_OPTIONAL` bracketed parts only the text
    as it is, and that without any of them.
    """
    found = []
    for alternative in filter(None, (part.strip() for part in written.split("#"))):
        pieces = re.split(r"\(([^()]*)\)", alternative)
        fixed, optional = pieces[::2], pieces[1::2]
        choices = itertools.product((True, False), repeat=len(optional))
        if len(optional) > MOST_OPTIONAL:
            choices = [(False,) * len(optional)]
        found.append(alternative)
        for taken in choices:
            texts = [fixed[0]]
            for text, rest, there in zip(optional, fixed[1:], taken):
                texts += [f" {text} " if there else " ", rest]
            found.append(" ".join("".join(texts).split()) if optional else alternative)
    return list(dict.fromkeys(filter(None, found)))
