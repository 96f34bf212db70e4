"""Reads a folder of MedPix 2.0: images with descriptions, joined with their cases, official split.

Layout: `Descriptions.json` (one entry per image), `Case_topic.json` (one per case),
`splitted_dataset/uid_list.json` (the cases of each split; or the jsonl files next to it), `images/`.
"""

import pathlib
import re
from collections import Counter
from typing import Any

from data_prep import files
from data_prep.builders.figures import (
    CAPTION_AGAIN,
    Figure,
    Release,
    add_figure,
    check_disjoint,
    first_there,
    has_text,
)
from data_prep.files import DataError
from paligemma_med.pp import json_text

SPLITS = {"train": ("train", "train_1", "train_2"), "validate": ("dev",), "test": ("test",)}
EXPECTED = "Descriptions.json, Case_topic.json, splitted_dataset/ and images/"

# Feature -> key in an entry's "Description", in a case's "Case", in its "Topic".
_DESCRIPTION = {
    "caption": "Caption",
    "modality_detail": "Modality",
    "plane": "Plane",
    "figure_part": "Figure Part",
    "age": "Age",
    "sex": "Sex",
    "acr_codes": "ACR Codes",
}
_CASE = {
    "title": "Title",
    "history": "History",
    "exam": "Exam",
    "findings": "Findings",
    "differential": "Differential Diagnosis",
    "diagnosis": "Case Diagnosis",
    "diagnosis_by": "Diagnosis By",
    "treatment": "Treatment & Follow Up",
    "discussion": "Discussion",
}
_TOPIC = {
    "topic": "Title",
    "topic_category": "Category",
    "topic_discussion": "Disease Discussion",
    "topic_keywords": "Keywords",
}
FEATURES = (
    "case_id",
    "modality",
    *_DESCRIPTION,
    "location",
    "location_category",
    *_CASE,
    *_TOPIC,
)

