"""VQA-Med 2019 as a TFDS data set, by the official split."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.questioned import QuestionedBuilder, Questions
from data_prep.datasets.vqa_med_2019 import layout
from paligemma_med.pp.rows import ACCEPTED


class Builder(QuestionedBuilder):
    """VQA-Med 2019. Needs the folder with the three released folders as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download VQA-Med 2019 (https://zenodo.org/records/10499039) and give the folder that holds " + layout.EXPECTED
    )
    FEATURES = ("content_type", ACCEPTED)
    TABLES = ("content_type",)
    HOMEPAGE = "https://zenodo.org/records/10499039"
    LICENSE = "CC BY 4.0"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return layout.read_folder(folder)
