"""PathVQA as a TFDS data set, by the official split: as released, or without repeated questions as on the Hub."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.questioned import QuestionedBuilder, Questions
from data_prep.datasets.pathvqa import layout


class Builder(QuestionedBuilder):
    """PathVQA. Needs the official images and questions as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="official", description="All 32,795 questions"),
        tfds.core.BuilderConfig(name="without_repeats", description="The 32,632 of the Hub's copy"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get PathVQA (https://github.com/UCSD-AI4H/PathVQA) and give the folder that holds " + layout.EXPECTED
    )
    FEATURES = layout.FEATURES
    TABLES = ("content_type",)
    HOMEPAGE = "https://github.com/UCSD-AI4H/PathVQA"
    LICENSE = "MIT by the repository; the images are from textbooks and a digital library"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return layout.read_folder(folder, without_repeats=self.builder_config.name == "without_repeats")
