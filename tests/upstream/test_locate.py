"""Where big_vision is found, what is said where it isn't, and our modules under its names."""

import multiprocessing.pool
import re
import sys
import time
import tomllib

import pytest

from paligemma_med import upstream
from paligemma_med.upstream import shims, train
from tests.upstream.conftest import ROOT

CODE = """
import importlib, sys
from paligemma_med import upstream
before = list(sys.path)
folder = upstream.install()
assert upstream.install() == folder and len(sys.path) <= len(before) + 1
assert sum(isinstance(f, upstream._Aliases) for f in sys.meta_path) == 1
import big_vision.utils as u
u.sync()
for alias, ours in upstream.ALIASES.items():
    there, here = importlib.import_module(alias), importlib.import_module(ours)
    assert there is here and here.__spec__.name == ours, alias
import big_vision.models as models
assert models.paligemma_med.load
try:
    importlib.import_module("big_vision.models.no_such")
except ModuleNotFoundError as e:
    print("refused", e.name)
"""


@pytest.fixture
def no_big_vision(monkeypatch):
    """As on a machine without it."""
    monkeypatch.delenv("BIG_VISION_DIR", raising=False)
    monkeypatch.delitem(sys.modules, "big_vision", raising=False)
    real = upstream.importlib.util.find_spec
    hide = lambda name, *a: None if name == "big_vision" else real(name, *a)  # noqa: E731
    monkeypatch.setattr(upstream.importlib.util, "find_spec", hide)


def test_without_it_one_sentence_says_how_to_get_it(no_big_vision):
    with pytest.raises(ValueError) as e:
        upstream.install()
    text = str(e.value)
    assert "BIG_VISION_DIR isn't set" in text and upstream.COMMIT in text
    assert "github.com/google-research/big_vision" in text and "paligemma_med[big-vision]" in text
    assert text.count("\n") == 0 and upstream.missing() == text and not upstream.found()


def test_a_folder_that_is_no_checkout_is_named(no_big_vision, monkeypatch, tmp_path):
    monkeypatch.setenv("BIG_VISION_DIR", str(tmp_path))
    with pytest.raises(ValueError, match=f"{tmp_path}.*holds no big_vision"):
        upstream.locate()


def test_a_checkout_without_its_libraries_tells_which(no_big_vision, monkeypatch, tmp_path):
    (tmp_path / "big_vision").mkdir()
    (tmp_path / "big_vision" / "utils.py").touch()
    monkeypatch.setenv("BIG_VISION_DIR", str(tmp_path))
    monkeypatch.setattr(upstream, "REQUIRED", ("os", "no_such_library"))
    assert upstream.locate() == str(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("BIG_VISION_DIR", f"~/{tmp_path.name}")
    assert upstream.locate() == str(tmp_path)
    with pytest.raises(ValueError, match="needs no_such_library: pip install"):
        upstream.install()


def test_the_extra_that_is_named_brings_what_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    packages = {re.split("[>=]", p)[0] for p in project["optional-dependencies"]["big-vision"]}
    needed = {"tensorflow-cpu" if name == "tensorflow" else name for name in upstream.REQUIRED}
    assert packages == needed | {"google-crc32c"}  # with which data_prep writes tfrecord


def test_an_importable_one_counts_before_the_folder(monkeypatch, tmp_path):
    package = tmp_path / "site" / "big_vision"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.delitem(sys.modules, "big_vision", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("BIG_VISION_DIR", "/no/such")
    assert upstream.locate() == str(tmp_path / "site")


def test_a_clone_in_the_working_directory_is_no_package(monkeypatch, tmp_path):
    """Python takes ~/big_vision for a namespace where the home directory is on its path."""
    clone = tmp_path / "big_vision"
    (clone / "big_vision").mkdir(parents=True)
    for name in ("__init__.py", "utils.py"):
        (clone / "big_vision" / name).touch()
    monkeypatch.delitem(sys.modules, "big_vision", raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delenv("BIG_VISION_DIR", raising=False)
    assert upstream.importlib.util.find_spec("big_vision").origin is None
    with pytest.raises(ValueError, match="can't be imported"):
        upstream.locate()
    monkeypatch.setenv("BIG_VISION_DIR", str(clone))
    assert upstream.locate() == str(clone)


def test_the_program_ends_with_that_sentence(no_big_vision):
    with pytest.raises(SystemExit, match="^error: .*BIG_VISION_DIR isn't set: clone"):
        train.start()


def test_the_shim_lays_one_number_on_each_device():
    import jax
    import numpy as np

    shims.apply()
    shims.apply()
    sharding = jax.sharding.PositionalSharding(jax.devices())
    x = jax.device_put(np.arange(jax.device_count()), sharding)
    assert [int(s.data[0]) for s in x.addressable_shards] == list(range(jax.device_count()))
    assert [s.device for s in x.addressable_shards] == jax.devices()


def test_rows_of_metrics_keep_their_number():
    """A writer as big_vision's, whose thread is slow to take the number."""

    class Writer:
        def __init__(self):
            self.pool, self.fname, self.rows = multiprocessing.pool.ThreadPool(1), "x", []

        def step_end(self):
            def write():
                time.sleep(0.02)
                self.rows.append(self.step)

            self.pool.apply_async(write)

    def rows():
        writer = Writer()
        for writer.step in (1, 2, 3):
            writer.step_end()
        writer.pool.close()
        writer.pool.join()
        return writer.rows

    assert rows() == [3, 3, 3]
    shims.number_metrics(Writer)
    shims.number_metrics(Writer)
    assert rows() == [1, 2, 3]


@pytest.mark.big_vision
def test_our_modules_go_by_its_names(run_python):
    assert "refused big_vision.models.no_such" in run_python("-c", CODE)
