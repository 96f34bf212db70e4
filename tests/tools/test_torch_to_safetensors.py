"""Pickles become safetensors with the same bits; no code of theirs is run, and what is wrong is one sentence."""

import os

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch

from paligemma_med.checkpoints import CheckpointError
from tools import torch_to_safetensors

BF16 = np.dtype(ml_dtypes.bfloat16)


def state():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=rng)
    return {
        "a.weight": x,
        "a.half": x.to(torch.float16),
        "a.brain": x.to(torch.bfloat16),
        "a.transposed": x.T,  # not contiguous
        "a.part": x[1:, 1],
        "a.scalar": torch.tensor(0.5),
        "a.param": torch.nn.Parameter(x + 1),
    }


def assert_written(path):
    found = safetensors.numpy.load_file(path)
    assert found.keys() == state().keys()
    for name, x in state().items():
        want = x.detach().float().numpy().astype(BF16) if x.dtype == torch.bfloat16 else x.detach().numpy()
        assert found[name].dtype == want.dtype and found[name].shape == want.shape
        np.testing.assert_array_equal(found[name], want)


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("inside", [(), ("model",), ("state_dict",), ("module",), ("model", "module")], ids="/".join)
def test_weights_keep_their_bits(tmp_path, inside, new):
    whole = state()
    for key in reversed(inside):
        whole = {key: whole, "epoch": 3}
    src, dst = str(tmp_path / "w.pth"), str(tmp_path / "out" / "w.safetensors")
    torch.save(whole, src, _use_new_zipfile_serialization=new)
    assert torch_to_safetensors.convert(src, dst) == (7, [])
    assert_written(dst)


def test_what_is_no_weight_is_told(tmp_path):
    src, dst = str(tmp_path / "w.bin"), str(tmp_path / "w.safetensors")
    torch.save({**state(), "ids": torch.arange(3), "step": 5, "name": "x"}, src)
    assert torch_to_safetensors.convert(src, dst) == (7, ["ids", "step", "name"])
    assert_written(dst)
    with pytest.raises(FileExistsError, match="w.safetensors exists; pass --overwrite"):
        torch_to_safetensors.convert(src, dst)
    torch_to_safetensors.convert(src, dst, overwrite=True)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize(
    "content, says",
    [
        ({"x": Evil()}, "can't be read as weights alone, without running code of the file"),
        (b"no pickle", "can't be read as weights alone"),
        ([1, 2], "holds a list, expected a dict of tensors"),
        ({"model": {"ids": torch.arange(2)}}, "holds no tensors of floats, but ids"),
    ],
)
def test_bad_files(tmp_path, monkeypatch, content, says):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "w.pth").write_bytes(content)
    else:
        torch.save(content, "w.pth")
    with pytest.raises(CheckpointError, match=f"w.pth.*{says}") as e:
        torch_to_safetensors.convert("w.pth", "w.safetensors")
    assert "\n" not in str(e.value)
    assert os.listdir() == ["w.pth"]


def test_bad_arguments(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file /none.pth"):
        torch_to_safetensors.convert("/none.pth", str(tmp_path / "w.safetensors"))
    with pytest.raises(CheckpointError, match=r"expected a name that ends in \.safetensors"):
        torch_to_safetensors.convert("/none.pth", str(tmp_path / "w"))
