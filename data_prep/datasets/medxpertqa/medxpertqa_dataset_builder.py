"""MedXpertQA's multimodal questions as a TFDS data set, for testing only."""

import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders.questioned import QuestionedBuilder, Questions
from data_prep.datasets.medxpertqa import layout


class Builder(QuestionedBuilder):
    """MedXpertQA MM. Needs the Hub's folder as `manual_dir`; the zip file of images can stay."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="one_image", description="The 1,581 questions about one image"),
        tfds.core.BuilderConfig(name="first_image", description="All 2,000, each with its first image"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get MedXpertQA (https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA) and give the folder that holds "
        + layout.EXPECTED
    )
    FEATURES = layout.FEATURES
    TABLES = ("content_type", "body_system", "medical_task", "images")
    HOMEPAGE = "https://huggingface.co/datasets/TsinghuaC3I/MedXpertQA"
    LICENSE = "MIT"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return layout.read_folder(folder, first_image=self.builder_config.name == "first_image")
