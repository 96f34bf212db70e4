"""Reads the tables of VinDr-CXR as PhysioNet and Kaggle have them, and boxes in COCO's JSON files.

All become `Picture`s: an image and the boxes on it by name. The release is for credentialed users, so this is written
after readers that others published; data_prep/datasets/vindr_cxr/README.md names what they agree on.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep import files
from data_prep.builders.figures import first_there
from data_prep.datasets.vindr_cxr.fusion import Box
from data_prep.files import DataError

SPLITS = {"train": ("train",), "validate": ("validate", "val", "valid"), "test": ("test",)}
COORDINATES = ("x_min", "y_min", "x_max", "y_max")
NO_FINDING = "no finding"
SUFFIXES = (".dicom", ".dcm", ".png", ".jpg", ".jpeg")
EXPECTED = {
    "physionet": "annotations/annotations_train.csv and annotations_test.csv, train/ and test/",
    "kaggle": "train.csv and train/",
    "coco": "train.json (perhaps val.json, test.json), or annotations/instances_train.json, and the images",
}
_SIZES = (("width", "height"), ("image_width", "image_height"))


@dataclasses.dataclass
class Picture:
    """An image of a release.

    root: key of the store that has it; names: what its file may be called there.
    size: (width, height) that its boxes are given in, which may be another than the file's; None: the file's.
    boxes: name of a thing in lower case -> its boxes, in the order of the file.
    unplaced: names of things that have a row but no box.
    normal: readers who found nothing ("" for a consensus).
    """

    image_id: str
    root: str
    names: tuple[str, ...]
    size: tuple[float, float] | None = None
    boxes: dict[str, list[Box]] = dataclasses.field(default_factory=dict)
    unplaced: set[str] = dataclasses.field(default_factory=set)
    normal: set[str] = dataclasses.field(default_factory=set)


def table(folder: pathlib.Path, config: str, split: str) -> pathlib.Path | None:
    """The file with a split's boxes, or None."""
    names = [f"annotations/annotations_{split}.csv", f"annotations_{split}.csv"] if split != "validate" else []
    if config == "kaggle":
        names = ["train.csv"] if split == "train" else []
    if config == "coco":
        forms = ("{}.json", "annotations/{}.json", "annotations/instances_{}.json", "{}/_annotations.coco.json")
        names = [form.format(name) for name in SPLITS[split] for form in forms]
    return first_there(folder, *names)


def images(folder: pathlib.Path, split: str) -> pathlib.Path | None:
    """The folder or zip file with a split's images, or None."""
    forms = ("images/{}", "{}", "images", "{}.zip", "images.zip")
    return first_there(folder, *(form.format(name) for name in SPLITS[split] for form in forms))


def is_there(folder: pathlib.Path, config: str) -> bool:
    """Whether the folder has at least one file with boxes of this layout."""
    return any(table(folder, config, split) for split in SPLITS)


def read(folder: pathlib.Path, config: str) -> dict[str, list[Picture]]:
    """{split: its images} of the splits that have a file.

    Raises:
      DataError: a table of another form, a box that is none, an image twice.
    """
    found = {split: path for split in SPLITS if (path := table(folder, config, split))}
    reader = _coco if config == "coco" else _csv
    return {split: list(reader(path, split).values()) for split, path in found.items()}


def name_of(text: Any, where: str) -> str:
    """The name of a thing in lower case, with single spaces. DataError: empty, or it can't stand behind a box."""
    name = " ".join(text.lower().split()) if isinstance(text, str) else ""
    if not name or set(name) & set("<>;"):
        raise DataError(f"{where}: the name of a box is {text!r:.60}; expected text without '<', '>' and ';'")
    return name


def _csv(path: pathlib.Path, split: str) -> Mapping[str, Picture]:
    pictures: dict[str, Picture] = {}
    for where, row in _rows(path):
        image_id, reader = row["image_id"], row.get("rad_id", "")
        if not image_id:
            raise DataError(f"{where}: image_id is empty; expected the name of an image")
        name, box = name_of(row["class_name"], where), _corners(row, where)
        if image_id not in pictures:
            names = tuple(image_id + suffix for suffix in SUFFIXES)
            pictures[image_id] = Picture(image_id, split, names, _size(row, where))
        _add(pictures[image_id], name, box, reader)
    return pictures


