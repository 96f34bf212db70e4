"""MIMIC-CXR as a TFDS data set: chest X-rays with parts of their reports, by the official split."""

import functools
import os
import pathlib

import tensorflow_datasets as tfds

from data_prep.builders import reports
from data_prep.builders.questioned import ALLOW_MISSING, Again, QuestionedBuilder, Questions
from data_prep.builders.vqa import Option
from data_prep.datasets.mimic_cxr import layout
from data_prep.images import store as image_store


class Builder(QuestionedBuilder):
    """MIMIC-CXR. Needs MIMIC-CXR-JPG's folder, with the sectioned reports in it, as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    OPTIONS = {
        "allow_missing_images": ALLOW_MISSING,
        "target": reports.TARGET,
        "frontal_only": Option(False, "leave out images whose view isn't AP or PA."),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get access to MIMIC-CXR (https://physionet.org/content/mimic-cxr-jpg/) and give the folder that holds "
        + layout.EXPECTED
    )
    FEATURES = layout.FEATURES
    TABLES = ("view",)
    HOMEPAGE = "https://physionet.org/content/mimic-cxr-jpg/"
    LICENSE = "PhysioNet Credentialed Health Data License"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    def read_questions(self, folder: pathlib.Path) -> Questions:
        return read_questions(folder, self.options)


def read_questions(folder: pathlib.Path, options) -> Questions:
    """The rows, which are read anew each time."""
    reports.check_target(options["target"])
    store = image_store.open_store(folder / "files")
    rows = Again(functools.partial(layout.rows, folder, options["target"], options["frontal_only"]))
    return Questions(rows, {"files": store}, captions=True)
