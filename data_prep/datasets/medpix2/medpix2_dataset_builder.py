"""MedPix 2.0 as a TFDS data set: CT and MR images with their cases, by the official split."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import Release
from data_prep.datasets.medpix2 import cases


class Builder(CaptionedBuilder):
    """MedPix 2.0. Needs the release's folder as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get MedPix 2.0 (https://github.com/CHILab1/MedPix-2.0) and give the folder that holds " + cases.EXPECTED
    )
    FEATURES = cases.FEATURES
    TABLES = ("modality", "plane", "location", "location_category", "content_type")
    HOMEPAGE = "https://github.com/CHILab1/MedPix-2.0"
    LICENSE = "as MedPix, https://medpix.nlm.nih.gov"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return cases.check_folder(folder)

    @classmethod
    def read_release(cls, folder: pathlib.Path) -> Release:
        return cases.read_folder(folder)
