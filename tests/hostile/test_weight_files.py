"""Files of weights with damaged bytes or odd headers: read, or refused as a CheckpointError with the file's name."""

import io
import os
import random
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, bv, npz, orbax, peft
from tests.checkpoints import adapters
from tests.checkpoints.trees import tree
from tests.hostile import mutations

CASES = int(os.environ.get("HOSTILE_CASES", "50"))


def damage(path, read, cases=CASES, errors=CheckpointError):
    """Reads the file with a byte, a block or its end gone wrong; returns how often it was refused."""
    good, rng, refused = path.read_bytes(), random.Random(0), 0
    for i in range(cases):
        data = mutations.of_bytes(good, rng)
        path.write_bytes(data)
        try:
            read()
        except errors as e:
            refused += 1
            str(e).encode()
        except Exception as e:
            raise AssertionError(f"case {i}: {type(e).__name__}: {e!s:.300}") from e
    path.write_bytes(good)
    read()
    return refused


def test_npz(tmp_path):
    npz.save_npz(tmp_path / "w.npz", tree(), dtype="bfloat16")
    assert damage(tmp_path / "w.npz", lambda: checkpoints.load_params(tmp_path / "w.npz"))


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<f4', 'fortran_order': False, 'shape': (10**4,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (-3,), }",
        "{'descr': '<f4', 'fortran_order': 'no', 'shape': (3,), }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': 3, }",
        "{'descr': '<f4', 'fortran_order': False, 'shape': ('3',), }",
        "{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': '|b1', 'fortran_order': False, 'shape': (12,), }",
        "{'descr': '<i4', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '|O', 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<M8[s]', 'fortran_order': False, 'shape': (1,), }",
        "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (3,), }",
        "{'descr': '<f4'}",
        "[" * 3000,
        "9" * 5000,
        "",
    ],
    ids=lambda header: header[:60],
)
def test_headers_in_npz(tmp_path, header):
    path = tmp_path / "w.npz"
    with zipfile.ZipFile(path, "w") as archive:
        text = header.encode() + b"\n"
        entry = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + np.ones(3, np.float32).tobytes()
        archive.writestr("params/img/x.npy", entry)
    with pytest.raises(CheckpointError, match="w.npz.*img/x"):
        checkpoints.load_params(path)


def test_safetensors_of_an_adapter(tmp_path):
    peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa"))
    assert damage(tmp_path / "a" / peft.WEIGHTS, lambda: checkpoints.load_adapter(tmp_path / "a"), CASES // 5)


@pytest.mark.parametrize("dtype", [np.int8, np.bool_, np.float64, ml_dtypes.float8_e4m3fn])
def test_types_of_an_adapter(tmp_path, dtype):
    peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa"))
    path = tmp_path / "a" / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    key = next(iter(tensors))
    tensors[key] = tensors[key].astype(dtype)
    try:
        safetensors.numpy.save_file(tensors, path)
    except Exception:
        pytest.skip("this version of safetensors writes no such type")
    if dtype == np.float64:
        checkpoints.load_adapter(tmp_path / "a")
        return
    with pytest.raises(CheckpointError, match="adapter_model.safetensors"):
        checkpoints.load_adapter(tmp_path / "a")


def test_orbax(tmp_path):
    orbax.save_orbax(tmp_path / "o", {"img": {"x": np.ones((3, 4), np.float32)}})
    cases = max(4, CASES // 8)
    for path in sorted(p for p in (tmp_path / "o").rglob("*") if p.is_file()):
        damage(path, lambda: checkpoints.load_params(tmp_path / "o"), cases)


def test_big_vision(tmp_path):
    bv.save_bv(tmp_path / "checkpoint.bv", 1, {"params": {"img": {"x": np.ones((3, 4), np.float32)}}})
    for path in sorted(p for p in tmp_path.rglob("*") if p.is_file()):
        damage(path, lambda: checkpoints.load_params(tmp_path), errors=(CheckpointError, FileNotFoundError))


def test_an_archive_of_something_else(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("readme.txt", "hello")
        archive.writestr("../params/x.npy", b"x")
    (tmp_path / "w.npz").write_bytes(out.getvalue())
    with pytest.raises(CheckpointError, match="w.npz"):
        checkpoints.load_params(tmp_path / "w.npz")