def _add(picture: Picture, name: str, box: tuple[float, float, float, float] | None, reader: str) -> None:
    if name == NO_FINDING:
        picture.normal.add(reader)
    elif box is None:
        picture.unplaced.add(name)
    else:
        picture.boxes.setdefault(name, []).append(Box(box, frozenset({reader} if reader else ())))


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, str]]]:
    return files.read_table(path, ("image_id", "class_name", *COORDINATES), "a table of boxes")


def _corners(row: Mapping[str, str], where: str) -> tuple[float, float, float, float] | None:
    """The box of a row, or None: all four are empty. DataError: no box."""
    texts = [row[key] for key in COORDINATES]
    if all(text.lower() in ("", "nan") for text in texts):
        return None
    x0, y0, x1, y1 = (_number(text) for text in texts)
    if None in (x0, y0, x1, y1) or x0 > x1 or y0 > y1:
        raise DataError(
            f"{where}: {', '.join(COORDINATES)} are {', '.join(texts)}; expected four numbers, the smaller first, "
            "or four empty cells"
        )
    return x0, y0, x1, y1


def _size(row: Mapping[str, str], where: str) -> tuple[float, float] | None:
    for keys in _SIZES:
        if all(row.get(key) for key in keys):
            return _checked_size([_number(row[key]) for key in keys], where)
    return None


def _checked_size(found: list, where: str) -> tuple[float, float]:
    if not all(_is_number(x) and x >= 1 for x in found):
        raise DataError(f"{where}: width and height are {found}; expected pixels")
    return float(found[0]), float(found[1])


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)


def _coco(path: pathlib.Path, split: str) -> Mapping[Any, Picture]:
    content = files.read_json(path, "boxes in COCO's form")
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise DataError(f"{path}: expected an object with lists {', '.join(parts)}")
    pictures: dict[Any, Picture] = {}
    for where, row in _items(path, "images", content):
        key, name = row.get("id"), row.get("file_name")
        try:
            files.path_inside("images", name)
        except DataError as e:
            raise DataError(f"{where}: file_name: {e}") from None
        if not isinstance(key, (int, str)) or key in pictures:
            raise DataError(f"{where}: id is {key!r:.60}; expected a number or text, each once")
        size = [row.get("width"), row.get("height")]
        pictures[key] = Picture(name, split, (name,), None if None in size else _checked_size(size, where))
    names = {}
    for where, row in _items(path, "categories", content):
        if not isinstance(row.get("id"), (int, str)) or row["id"] in names:
            raise DataError(f"{where}: id is {row.get('id')!r:.60}; expected a number or text, each once")
        names[row["id"]] = name_of(row.get("name"), where)
    for where, row in _items(path, "annotations", content):
        for key, known in (("image_id", pictures), ("category_id", names)):
            if not isinstance(row.get(key), (int, str)) or row[key] not in known:
                raise DataError(f"{where}: {key} is {row.get(key)!r:.60}; expected one that the file lists")
        name, reader = names[row["category_id"]], row.get("rad_id")
        box = None if name == NO_FINDING else _coco_box(row.get("bbox"), where)
        if row.get("iscrowd"):  # a region of many, which isn't a box of each
            box = None
        _add(pictures[row["image_id"]], name, box, "" if reader is None else str(reader))
    return pictures


def _items(path: pathlib.Path, part: str, content: Mapping[str, list]) -> Iterator[tuple[str, dict[str, Any]]]:
    for i, row in enumerate(content[part]):
        if not isinstance(row, dict):
            raise DataError(f"{path} {part}[{i}]: found {row!r:.60}; expected an object")
        yield f"{path} {part}[{i}]", row


def _coco_box(box: Any, where: str) -> tuple[float, float, float, float]:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
        raise DataError(f"{where}: bbox is {box!r:.60}; expected [x, y, width, height] in pixels")
    x, y, width, height = map(float, box)
    return x, y, x + width, y + height
