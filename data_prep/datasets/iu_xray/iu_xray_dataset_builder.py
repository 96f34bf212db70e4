"""IU X-Ray as a TFDS data set: chest X-rays with parts of their reports, a row an image."""

import os
import pathlib
from collections.abc import Sequence

import tensorflow_datasets as tfds

from data_prep import files
from data_prep.builders import reports
from data_prep.builders.questioned import ALLOW_MISSING, Asked, QuestionedBuilder, Questions, drawn_split
from data_prep.builders.vqa import Option
from data_prep.datasets.iu_xray import layouts
from data_prep.files import DataError
from data_prep.images import store as image_store


class Builder(QuestionedBuilder):
    """IU X-Ray. Needs the folder of one of its three layouts, or of several, as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="openi", description="Open-i's XML reports; a drawn split"),
        tfds.core.BuilderConfig(name="kaggle", description="Kaggle's tables, which tell the views; a drawn split"),
        tfds.core.BuilderConfig(name="r2gen", description="R2Gen's studies, findings and split"),
    ]
    OPTIONS = {
        "allow_missing_images": ALLOW_MISSING,
        "target": reports.TARGET,
        "frontal_only": Option(False, "kaggle: leave out lateral views, so that most studies have one row."),
        "validate_fraction": Option(0.1, "openi, kaggle: share of studies that becomes validate."),
        "test_fraction": Option(0.2, "openi, kaggle: share of studies that becomes test."),
        "seed": Option(0, "of the draw of validate and test."),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get IU X-Ray (https://openi.nlm.nih.gov/faq) and give the folder with "
        + "; or ".join(layouts.EXPECTED.values())
    )
    FEATURES = ("content_type", "study_id", "view", *layouts.PARTS)
    TABLES = ("view",)
    HOMEPAGE = "https://openi.nlm.nih.gov/faq"
    LICENSE = "CC BY-NC-ND 4.0"

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        expected = "; or ".join(layouts.EXPECTED.values())
        folder = files.given_folder(folder, expected)
        if not cls.configs_in(folder):
            hint = files.did_you_mean(folder, cls.configs_in)
            raise DataError(f"{folder}: no reports found; expected {expected}{hint}")
        return folder

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        return [c for c in layouts.CONFIGS if layouts.is_there(folder, c)]

    def read_questions(self, folder: pathlib.Path) -> Questions:
        config, target = self.builder_config.name, self.options["target"]
        reports.check_target(target)
        if config == "r2gen" and target != "findings":
            raise DataError(f"target is {target!r}, but R2Gen's file has findings only; expected --target=findings")
        if self.options["frontal_only"] and config != "kaggle":
            raise DataError(f"frontal_only: {config} doesn't tell the views; expected config kaggle")
        return read_questions(folder, config, self.options)


def read_questions(folder: pathlib.Path, config: str, options) -> Questions:
    """A row for each image of each study, and a dropped one for a study without images."""
    shares = options["validate_fraction"], options["test_fraction"], options["seed"]
    drawn_split("", *shares)
    store = image_store.open_store(layouts.image_path(folder, config))
    asked, studies = [], 0
    for study in layouts.read(folder, config):
        studies += 1
        asked += _rows(study, study.split or drawn_split(study.study_id, *shares), options)
    return Questions(asked, {"images": store}, notes={"studies read": studies}, may_be_empty=config != "r2gen")


def _rows(study: layouts.Study, split: str, options) -> list[Asked]:
    question, answer = reports.asked(study.parts, options["target"])
    flags = ("words removed from the report, XXXX",) if "XXXX" in answer else ()
    groups = reports.groups(study.study_id, answer)
    rows = []
    for number, (image, view) in enumerate(study.images or (("", ""),)):
        features = {
            **study.parts,
            "question_id": f"{study.study_id}_{number}",
            "image_id": image or study.study_id,
            "question": question,
            "answer": answer,
            "answer_type": "OPEN",
            "content_type": options["target"].capitalize(),
            "study_id": study.study_id,
            "view": view,
        }
        dropped = f"no {options['target']}" if not answer else ""
        if options["frontal_only"] and view != "Frontal" and not dropped and image:
            dropped = "not a frontal view"
        rows.append(Asked(split, "images", _inside(image, study.where), features, dropped, flags, groups))
    return rows


def _inside(image: str, where: str) -> str:
    """The image's name. DataError: it would leave its folder."""
    if image:
        try:
            files.path_inside("images", image)
        except DataError as e:
            raise DataError(f"{where}: image: {e}") from None
    return image
