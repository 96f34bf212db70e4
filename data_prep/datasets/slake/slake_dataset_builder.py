"""SLAKE 1.0 as a TFDS data set, from the released folder: configs `en`, `zh`, `all`; with boxes in the answers,
`en_detect` and `en_ground`; and the Chinese questions about the images of English train, `zh_of_en_train`.

Train within one language: over both, 142 of 180 test images are in train too.
"""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep.builders.vqa import Option
from data_prep.datasets.slake import grounding, languages, layout
from data_prep.datasets.slake.builder import SlakeLayoutBuilder


@dataclasses.dataclass
class SlakeConfig(tfds.core.BuilderConfig):
    """`language`: "en", "zh" or "all". `kind`: "" for the questions as released, or one of `_MADE`."""

    language: str = "en"
    kind: str = ""


_MADE = {
    "detect": grounding.detect,
    "ground": grounding.ground,
    "zh_of_en_train": languages.chinese_of_english_train,
}


class Builder(SlakeLayoutBuilder):
    """SLAKE 1.0. Needs the unpacked release as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        SlakeConfig(name="en", language="en", description="English questions"),
        SlakeConfig(name="zh", language="zh", description="Chinese questions"),
        SlakeConfig(name="all", language="all", description="Both; splits share images"),
        SlakeConfig(name="en_detect", kind="detect", description="'detect liver': its boxes; images split as in en"),
        SlakeConfig(name="en_ground", kind="ground", description="English answers followed by boxes"),
        SlakeConfig(
            name="zh_of_en_train",
            language="all",
            kind="zh_of_en_train",
            description="Chinese questions about the images of English train; train alone",
        ),
    ]
    OPTIONS = {
        "allow_missing_images": Option(False, "leave out rows whose image is missing or broken"),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Unpack SLAKE 1.0 (https://www.med-vqa.com/slake) and give the folder that holds " + layout.EXPECTED
    )

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        """Those that are made of the questions are built where they are asked for."""
        del folder
        return [config.name for config in cls.BUILDER_CONFIGS if not config.kind]

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        if "made" in report:
            return [*grounding.describe(report), *layout.describe_images(report)]
        if "taken_of_zh" in report:
            return [*languages.describe(report), *layout.describe_images(report)]
        return layout.describe(report)

    def _made_of(self, folder: layout.Folder) -> layout.Folder:
        kind = self.builder_config.kind
        return _MADE[kind](folder) if kind else folder

    @property
    def _language(self) -> str:
        return self.builder_config.language

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(
            features=self._features(),
            homepage="https://www.med-vqa.com/slake",
            license="CC BY 4.0",
        )
