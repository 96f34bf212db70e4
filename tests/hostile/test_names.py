"""Folders and files of any name: what shells, globs, config arguments, home folders, Orbax and TensorStore mind."""

import os

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import checkpoints, input_pipeline
from paligemma_med.checkpoints import CheckpointError, bv, npz, orbax, workdir
from tests import tiny

NAMES = (
    "~",
    "~root",
    "cohort [2]",  # Orbax takes it for a pattern
    "[0-9]*?",
    "a\\b",  # TensorStore writes below "a/b"
    "a, b=1:c@2%41#x",
    "{x}$HOME'\"`&;|<>!",
    "肺 e\u0301\u2028\u202e\n\t",
    "-w",
    "not UTF-8: \udcff",
)
TREE = {"img": {"a": np.arange(6, dtype=np.float32).reshape(2, 3)}, "llm": {"b": np.ones(2, np.float32)}}


@pytest.fixture(params=NAMES)
def folder(request, tmp_path):
    path = tmp_path / request.param
    path.mkdir()
    yield path
    assert [p.name for p in tmp_path.iterdir()] == [request.param]  # nothing was written elsewhere


def test_a_run_is_saved_and_restored(folder):
    trained, opt_state = {"a": jnp.arange(6.0).reshape(2, 3)}, {"m": jnp.ones(3)}
    with workdir.Checkpoints(folder / "run") as ckpt:
        ckpt.save(2, trained, opt_state, {"next": 3})
    with workdir.Checkpoints(folder / "run") as ckpt:
        step, weights, _, notes = ckpt.restore_newest(trained, opt_state)
    assert (step, notes) == (2, {"next": 3}) and os.listdir(folder / "run" / "checkpoints") == ["2"]
    np.testing.assert_array_equal(weights["a"], trained["a"])


def test_weights_of_every_form_are_written_and_read(folder):
    npz.save_npz(folder / "w.npz", TREE)
    orbax.save_orbax(folder / "o", TREE)
    bv.save_bv(folder / "checkpoint.bv", 7, {"params": TREE, "opt": {}, "chrono": {}})
    for spec in ("w.npz", "o", "checkpoint.bv"):
        tiny.assert_trees_equal(checkpoints.load_params(os.path.join(folder, spec)), TREE)
    part = checkpoints.load_params(os.path.join(folder, "w.npz:img"))
    np.testing.assert_array_equal(part["a"], TREE["img"]["a"])


def test_data_are_read(folder, tiny_data):
    os.symlink(tiny_data, folder / "data")
    data = dict(name="phantom", split="validate[:3]", data_dir=str(folder / "data"))
    if "\udcff" in str(folder):
        with pytest.raises(ValueError, match="isn't UTF-8; rename"):
            input_pipeline.open_source(data)
    else:
        assert len(input_pipeline.open_source(data)) == 3 and input_pipeline.open_source(data)[2]["question"]


def test_a_save_is_read_back_before_it_counts(tmp_path):
    trained = {"a": jnp.arange(6.0)}
    with workdir.Checkpoints(tmp_path, keep=2) as ckpt:
        ckpt.save(1, trained, {})
        ckpt.wait()
        ckpt.save(2, trained, {})
        ckpt._manager.wait_until_finished()
        os.remove(tmp_path / "checkpoints" / "2" / "trained" / "manifest.ocdbt")
        with pytest.raises(CheckpointError, match="could not be written: .* Those of steps .1. are intact") as e:
            ckpt.save(3, trained, {})
        assert "\n" not in str(e.value)
