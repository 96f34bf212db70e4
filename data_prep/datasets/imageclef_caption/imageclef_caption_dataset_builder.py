"""ImageCLEFmedical Caption as a TFDS data set: captions, or questions made from them, by the organisers' split."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.captioned import CaptionedBuilder
from data_prep.builders.figures import Release
from data_prep.datasets.imageclef_caption import layout


class Builder(CaptionedBuilder):
    """ImageCLEFmedical Caption of one year. Needs that year's folder as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Register at https://www.imageclef.org and give the folder of one year that holds " + layout.EXPECTED
    )
    FEATURES = layout.FEATURES
    TABLES = layout.TABLES
    HOMEPAGE = "https://www.imageclef.org/2023/medical/caption"
    LICENSE = "by the challenge's agreement; each image has its article's licence"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    @classmethod
    def read_release(cls, folder: pathlib.Path) -> Release:
        return layout.read_folder(folder)
