"""Reads PathVQA's questions, of the official pickles or the repository's JSON files with the official images, or of the
Hub's copy.

Two versions are in use under one name: the official one, and a copy on the Hub without the questions that stand there
twice for an image, with the same answer. Which of the two a build has is told by its counts.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

from data_prep import files, qa_files
from data_prep.builders.figures import first_there
from data_prep.builders.questioned import SPLITS, Asked, Questions
from data_prep.datasets.pathvqa import hub, pickles
from data_prep.files import DataError
from data_prep.images import store as image_store
from paligemma_med.pp import own_rows

NAMES = {"train": "train", "validate": "val", "test": "test"}  # split -> the release's name
OFFICIAL_FILES = (
    "split/images/{train,val,test}/ and split/qas/{train,val,test}_qa.pkl (or the repository's "
    "pvqa_{train,val,test}.json)"
)
EXPECTED = f"{OFFICIAL_FILES}, or the Hub's {hub.EXPECTED}"
# Questions of train, validate, test.
OFFICIAL = (19_755, 6_279, 6_761)
HUB = (19_654, 6_259, 6_719)
FEATURES = ("content_type",)
_SUFFIXES = (".jpg", ".jpeg", ".png")


def question_file(folder: pathlib.Path, split: str) -> pathlib.Path | None:
    """The file with a split's questions, or None."""
    name = NAMES[split]
    pickle, json = f"{name}_qa.pkl", f"pvqa_{name}.json"
    places = (
        f"split/qas/{name}/{pickle}",
        f"split/qas/{pickle}",
        f"qas/{name}/{pickle}",
        f"qas/{pickle}",
        pickle,
        json,
    )
    return first_there(folder, *places, f"split/qas/{json}", f"qas/{json}")


def is_official(folder: pathlib.Path) -> bool:
    """Whether `folder` has a file of questions of the official release."""
    return any(question_file(folder, split) for split in SPLITS)


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds PathVQA's questions. DataError: what is missing, and where it may be."""
    folder = files.given_folder(folder, EXPECTED)
    if is_official(folder) or hub.is_there(folder):
        return folder
    hint = files.did_you_mean(folder, lambda p: is_official(p) or hub.is_there(p))
    raise DataError(f"{folder}: no file of questions found; expected {EXPECTED}{hint}")


def read_hub(folder: pathlib.Path | str) -> Questions:
    """All rows of the Hub's copy. DataError: see `hub`; the folder has none of its files."""
    folder = check_folder(folder)
    if not hub.is_there(folder):
        raise DataError(f"{folder}: no Parquet file found; expected {hub.EXPECTED} for config hub")
    asked, store, counts = [], hub.Images(folder), []
    for split in SPLITS:
        before, seen = len(asked), set()
        for path in hub.parquet_files(folder, split):
            for where, image, question, answer in hub.rows(path, store):
                question, answer = _text(question, where, "question"), _text(answer, where, "answer")
                repeated = _repeated(seen, image, question, answer)
                number = f"hub_{NAMES[split]}_q{len(asked) - before}"
                features = _features(number, image, question, answer)
                asked.append(Asked(split, "images", image, features, flags=(repeated,) if repeated else ()))
        counts.append(len(asked) - before)
    notes = {"questions read": which_version(counts)}
    absent = tuple(s for s, n in zip(SPLITS, counts) if not n)
    return Questions(asked, {"images": store}, notes=notes, absent=absent)


def _repeated(seen: set, *key: str) -> str:
    """What is flagged of a question that stands there before for its image with the same answer; else ""."""
    repeated = "the same question and answer again" if key in seen else ""
    seen.add(key)
    return repeated


def read_folder(folder: pathlib.Path | str, without_repeats: bool) -> Questions:
    """All rows.

    Args:
      folder: see `check_folder`.
      without_repeats: drop a question that stands there before for its image with the same answer, as the Hub's copy.

    Raises:
      DataError: as `check_folder`; a file of another form; the images of a split aren't found.
    """
    folder = check_folder(folder)
    if not is_official(folder):
        raise DataError(f"{folder}: the Hub's Parquet files alone; expected config hub, or {OFFICIAL_FILES}")
    asked, stores, counts = [], {}, []
    for split in SPLITS:
        path, before, seen = question_file(folder, split), len(asked), set()
        if path is None:
            counts.append(0)
            continue
        stores[split] = image_store.open_store(_image_path(folder, split))
        for number, (where, image, question, answer) in enumerate(_questions(path)):
            repeated = _repeated(seen, image, question, answer)
            asked.append(_row(split, number, where, image, question, answer, repeated, without_repeats, stores[split]))
        counts.append(len(asked) - before)
    notes = {"questions read": which_version(counts)}
    return Questions(asked, stores, notes=notes, absent=tuple(s for s, n in zip(SPLITS, counts) if not n))


