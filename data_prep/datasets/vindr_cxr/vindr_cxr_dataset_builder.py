"""VinDr-CXR as a TFDS data set: "detect cardiomegaly" → boxes; and boxes of other sets in COCO's form."""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep import files
from data_prep.builders.questioned import ALLOW_MISSING, Asked, QuestionedBuilder, Questions, drawn_split
from data_prep.builders.vqa import Option, boxes_feature
from data_prep.datasets.vindr_cxr import layout, rows
from data_prep.files import DataError
from data_prep.images import store as image_store
from data_prep.progress import progress

READERS = ("merged", "each")


class Builder(QuestionedBuilder):
    """VinDr-CXR. Needs PhysioNet's or Kaggle's folder as `manual_dir`, or one of COCO's form."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="physionet", description="The release: three readers, and a consensus in test"),
        tfds.core.BuilderConfig(name="kaggle", description="The competition's training images; a drawn split"),
        tfds.core.BuilderConfig(name="coco", description="Any images with boxes in COCO's form"),
    ]
    OPTIONS = {
        "allow_missing_images": ALLOW_MISSING,
        "readers": Option("merged", "several readers' boxes: merged, or each (a row for each reader)."),
        "merge_iou": Option(0.5, "merged: boxes of one name with an IoU above this become their mean."),
        "min_readers": Option(1, "merged: leave out boxes that fewer readers drew."),
        "validate_fraction": Option(0.1, "share of train's images that becomes validate, if it has no file."),
        "test_fraction": Option(0.2, "share of train's images that becomes test, if it has no file."),
        "seed": Option(0, "of the draw of validate and test."),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get VinDr-CXR (https://physionet.org/content/vindr-cxr/) and give the folder with "
        + "; or ".join(layout.EXPECTED.values())
    )
    FEATURES = rows.FEATURES
    TABLES = ("question", "readers")
    HOMEPAGE = "https://physionet.org/content/vindr-cxr/"
    LICENSE = "PhysioNet Credentialed Health Data License 1.5.0"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        expected = "; or ".join(layout.EXPECTED.values())
        folder = files.given_folder(folder, expected)
        if not cls.configs_in(folder):
            raise DataError(f"{folder}: no boxes found; expected {expected}")
        return folder

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        return [c.name for c in cls.BUILDER_CONFIGS if layout.is_there(folder, c.name)]

    @classmethod
    def other_features(cls) -> Mapping[str, Any]:
        return {"boxes": boxes_feature()}

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return read_questions(folder, self.builder_config.name, self.options)


def read_questions(folder: pathlib.Path, config: str, options: Mapping[str, Any]) -> Questions:
    """A row for each name of each image.

    Raises:
      DataError: an option out of its range; see `layout.read` and `rows.make`; a split without images.
    """
    rule = _rule(options)
    pictures = layout.read(folder, config)
    if "train" not in pictures:
        raise DataError(f"{folder}: no boxes of train found; expected {layout.EXPECTED[config]}")
    shares = [0.0 if split in pictures else options[f"{split}_fraction"] for split in ("validate", "test")]
    drawn_split("", *shares, options["seed"])
    stores, asked, notes = {}, [], dict.fromkeys(_NOTES, 0)
    for split in pictures:
        path = layout.images(folder, split)
        if path is None:
            raise DataError(f"{folder}: no images of {split} found; expected {layout.EXPECTED[config]}")
        stores[split] = image_store.open_store(path, by_name=True)
        place = "" if split == "train" and any(shares) else split
        about = rows.OTHER if config == "coco" else rows.CHEST
        for picture in progress(pictures[split], f"reading boxes of {split}"):
            _note(notes, picture)
            asked += rows.make(picture, place, stores[split], rule, about, options["allow_missing_images"])
    place = functools.partial(_place, (*shares, options["seed"]))
    absent = ("test",) if config == "physionet" and "test" not in pictures else ()
    place = place if any(shares) else None
    return Questions(asked, stores, place, notes=notes, absent=absent, may_be_empty=True)


_NOTES = (
    "images in the tables",
    "images without a box, which nothing is asked about",
    "images where readers disagree whether there is anything",
)


def _note(notes: dict[str, int], picture: layout.Picture) -> None:
    for what, true in zip(_NOTES, (True, not picture.boxes, picture.normal and picture.boxes)):
        notes[what] += bool(true)


def _rule(options: Mapping[str, Any]) -> rows.Rule:
    readers, iou, fewest = options["readers"], options["merge_iou"], options["min_readers"]
    if readers not in READERS:
        raise DataError(f"readers is {readers!r}; expected {' or '.join(READERS)}")
    if not 0 < iou < 1:
        raise DataError(f"merge_iou is {iou}; expected between 0 and 1")
    if fewest < 1 or (fewest > 1 and readers == "each"):
        raise DataError(f"min_readers is {fewest}; expected at least 1, and more only with readers=merged")
    return rows.Rule(readers == "each", iou, fewest)


def _place(shares: tuple[float, float, int], row: Asked, digest: bytes) -> str:
    """By the image's content: copies under other names stay together."""
    return drawn_split(digest, *shares)
