"""VQA-RAD as a TFDS data set: configs `public`, `trainset` and `trainset_no_test_frames`, from the released files.

Test images are in train too, by design of its authors; the build reports how many.
"""

import functools
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from data_prep import ledger
from data_prep.builders.vqa import Option, VqaBuilder, vqa_features
from data_prep.datasets.vqa_rad import layout
from data_prep.images import convert as images


class Builder(VqaBuilder):
    """VQA-RAD. Needs the folder of the OSF download, or of trainset.json, as `manual_dir`."""

    VERSION = tfds.core.Version("2.0.0")
    RELEASE_NOTES = {
        "1.0.0": "First version.",
        "2.0.0": "Rows of trainset.json have ids of their own, public_id and made_from; frames of test questions told.",
    }
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="public", description="The public JSON on OSF: 2,248 rows"),
        tfds.core.BuilderConfig(name="trainset", description="trainset.json and testset.json: 3,515 rows, with frames"),
        tfds.core.BuilderConfig(name=layout.NO_TEST_FRAMES, description="The same without frames of test questions"),
    ]
    OPTIONS = {
        "validate_fraction": Option(0.1, "share of train's images that becomes validate"),
        "allow_missing_images": Option(False, "leave out rows whose image is missing or broken"),
        "seed": Option(0, "of the draw of validate"),
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Download VQA-RAD (https://osf.io/89kps) and give the folder that holds " + layout.EXPECTED
    )

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        return layout.check_folder(folder)

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        return [name for name in cls.builder_configs if layout.question_file(folder, name)]

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        return [*ledger.describe(report), *layout.describe(report)]

    def _info(self) -> tfds.core.DatasetInfo:
        names = ("content_type", "phrase_type", "location", "case_id", "public_id", "made_from", *layout.PUBLIC_KEYS)
        return self.dataset_info_from_configs(
            features=vqa_features(**{name: tfds.features.Text() for name in names}),
            homepage="https://osf.io/89kps",
            license="CC0 1.0",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        folder = layout.read_folder(dl_manager.manual_dir, self.builder_config.name, **self.options)
        self.report = {"dataset": self.info.full_name, **folder.report}
        return {split: self._generate_examples(folder, split) for split in folder.rows}

    def _generate_examples(self, folder: layout.Folder, split: str) -> Any:
        @functools.lru_cache(maxsize=64)  # consecutive questions are often about the same image
        def content(image: str) -> bytes:
            return images.convert(folder.store.read(image), image)

        for row in folder.rows[split]:
            yield row.features["question_id"], dict(row.features, image=content(row.image))
