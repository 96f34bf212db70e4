"""The data set that tests of the input read, built once."""

import shutil

import pytest
import tensorflow_datasets as tfds

from tests.input_pipeline.tiny_vqa import TinyVqa


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyVqa(data_dir=folder, config="en", file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    # An older version, that sorts after the newer one as text.
    shutil.copytree(folder / "tiny_vqa" / "en" / "1.10.0", folder / "tiny_vqa" / "en" / "1.9.0")
    return folder


@pytest.fixture
def data(data_dir):
    return {"name": "tiny_vqa/en", "split": "train", "data_dir": str(data_dir)}
