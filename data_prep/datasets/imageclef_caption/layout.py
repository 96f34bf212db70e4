"""Reads an ImageCLEFmedical Caption release: tables of captions and of concepts, with a tab between id and text.

The challenge's test captions are given to nobody, and no id says which article an image is from: the splits are the
organisers', and a test set is there only where its captions are.
"""

import pathlib
import re
from collections.abc import Iterator

from data_prep import files
from data_prep.builders.figures import Figure, Release, add_figure, check_disjoint
from data_prep.datasets.roco.layout import FEATURES, TABLES, caption_figure
from data_prep.files import DataError

__all__ = ["EXPECTED", "FEATURES", "TABLES", "check_folder", "read_folder"]

EXPECTED = (
    "…_caption_prediction_train_labels.csv and …_caption_prediction_valid_labels.csv , perhaps "
    "the same of concept_detection, and a folder or zip file of images for each"
)
_NAMES = {"train": ("train", "training"), "validate": ("valid", "validation", "val"), "test": ("test",)}


def _words(path: pathlib.Path) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", path.stem.lower()))


def _tables(folder: pathlib.Path, task: str) -> dict[str, pathlib.Path]:
    """Split -> its table of a task, "caption" or "concept"."""
    found: dict[str, pathlib.Path] = {}
    for path in sorted((*folder.glob("*.csv"), *folder.glob("*/*.csv"))):
        words = _words(path)
        if {task, "prediction" if task == "caption" else "detection"} <= words:
            for split, names in _NAMES.items():
                if words & set(names):
                    found.setdefault(split, path)
    return found


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds tables of captions. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    if not _tables(folder, "caption"):
        raise DataError(f"{folder}: no table of captions found; expected {EXPECTED}")
    return folder


def read_folder(folder: pathlib.Path | str) -> Release:
    """Captions and concepts; finds the images but doesn't open them. Features as of ROCOv2.

    Raises:
      DataError: as `check_folder`; a table of another form; an id that comes twice.
    """
    folder = check_folder(folder)
    figures: dict[str, dict[str, Figure]] = {}
    images, notes, captions = {}, {}, set()
    concepts = {
        image_id: tuple(c.strip() for c in cuis.split(";") if c.strip())
        for path in _tables(folder, "concept").values()
        for _, image_id, cuis in _lines(path, "cuis")
    }
    for split, path in _tables(folder, "caption").items():
        some = figures[split] = {}
        for where, image_id, caption in _lines(path, "caption"):
            add_figure(some, caption_figure(image_id, caption, concepts.get(image_id, ()), captions), where)
        notes[split] = {"captions_file": path.name, "without_concepts": len(some.keys() - concepts.keys())}
        images[split] = _images(folder, split)
    release = Release(figures, images, notes, optional=("test",))
    check_disjoint(release, folder)
    return release


def _lines(path: pathlib.Path, column: str) -> Iterator[tuple[str, str, str]]:
    """(where, id, text) of a table whose header is ID, tab, `column`; a quote is a character like others."""
    header, *lines = files.read_text(path, f"a table of ID, tab, {column}").split("\n")
    if [x.strip().lower() for x in header.split("\t")] not in (["id", column], ["id", f"{column}s"]):
        raise DataError(f"{path}: header {header.strip()!r:.60}; expected ID, tab, {column}")
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        image_id, tab, rest = line.rstrip("\r").partition("\t")
        if not tab or not image_id.strip():
            raise DataError(f"{path} line {number}: {line!r:.60}; expected an id, a tab and {column}")
        yield f"{path} line {number}", image_id.strip(), rest


def _images(folder: pathlib.Path, split: str) -> pathlib.Path | None:
    """A split's folder or zip file of images: one with the split's name in its own, else one for all."""
    places = [p for p in sorted(folder.iterdir()) if p.is_dir() or p.suffix.lower() == ".zip"]
    named = [p for p in places if _words(p) & set(_NAMES[split])]
    for_all = [p for p in places if "images" in _words(p) and not _words(p) & set().union(*_NAMES.values())]
    return next(iter((*named, *for_all)), None)
