"""SLAKE 1.0 as a TFDS data set: configs `en`, `zh`, `all`, from the released folder.

Train within one language: over both, 142 of 180 test images are in train too.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep.builders.vqa import VqaBuilder, boxes_feature, vqa_features
from data_prep.datasets.slake import layout as slake_layout


@dataclasses.dataclass
class SlakeConfig(tfds.core.BuilderConfig):
    """`language`: "en", "zh" or "all"."""

    language: str = "en"


class SlakeLayoutBuilder(VqaBuilder, skip_registration=True):
    """What SLAKE and data sets in its layout have in common. Subclasses give `_language`."""

    @property
    def _language(self) -> str:
        raise NotImplementedError

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return slake_layout.check_folder(folder)

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        return slake_layout.describe(report)

    def _features(self) -> tfds.features.FeaturesDict:
        keys = ("content_type", "base_type", "q_lang", "location", "modality")
        return vqa_features(**{k: tfds.features.Text() for k in keys}, boxes=boxes_feature())

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = slake_layout.read_folder(dl_manager.manual_dir, self._language)
        self.report = {"dataset": self.info.full_name, **folder.report}
        return {split: self._generate_examples(folder, split) for split in folder.rows}

    def _generate_examples(self, folder: slake_layout.Folder, split: str) -> Any:
        yield from slake_layout.examples(folder, split)


class Builder(SlakeLayoutBuilder):
    """SLAKE 1.0. Needs the unpacked release as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        SlakeConfig(name="en", language="en", description="English questions"),
        SlakeConfig(name="zh", language="zh", description="Chinese questions"),
        SlakeConfig(name="all", language="all", description="Both; splits share images"),
    ]
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Unpack SLAKE 1.0 (https://www.med-vqa.com/slake) and give the folder that holds " + slake_layout.EXPECTED
    )

    @property
    def _language(self) -> str:
        return self.builder_config.language

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=self._features(),
            homepage="https://www.med-vqa.com/slake",
            license="CC BY 4.0",
        )
