"""Weights whose files claim more than any memory holds."""

import json
import os

import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, orbax


@pytest.mark.parametrize("shape, chunks", [([10**15], [10**15]), ([4], [10**15]), ([2**40, 64], [1, 64])])
def test_arrays_of_big_vision(tmp_path, shape, chunks):
    """TensorStore would end the process."""
    folder = tmp_path / "checkpoint.bv-000000300"
    (folder / "params~img~x").mkdir(parents=True)
    about = dict(zarr_format=2, shape=shape, chunks=chunks, dtype="<f4", compressor=None, fill_value=0)
    (folder / "params~img~x" / ".zarray").write_text(json.dumps(about | dict(order="C", filters=None)))
    (folder / "params~img~x" / "0").write_bytes(bytes(64))
    says = r"img/x takes [\d,]+ bytes by what its file says; this machine has [\d,]+$"
    with pytest.raises(CheckpointError, match=says):
        checkpoints.load_params(str(folder))


def test_arrays_of_orbax(tmp_path, monkeypatch):
    orbax.save_orbax(tmp_path / "o", {"img": {"x": np.zeros(200, np.float32)}})
    leaf = orbax.open_orbax(tmp_path / "o")["img"]["x"]
    assert np.asarray(leaf).shape == (200,)
    monkeypatch.setattr(os, "sysconf", lambda name: 20)
    with pytest.raises(CheckpointError, match="img/x takes 800 bytes by what its file says; this machine has 400$"):
        np.asarray(leaf)
