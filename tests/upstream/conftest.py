"""Tests beside big_vision: skipped, with the reason, where it isn't found.

TensorFlow and big_vision change a process for good (sys.modules, JAX's settings), so tests marked
`big_vision` run what needs them through `run_python`, in a process of its own.
"""

import pathlib
import subprocess
import sys

import pytest

from paligemma_med import upstream
from tests import environ

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def pytest_collection_modifyitems(items):
    marked = [item for item in items if item.get_closest_marker("big_vision")]
    if marked and (why := upstream.missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="session")
def run_python():
    """run(*argv, timeout=600, devices=1, **env): `python *argv` from the root of the repository on
    that many CPU devices. Gives its stdout; a failure shows both streams."""

    def run(*argv, timeout=600, devices=1, **env):
        env = environ.of_program(devices, TF_CPP_MIN_LOG_LEVEL="2", **env)
        done = subprocess.run(
            [sys.executable, *map(str, argv)],
            cwd=ROOT,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not done.returncode, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def tfrecord_data(tmp_path_factory):
    """A TFDS folder with the phantoms of `tiny_data`, as TensorFlow reads them."""
    from data_prep import build
    from tests import tiny

    pytest.importorskip("google_crc32c")
    folder = tmp_path_factory.mktemp("tfrecord")
    build.build("phantom", data_dir=folder, num_images=tiny.NUM_IMAGES, file_format="tfrecord")
    return folder
