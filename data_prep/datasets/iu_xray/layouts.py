"""Reads IU X-Ray's reports and which images they are about, of Open-i's, Kaggle's and R2Gen's files.

The three have other studies, other names for the same image, and other parts of the reports. Each gives `Study`s.
"""

import dataclasses
import pathlib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from typing import Any

from data_prep import files
from data_prep.builders.figures import first_there
from data_prep.files import DataError

CONFIGS = ("openi", "kaggle", "r2gen")
PARTS = ("findings", "impression", "indication", "comparison")
EXPECTED = {
    "openi": "NLMCXR_reports/ecgen-radiology/*.xml and NLMCXR_png/ (both unpacked)",
    "kaggle": "indiana_reports.csv, indiana_projections.csv and images/images_normalized/",
    "r2gen": "annotation.json and images/",
}
_REPORTS = ("NLMCXR_reports/ecgen-radiology", "ecgen-radiology", "NLMCXR_reports")
_SPLITS = {"train": "train", "val": "validate", "test": "test"}
# Where a layout's images are looked for.
IMAGES = {
    "openi": ("NLMCXR_png", "NLMCXR_png.zip", "images", "images.zip"),
    "kaggle": ("images/images_normalized", "images_normalized", "images", "images.zip", "images_normalized.zip"),
    "r2gen": ("images", "iu_xray/images", "images.zip"),
}


@dataclasses.dataclass(frozen=True)
class Study:
    """One report with its images.

    split: the layout's own; "" if it has none. images: (name in the store, view) of each; view is "Frontal", "Lateral"
    or "" where it isn't told. parts: {part of the report: text}, see PARTS. where: file and place, for errors.
    """

    study_id: str
    split: str
    images: tuple[tuple[str, str], ...]
    parts: dict[str, str]
    where: str


def is_there(folder: pathlib.Path, config: str) -> bool:
    """Whether the reports of a layout, one of CONFIGS, are in `folder`."""
    if config == "openi":
        return _reports(folder) is not None
    names = ("indiana_reports.csv", "indiana_projections.csv") if config == "kaggle" else ("annotation.json",)
    return all((folder / name).is_file() for name in names)


def read(folder: pathlib.Path, config: str) -> Iterator[Study]:
    """The studies of a layout, in the order of its files.

    Raises:
      DataError: the files aren't there, or are of another form.
    """
    if not is_there(folder, config):
        raise DataError(f"{folder}: nothing of this layout found; expected {EXPECTED[config]}")
    yield from {"openi": _openi, "kaggle": _kaggle, "r2gen": _r2gen}[config](folder)


def _reports(folder: pathlib.Path) -> pathlib.Path | None:
    places = (folder / name for name in _REPORTS)
    return next((place for place in places if place.is_dir() and any(place.glob("*.xml"))), None)


def _number(path: pathlib.Path) -> tuple[int, str]:
    return (int(path.stem), "") if path.stem.isascii() and path.stem.isdigit() else (-1, path.stem)


def _openi(folder: pathlib.Path) -> Iterator[Study]:
    for path in sorted(_reports(folder).glob("*.xml"), key=_number):
        root = parse_xml(files.read_bytes(path, "a report"), str(path))
        parts = {(e.get("Label") or "").lower(): _spaced("".join(e.itertext())) for e in root.iter("AbstractText")}
        uid = root.find("uId")
        study_id = "" if uid is None else (uid.get("id") or "").strip()
        if not study_id:
            raise DataError(f"{path}: no uId with an id; expected a report of Open-i")
        images = [(e.get("id") or "").strip() for e in root.iter("parentImage")]
        named = tuple((f"{i}.png", "") for i in images if i)
        yield Study(study_id, "", named, {k: parts.get(k, "") for k in PARTS}, str(path))


def parse_xml(content: bytes, where: str) -> ElementTree.Element:
    """The root of an XML file without a document type, whose entities could grow without end.

    Raises:
      DataError: not UTF-8, not XML, or with a document type.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{where}: not UTF-8 text at byte {e.start}; expected a report as XML") from None
    if "<!DOCTYPE" in text:  # without one there are no entities
        raise DataError(f"{where}: has a document type; expected a report as XML without one")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError, RecursionError) as e:
        raise DataError(f"{where}: not XML ({e}); expected a report as XML") from None


def _kaggle(folder: pathlib.Path) -> Iterator[Study]:
    images: dict[str, list[tuple[str, str]]] = {}
    for _, row in files.read_table(folder / "indiana_projections.csv", ("uid", "filename", "projection"), "a table"):
        images.setdefault(row["uid"], []).append((row["filename"], row["projection"].capitalize()))
    for where, row in files.read_table(folder / "indiana_reports.csv", ("uid", *PARTS), "a table"):
        named = tuple(images.pop(row["uid"], ()))
        yield Study(f"CXR{row['uid']}", "", named, {k: _spaced(row[k]) for k in PARTS}, where)
    for uid, named in images.items():  # without a report
        yield Study(f"CXR{uid}", "", tuple(named), dict.fromkeys(PARTS, ""), f"{folder}, study {uid}")


def _r2gen(folder: pathlib.Path) -> Iterator[Study]:
    path = folder / "annotation.json"
    content = files.read_json(path, "studies by split")
    if not isinstance(content, dict):
        raise DataError(f"{path}: found {content!r:.60}; expected studies by split")
    for key, rows in content.items():
        if not isinstance(rows, list):
            raise DataError(f"{path}: {key!r:.40} is no list; expected a list of studies")
        for i, row in enumerate(rows):
            yield _r2gen_study(row, f"{path} {key.strip() or repr(key)} row {i}")


def _r2gen_study(row: Any, where: str) -> Study:
    """The split is the row's own: in a copy that goes round, the test part's key is four spaces."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: found {row!r:.60}; expected a study")
    texts = [row.get(key) for key in ("id", "report", "split")]
    images = row.get("image_path")
    if not all(isinstance(x, str) for x in texts) or not texts[0]:
        raise DataError(f"{where}: id, report or split is no text; expected three texts")
    if not isinstance(images, list) or not all(isinstance(x, str) for x in images):
        raise DataError(f"{where}: image_path is {images!r:.60}; expected a list of paths")
    if texts[2] not in _SPLITS:
        raise DataError(f"{where}: split is {texts[2]!r:.40}; expected one of {', '.join(_SPLITS)}")
    parts = dict.fromkeys(PARTS, "") | {"findings": _spaced(texts[1])}
    return Study(texts[0], _SPLITS[texts[2]], tuple((x, "") for x in images), parts, where)


def _spaced(text: str) -> str:
    return " ".join(text.split())


def image_path(folder: pathlib.Path, config: str) -> pathlib.Path:
    """Folder or zip file of a layout's images. DataError: it isn't there."""
    if found := first_there(folder, *IMAGES[config]):
        return found
    raise DataError(f"{folder}: the images not found; expected {EXPECTED[config]}")
