"""ROCOv2 as a TFDS data set: radiological images of articles with captions, or questions."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import Release
from data_prep.datasets.roco import layout as roco_layout


class Builder(CaptionedBuilder):
    """ROCOv2. Needs the release's folder as `manual_dir`; zip files of images can stay."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download ROCOv2 (https://doi.org/10.5281/zenodo.10821435) and give the folder that holds "
        + roco_layout.EXPECTED_V2
    )
    FEATURES = roco_layout.FEATURES
    TABLES = roco_layout.TABLES
    HOMEPAGE = "https://doi.org/10.5281/zenodo.10821435"
    LICENSE = "CC BY-NC-SA 4.0; each image has its article's licence"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return roco_layout.check_v2(folder)

    @classmethod
    def read_release(cls, folder: pathlib.Path) -> Release:
        return roco_layout.read_v2(folder)
