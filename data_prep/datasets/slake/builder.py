"""The TFDS builder that SLAKE and data sets in its layout have in common."""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep.builders.vqa import VqaBuilder, boxes_feature, vqa_features
from data_prep.datasets.slake import layout


class SlakeLayoutBuilder(VqaBuilder, skip_registration=True):
    """The builder of SLAKE and of data sets in its layout. Subclasses define `_language`."""

    @property
    def _language(self) -> str:
        raise NotImplementedError

    def _made_of(self, folder: layout.Folder) -> layout.Folder:
        """The rows to build of those that were read."""
        return folder

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        return layout.describe(report)

    def _features(self) -> tfds.features.FeaturesDict:
        keys = ("content_type", "base_type", "q_lang", "location", "modality")
        return vqa_features(**{k: tfds.features.Text() for k in keys}, boxes=boxes_feature())

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = self._made_of(layout.read_folder(dl_manager.manual_dir, self._language, **self.options))
        self.report = {"dataset": self.info.full_name, **folder.report}
        return {split: self._generate_examples(folder, split) for split in folder.rows}

    def _generate_examples(self, folder: layout.Folder, split: str) -> Any:
        yield from layout.examples(folder, split)
