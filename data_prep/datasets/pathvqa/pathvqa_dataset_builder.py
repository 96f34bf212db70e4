"""PathVQA as a TFDS data set, by the official split: as released, without repeats, or of the Hub's own files."""

import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from data_prep.builders.questioned import QuestionedBuilder, Questions
from data_prep.datasets.pathvqa import hub, layout


class Builder(QuestionedBuilder):
    """PathVQA. Needs the official images and questions, or the Hub's Parquet files, as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="official", description="All 32,795 questions"),
        tfds.core.BuilderConfig(name="without_repeats", description="The 32,632 of the Hub's copy"),
        tfds.core.BuilderConfig(name="hub", description="The Hub's copy itself, from its Parquet files"),
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

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        official = ["official", "without_repeats"] if layout.is_official(folder) else []
        return [*official, *(["hub"] if hub.is_there(folder) else [])]

    def read_questions(self, folder: pathlib.Path) -> Questions:
        if self.builder_config.name == "hub":
            return layout.read_hub(folder)
        return layout.read_folder(folder, without_repeats=self.builder_config.name == "without_repeats")