def which_version(counts) -> str:
    """What the numbers of questions in train, validate and test (0: not there) say about where they are from."""
    shown = " / ".join(f"{n:,}" for n in counts)
    official, hub = (all(n in (0, known) for n, known in zip(counts, c)) for c in (OFFICIAL, HUB))
    if official:
        return f"{shown}, the official release"
    if hub:
        return f"{shown}, the Hub's copy, which leaves out questions that stand there twice"
    known = "; ".join(
        f"{' / '.join(f'{n:,}' for n in c)} {name}" for c, name in ((OFFICIAL, "official"), (HUB, "Hub's"))
    )
    return f"{shown}, neither of the versions in use ({known})"


def _image_path(folder: pathlib.Path, split: str) -> pathlib.Path:
    places = [f"{before}images/{NAMES[split]}{zipped}" for before in ("split/", "") for zipped in ("", ".zip")]
    if found := first_there(folder, *places):
        return found
    raise DataError(f"{folder}: the images of {split} not found; expected {places[0]}/")


def _questions(path: pathlib.Path) -> Iterator[tuple[str, str, str, str]]:
    """(place in the file, image, question, answer) of each question."""
    if path.suffix == ".pkl":
        content = pickles.load(files.read_bytes(path, "a pickle of questions"), str(path))
    else:
        content = files.read_json(path, "a list of questions")
    if not isinstance(content, list):
        raise DataError(f"{path}: found {content!r:.60}; expected a list of questions")
    for i, row in enumerate(content):
        where = f"{path} row {i}"
        if not isinstance(row, dict):
            raise DataError(f"{where}: found {row!r:.60}; expected an object")
        if "sentf" in row or "labelf" in row:
            yield from _lxmert(row, where)
        else:
            yield where, *(_text(row.get(key), where, key) for key in ("image", "question", "answer"))


def _lxmert(row: dict[str, Any], where: str) -> Iterator[tuple[str, str, str, str]]:
    """The questions of one image: two lists that go together, one answer with weight 1 to each question."""
    image = _text(row.get("img_id"), where, "img_id")
    questions, labels = (_lists(row.get(key), where, key) for key in ("sentf", "labelf"))
    if len(questions) != len(labels):
        raise DataError(f"{where}: {len(questions)} questions and {len(labels)} answers; expected as many")
    for question, label in zip(questions, labels):
        if not isinstance(label, dict) or len(label) != 1:
            raise DataError(f"{where}: labelf has {label!r:.60}; expected one answer to each question")
        yield where, image, _text(question, where, "sentf"), _text(next(iter(label)), where, "labelf")


def _lists(value: Any, where: str, key: str) -> list:
    found = value.get("pvqa") if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise DataError(f"{where}: {key} is {value!r:.60}; expected an object with a list pvqa")
    return found


def _text(value: Any, where: str, key: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: {key} is {value!r:.60}; expected text")
    return str(value)


def _features(number: str, image: str, question: str, answer: str) -> dict[str, str]:
    question, answer = (" ".join(text.split()) for text in (question, answer))
    return {
        "question_id": number,
        "image_id": image,
        "question": question,
        "answer": answer,
        "answer_type": "CLOSED" if own_rows.is_yes_no(answer) else "OPEN",
        "content_type": qa_files.question_word(question),
    }


def _row(split, number, where, image, question, answer, repeated, without_repeats, store) -> Asked:
    features = _features(f"{NAMES[split]}_q{number}", image, question, answer)
    names = [f"{image}{suffix}" for suffix in _SUFFIXES]
    try:
        file = next((name for name in names if store.has(name)), names[0])
    except DataError as e:
        raise DataError(f"{where}: image: {e}") from None
    dropped = repeated if without_repeats else ""
    flags = (repeated,) if repeated and not dropped else ()
    return Asked(split, split, file, features, dropped, flags)
