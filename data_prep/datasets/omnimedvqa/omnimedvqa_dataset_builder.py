"""OmniMedVQA as a TFDS data set: the open and the restricted part, with options or as open questions."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from data_prep.builders.questioned import ALLOW_MISSING, Asked, QuestionedBuilder, Questions, drawn_split
from data_prep.builders.vqa import Option
from data_prep.datasets.omnimedvqa import layout


@dataclasses.dataclass
class OmniMedVqaConfig(tfds.core.BuilderConfig):
    """`part`: a key of `layout.PARTS`. `open_ended`: questions without their options."""

    part: str = "open_access"
    open_ended: bool = False


class Builder(QuestionedBuilder):
    """OmniMedVQA. Needs the unpacked release as `manual_dir`; its images may stay in a zip file."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        OmniMedVqaConfig(name="open_access", description="Questions with two to four options"),
        OmniMedVqaConfig(name="open_access_open", open_ended=True, description="The same as open questions"),
        OmniMedVqaConfig(name="restricted", part="restricted", description="Images from each source by request"),
        OmniMedVqaConfig(
            name="restricted_open", part="restricted", open_ended=True, description="The same as open questions"
        ),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get OmniMedVQA (https://huggingface.co/datasets/foreverbeliever/OmniMedVQA) and give the folder with "
        + layout.EXPECTED
    )
    OPTIONS = {
        "allow_missing_images": ALLOW_MISSING,
        "validate_fraction": Option(0.05, "share of images that becomes validate."),
        "test_fraction": Option(0.2, "share of images that becomes test; 1 for all, as the release is meant."),
        "seed": Option(0, "of the draw of validate and test."),
    }
    FEATURES = layout.FEATURES
    TABLES = ("content_type", "modality", "dataset")
    HOMEPAGE = "https://huggingface.co/datasets/foreverbeliever/OmniMedVQA"
    LICENSE = "each source data set's"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        return [c.name for c in cls.BUILDER_CONFIGS if layout.part_files(folder, c.part)]

    def read_questions(self, folder: pathlib.Path) -> Questions:
        shares = self.options["validate_fraction"], self.options["test_fraction"], self.options["seed"]
        drawn_split("", *shares)  # refuses shares that can't be, before anything is read
        store = layout.open_images(folder)
        rows = layout.read_part(folder, self.builder_config.part, self.builder_config.open_ended, store)
        return Questions(list(rows), {"images": store}, place=functools.partial(_place, shares))


def _place(shares: tuple[float, float, int], row: Asked, digest: bytes) -> str:
    """By the image's content: copies under other names stay together."""
    return drawn_split(digest, *shares)
