"""MedICaT as a TFDS data set: captions, or questions made from them, split by article."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import Release
from data_prep.builders.questioned import drawn_split
from data_prep.builders.vqa import Option
from data_prep.datasets.medicat import layout


class Builder(CaptionedBuilder):
    """MedICaT. Needs the release's folder as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Ask for MedICaT (https://github.com/allenai/medicat) and give the folder that holds " + layout.EXPECTED
    )
    OPTIONS = CaptionedBuilder.OPTIONS | {
        "radiology_only": Option(False, "leave out figures that the release doesn't mark as radiology."),
        "validate_fraction": Option(0.05, "share of articles that becomes validate."),
        "test_fraction": Option(0.05, "share of articles that becomes test."),
        "seed": Option(0, "of the draw of validate and test."),
    }
    FEATURES = layout.FEATURES
    TABLES = ("radiology", "predicted_type", "licence")
    HOMEPAGE = "https://github.com/allenai/medicat"
    LICENSE = "each figure has its article's licence; for research, non-commercial"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    def read_release(self, folder: pathlib.Path) -> Release:
        shares = self.options["validate_fraction"], self.options["test_fraction"], self.options["seed"]
        drawn_split("", *shares)
        return layout.read_folder(folder, shares, self.options["radiology_only"])