_NOT_RADIOLOGICAL = ("Photograph", "Gross Pathology", "Drawing")
_SEVERAL_VIEWS = ("Montage", "3D Reconstruction")
_SAYS_NOTHING = re.compile(r"(axial |coronal |sagittal )?((ct|mri?|x-?ray) )?(images?|figure|fig\.?)( \d+\w?)?\.?")


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` if it looks like MedPix 2.0. DataError: what is missing in it."""
    folder = files.given_folder(folder, EXPECTED)
    missing = _missing(folder)
    if not missing:
        return folder
    hint = files.did_you_mean(folder, lambda p: not _missing(p))
    raise DataError(
        f"{folder}: not a folder of MedPix 2.0: {', '.join(missing)} not found in it; expected {EXPECTED}{hint}"
    )


def _missing(folder: pathlib.Path) -> list[str]:
    missing = []
    if not _descriptions(folder):
        missing.append("Descriptions.json")
    if not (folder / "Case_topic.json").is_file():
        missing.append("Case_topic.json")
    if not (folder / "splitted_dataset").is_dir():
        missing.append("splitted_dataset/")
    return missing


def _descriptions(folder: pathlib.Path) -> pathlib.Path | None:
    return first_there(folder, "Descriptions.json", "Description.json")  # copies have either


def read_folder(folder: pathlib.Path | str) -> Release:
    """Reads and joins everything; checks that images exist but doesn't open them.

    Features: `FEATURES`, texts without surrounding spaces; "" for anything absent, null or "N/A".
    `modality` is CT or MR, `modality_detail` the release's finer name. A placeholder isn't a caption.

    Raises:
      DataError: see `check_folder`; an entry of another form; an image, or a case, in two splits or
        in two entries; a description without its case.
    """
    folder = check_folder(folder)
    path = _descriptions(folder)
    cases, listed = _cases(folder / "Case_topic.json")
    split_of = _split(folder / "splitted_dataset")
    figures: dict[str, dict[str, Figure]] = {split: {} for split in SPLITS}
    without_split, captions = [], Counter()
    for i, row in enumerate(_list(path)):
        where = f"{path} entry {i}"
        case_id, image = _key(row, "U_id", where), _key(row, "image", where)
        description = row.get("Description")
        if not isinstance(description, dict):
            raise DataError(f"{where}: Description is {description!r:.60}; expected an object")
        if case_id not in cases:
            raise DataError(f"{where}: case {case_id!r} is not in Case_topic.json; expected it")
        if case_id not in split_of:
            without_split.append(image)
            continue
        features = {
            "case_id": case_id,
            "modality": _text(row, "Type"),
            "location": _text(row, "Location"),
            "location_category": _text(row, "Location Category"),
            **{k: _text(description, key) for k, key in _DESCRIPTION.items()},
            **cases[case_id],
        }
        reason = no_caption(features["caption"])
        flags = []
        if features["plane"] in _NOT_RADIOLOGICAL or features["modality_detail"] == "Drawing":
            flags.append("not a radiological image")
        if any(w in features["plane"] + features["modality_detail"] for w in _SEVERAL_VIEWS):
            flags.append("montage or reconstruction")
        if not reason:
            captions[features["caption"]] += 1
            if captions[features["caption"]] > 1:
                flags.append(CAPTION_AGAIN)
        else:
            features["caption"] = ""
        figure = Figure(
            image,
            tuple(image + s for s in ("", ".png", ".jpg") if s or "." in image),
            features,
            no_caption=reason,
            flags=tuple(flags),
            groups=(("case", case_id),),
        )
        add_figure(figures[split_of[case_id]], figure, where)
    images = first_there(folder, "images", "images.zip")
    notes = {
        "cases": len(cases),
        "descriptions": sum(map(len, figures.values())) + len(without_split),
        "cases_by_split": dict(Counter(split_of.values())),
        "images_by_split": {split: len(found) for split, found in figures.items()},
        "captions_used_again": sum(captions.values()) - len(captions),
    }
    described = {image for found in figures.values() for image in found} | set(without_split)
    if strays := sorted(described ^ listed):
        notes["images_in_only_one_of_the_two_files"] = {
            "count": len(strays),
            "first": strays[:10],
        }
    if without_split:
        notes["images_of_cases_in_no_split"] = {
            "count": len(without_split),
            "first": without_split[:10],
        }
    release = Release(figures, dict.fromkeys(SPLITS, images), notes)
    check_disjoint(release, folder)
    return release


def no_caption(caption: str) -> str:
    """Why a text of the field Caption isn't a caption; "" if it is one."""
    text = " ".join(caption.split()).lower()
    if not has_text(text):
        return "no caption"
    if text.startswith("replace this") or text.rstrip(".") == "in progress":
        return "placeholder in place of a caption"
    if _SAYS_NOTHING.fullmatch(text):
        return "the caption says only that it is an image"
    return ""


def _text(entry: dict[str, Any], key: str) -> str:
    """A field's text; "" for absent, null and "N/A", which mean the same in the JSON and jsonl files."""
    value = entry.get(key)
    text = "" if value is None else str(value).strip()
    return "" if text.upper() in ("N/A", "NA", "NULL") else text


def _list(path: pathlib.Path) -> list[dict[str, Any]]:
    content = files.read_json(path, "a list of entries")
    if not isinstance(content, list) or not content:
        raise DataError(f"{path}: found {content!r:.60}; expected a list of entries")
    for i, row in enumerate(content):
        if not isinstance(row, dict):
            raise DataError(f"{path} entry {i}: found {row!r:.60}; expected an object")
    return content


def _key(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key} is {value!r:.60}; expected text")
    return value.strip()


def _cases(path: pathlib.Path) -> tuple[dict[str, dict[str, str]], set[str]]:
    """(case id -> its features, the ids of all images that cases list)."""
    cases: dict[str, dict[str, str]] = {}
    listed: set[str] = set()
    for i, row in enumerate(_list(path)):
        where = f"{path} entry {i}"
        case_id = _key(row, "U_id", where)
        if case_id in cases:
            raise DataError(f"{where}: case {case_id!r} comes twice; expected each once")
        case, topic = row.get("Case") or {}, row.get("Topic") or {}
        if not isinstance(case, dict) or not isinstance(topic, dict):
            raise DataError(f"{where}: Case and Topic aren't objects; expected two objects")
        cases[case_id] = {k: _text(case, key) for k, key in _CASE.items()} | {
            k: _text(topic, key) for k, key in _TOPIC.items()
        }
        for kind in ("TAC", "MRI"):  # TAC is Italian for CT
            images = row.get(kind) or []
            if not isinstance(images, list):
                raise DataError(f"{where}: {kind} is {images!r:.60}; expected a list of images")
            listed.update(i for i in images if isinstance(i, str))
    return cases, listed


def _split(folder: pathlib.Path) -> dict[str, str]:
    """Case id -> split, from `uid_list.json` or, without it, from `descriptions_<name>.jsonl`."""
    path = folder / "uid_list.json"
    if path.is_file():
        content = files.read_json(path, "lists of case ids by split")
        if not isinstance(content, dict):
            raise DataError(f"{path}: found {content!r:.60}; expected lists of case ids by split")
        named = {name: content.get(name) or [] for names in SPLITS.values() for name in names}
        if bad := [n for n, v in named.items() if not isinstance(v, list)]:
            raise DataError(f"{path}: {bad[0]} isn't a list; expected a list of case ids")
    else:
        path = folder
        named = {
            name: _jsonl_cases(folder / f"descriptions_{name}.jsonl") for names in SPLITS.values() for name in names
        }
    split_of: dict[str, str] = {}
    for split, names in SPLITS.items():
        for case_id in (str(c).strip() for name in names for c in named[name]):
            if split_of.setdefault(case_id, split) != split:
                raise DataError(
                    f"{path}: case {case_id} is in {split_of[case_id]} and {split}; expected each case in one split"
                )
    if missing := [s for s in SPLITS if s not in split_of.values()]:
        raise DataError(
            f"{path}: no case in {', '.join(missing)}; expected uid_list.json, or "
            "descriptions_train.jsonl, descriptions_dev.jsonl, descriptions_test.jsonl"
        )
    return split_of


def _jsonl_cases(path: pathlib.Path) -> list[str]:
    if not path.is_file():
        return []
    ids = []
    for i, line in enumerate(files.read_bytes(path, "JSON lines").split(b"\n"), 1):
        if line.strip():
            where = f"{path} line {i}"
            row = json_text.parse(line, where, "a JSON object with U_id", root=dict, error=DataError)
            ids.append(_key(row, "U_id", where))
    return ids
