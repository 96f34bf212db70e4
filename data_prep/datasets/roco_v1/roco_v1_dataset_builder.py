"""ROCO v1 as a TFDS data set. The paper's "ROCO v2.0" is this one, by the ids in its files."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import Release
from data_prep.datasets.roco import layout as roco_layout


class Builder(CaptionedBuilder):
    """ROCO v1, radiology. Needs its repository, or MedM's captions, with the images."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Clone https://github.com/razorx89/roco-dataset, fetch the images with its script, and "
        f"give the folder that holds {roco_layout.EXPECTED_V1}"
    )
    FEATURES = roco_layout.FEATURES
    TABLES = roco_layout.TABLES
    HOMEPAGE = "https://github.com/razorx89/roco-dataset"
    LICENSE = "each image has its article's licence"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return roco_layout.check_v1(folder)

    @classmethod
    def read_release(cls, folder: pathlib.Path) -> Release:
        return roco_layout.read_v1(folder)
