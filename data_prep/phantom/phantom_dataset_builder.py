"""The phantoms as a TFDS data set: drawn by `raw.py`, read by the reader of SLAKE's layout."""

import pathlib
from typing import Any

import tensorflow_datasets as tfds

from data_prep import files, slake_layout
from data_prep.phantom.raw import SETTINGS_NAME, make_raw
from data_prep.slake.slake_dataset_builder import slake_features
from data_prep.vqa_builder import VqaBuilder

__all__ = ["Builder", "make_raw"]


class Builder(VqaBuilder):
    """Radiology phantoms. `manual_dir` is a folder made by `make_raw`."""

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Run `python -m data_prep.build phantom`: it draws its images."

    def _info(self) -> tfds.core.DatasetInfo:
        return self.dataset_info_from_configs(features=slake_features(), license="Apache-2.0")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = slake_layout.read_folder(dl_manager.manual_dir, "en")
        settings = pathlib.Path(dl_manager.manual_dir) / SETTINGS_NAME
        made_with = files.read_json(settings) if settings.is_file() else None
        self.report = {"dataset": "phantom", "made_with": made_with, **folder.report}
        return {split: self._generate_examples(folder, split) for split in folder.rows}

    def _generate_examples(self, folder: slake_layout.Folder, split: str) -> Any:
        yield from slake_layout.examples(folder, split)
