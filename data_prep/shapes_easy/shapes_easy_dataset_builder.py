"""Pictures of shapes as a TFDS data set: drawn by `raw.py`, read as SLAKE is."""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from data_prep import files
from data_prep.shapes_easy.raw import SETTINGS_NAME, make_raw
from data_prep.slake.slake_dataset_builder import SlakeLayoutBuilder

__all__ = ["Builder", "make_raw"]


class Builder(SlakeLayoutBuilder):
    """Simple shapes. `manual_dir` is a folder made by `make_raw`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Run `python -m data_prep.build shapes_easy`: it draws its images."
    )
    _language = "en"

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=self._features(), license="Apache-2.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        generators = super()._split_generators(dl_manager)
        settings = pathlib.Path(dl_manager.manual_dir) / SETTINGS_NAME
        self.report["made_with"] = files.read_json(settings) if settings.is_file() else {}
        return generators
