"""PMC-OA as a TFDS data set: captions, split by article."""

import functools
import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from data_prep.builders.questioned import ALLOW_MISSING, Again, QuestionedBuilder, Questions, drawn_split
from data_prep.builders.vqa import Option
from data_prep.datasets.pmc_oa import layout
from data_prep.images import store as image_store


class Builder(QuestionedBuilder):
    """PMC-OA. Needs the folder with its lines and images as `manual_dir`; the zip file can stay."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="split_captions", description="pmc_oa.jsonl: captions of subfigures"),
        tfds.core.BuilderConfig(name="whole_captions", description="pmc_oa_beta.jsonl: of whole figures"),
    ]
    OPTIONS = {
        "allow_missing_images": ALLOW_MISSING,
        "validate_fraction": Option(0.01, "share of articles that becomes validate."),
        "test_fraction": Option(0.01, "share of articles that becomes test."),
        "seed": Option(0, "of the draw of validate and test."),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get PMC-OA (https://huggingface.co/datasets/axiong/pmc_oa) and give the folder that holds " + layout.EXPECTED
    )
    FEATURES = layout.FEATURES
    HOMEPAGE = "https://huggingface.co/datasets/axiong/pmc_oa"
    LICENSE = "each figure has its article's licence"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        return layout.configs_in(folder)

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return read_questions(folder, self.builder_config.name, self.options)


def read_questions(folder: pathlib.Path, config: str, options) -> Questions:
    """The rows, which are read anew each time."""
    shares = options["validate_fraction"], options["test_fraction"], options["seed"]
    drawn_split("", *shares)
    store = image_store.open_store(layout.image_path(folder), by_name=True)
    rows = Again(functools.partial(layout.rows, folder, config, shares))
    return Questions(rows, {"images": store}, may_be_empty=True, captions=True)
