"""SLAKE 1.0 as a TFDS data set: configs `en`, `zh`, `all`, from the released folder.

Train within one language: over both, 142 of 180 test images are in train too.
"""

import dataclasses

import tensorflow_datasets as tfds

from data_prep.builders.vqa import Option
from data_prep.datasets.slake import layout
from data_prep.datasets.slake.builder import SlakeLayoutBuilder


@dataclasses.dataclass
class SlakeConfig(tfds.core.BuilderConfig):
    """`language`: "en", "zh" or "all"."""

    language: str = "en"


class Builder(SlakeLayoutBuilder):
    """SLAKE 1.0. Needs the unpacked release as `manual_dir`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        SlakeConfig(name="en", language="en", description="English questions"),
        SlakeConfig(name="zh", language="zh", description="Chinese questions"),
        SlakeConfig(name="all", language="all", description="Both; splits share images"),
    ]
    OPTIONS = {
        "allow_missing_images": Option(False, "leave out rows whose image is missing or broken"),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Unpack SLAKE 1.0 (https://www.med-vqa.com/slake) and give the folder that holds " + layout.EXPECTED
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
