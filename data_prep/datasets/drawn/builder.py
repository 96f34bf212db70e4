"""What the drawn data sets (phantom, shapes, shapes_easy, shapes_words) share as TFDS builders."""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from data_prep import files
from data_prep.datasets.slake.builder import SlakeLayoutBuilder


class DrawnBuilder(SlakeLayoutBuilder, skip_registration=True):
    """Reads a folder that `drawn.make_raw` made, and keeps in the report how it was drawn.

    Subclasses set SETTINGS_NAME, the file of the settings in that folder.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    SETTINGS_NAME: str
    _language = "en"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=self._features(), license="Apache-2.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        generators = super()._split_generators(dl_manager)
        settings = pathlib.Path(dl_manager.manual_dir) / self.SETTINGS_NAME
        self.report["made_with"] = files.read_json(settings) if settings.is_file() else {}
        return generators
