"""PMC-VQA as a TFDS data set: configs `v1`, `v2` with options, `v1_open`, `v2_open` without."""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep import ledger
from data_prep.builders import row_file
from data_prep.builders.vqa import Option, VqaBuilder, vqa_features
from data_prep.datasets.pmc_vqa import release
from data_prep.images import convert as images
from data_prep.images.store import Store
from paligemma_med.pp.rows import ANSWER_LETTER, CHOICES


@dataclasses.dataclass
class PmcVqaConfig(tfds.core.BuilderConfig):
    """`release`: "v1" or "v2" (TFDS uses the name `version`). `blank`: questions without options."""

    release: str = "v1"
    blank: bool = False


class Builder(VqaBuilder):
    """PMC-VQA. `manual_dir` holds the tables and images of one release or of both."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        PmcVqaConfig(name="v1", release="v1", description="227K questions with four options"),
        PmcVqaConfig(name="v2", release="v2", description="Subfigures, with their captions"),
        PmcVqaConfig(name="v1_open", release="v1", blank=True, description="v1 without options"),
        PmcVqaConfig(name="v2_open", release="v2", blank=True, description="v2 without options"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Get PMC-VQA (https://huggingface.co/datasets/xmcmic/PMC-VQA) and give the folder with "
        f"{release.EXPECTED}; the zip files needn't be unpacked."
    )
    CAN_BEAM = True
    OPTIONS = {
        "images": Option(None, "folder or zip file of the images, if not next to the tables."),
        "allow_missing_images": Option(False, "leave out rows whose image is missing or broken."),
        "validate_fraction": Option(0.02, "share of train that becomes validate, by article."),
        "shuffle_choices": Option(False, "put the options of each question in a random order."),
        "seed": Option(0, "for the validation set and shuffled options."),
        "test_clean": Option(False, "v1: test is test_clean.csv, which the authors checked."),
    }

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return release.check_folder(folder)

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        there = release.versions_in(folder)
        return [c.name for c in cls.BUILDER_CONFIGS if c.release in there]

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        return ledger.describe(report)

    def _info(self) -> tfds.core.DatasetInfo:
        keys = (*CHOICES, ANSWER_LETTER, "caption")
        texts = {k: tfds.features.Text() for k in (*keys, "paper_id")}
        return self.dataset_info_from_configs(
            features=vqa_features(**texts),
            homepage="https://huggingface.co/datasets/xmcmic/PMC-VQA",
            license="CC BY-SA 4.0 according to the Hub; each figure has its article's licence",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        made = release.read_release(
            dl_manager.manual_dir,
            self.builder_config.release,
            blank=self.builder_config.blank,
            options=self.options,
            work_dir=pathlib.Path(dl_manager.download_dir) / "rows",
            cache_dir=self.cache_dir,
        )
        self.report = {"dataset": self.info.full_name, **made.report}
        example = functools.partial(_example, made.images)
        return {
            split: row_file.generate(rows, example, f"writing {split}", self.beam) for split, rows in made.rows.items()
        }

    def _generate_examples(self, *args: Any) -> Any:
        raise NotImplementedError("Rows come from _split_generators.")


def _example(store: Store, row: dict[str, str]) -> tuple[str, dict[str, Any]]:
    image = images.convert_checked(store.read(row["image_id"]), row["image_id"])
    return row["question_id"], {**row, "image": image}
