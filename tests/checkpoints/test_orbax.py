"""Orbax checkpoints: exact, restorable by plain Orbax, whatever wrote them, one leaf at a time."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from paligemma_med.checkpoints import CheckpointError, lazy, orbax
from paligemma_med.models.leaves import flatten_tree
from tests import environ
from tests.checkpoints.trees import assert_same

BF16 = np.dtype(ml_dtypes.bfloat16)


def tree(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "img": {"head": {"kernel": rng.integers(0, 2**16, (5, 7), np.uint16).view(BF16)}},
        "llm": {
            "w": rng.normal(size=(3, 4, 2)).astype(np.float32),
            "half": rng.normal(size=9).astype(np.float16),
            "count": np.arange(3, dtype=np.int32),
        },
    }


def test_round_trip_is_exact_and_lazy(tmp_path):
    orbax.save_orbax(tmp_path / "w", tree())
    opened = orbax.open_orbax(tmp_path / "w")
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), opened) == jax.tree.map(lambda x: (x.shape, x.dtype), tree())
    assert_same(opened, tree())
    assert os.listdir(tmp_path) == ["w"]


def test_plain_orbax_restores_it(tmp_path):
    orbax.save_orbax(tmp_path / "w", tree())
    assert_same(ocp.StandardCheckpointer().restore(tmp_path / "w"), tree())
    target = jax.tree.map(jnp.asarray, tree())
    restored = ocp.StandardCheckpointer().restore(tmp_path / "w", target)
    assert all(isinstance(x, jax.Array) for x in jax.tree.leaves(restored))
    assert_same(restored, tree())


def test_what_plain_orbax_writes_is_read(tmp_path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", jax.tree.map(jnp.asarray, tree()))
        checkpointer.save(tmp_path / "state", {"params": tree(), "step": {"n": np.ones(1)}})
    assert_same(orbax.open_orbax(tmp_path / "w"), tree())
    assert_same(orbax.open_orbax(tmp_path / "state"), tree())


def test_what_several_devices_wrote_is_read_by_one(tmp_path):
    code = f"""
import jax, orbax.checkpoint as ocp, jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
assert len(jax.devices()) == 4
mesh = Mesh(jax.devices(), ("data",))
x = jax.device_put(jnp.arange(24.0).reshape(8, 3), NamedSharding(mesh, PartitionSpec("data")))
with ocp.StandardCheckpointer() as c:
    c.save({str(tmp_path / "w")!r}, {{"a": {{"b": x}}}})
"""
    env = environ.of_program(devices=4)
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    opened = orbax.open_orbax(tmp_path / "w")
    out = np.asarray(opened["a"]["b"])
    assert type(out) is np.ndarray
    np.testing.assert_array_equal(out, np.arange(24.0).reshape(8, 3))


def test_dtype_casts_floats_alone(tmp_path):
    orbax.save_orbax(tmp_path / "w", tree(), dtype="bfloat16")
    out = orbax.open_orbax(tmp_path / "w")
    assert out["llm"]["count"].dtype == np.int32 and out["llm"]["w"].dtype == BF16
    np.testing.assert_array_equal(out["llm"]["w"], tree()["llm"]["w"].astype(BF16))


def test_leaves_are_read_one_at_a_time_and_progress_counts_them(tmp_path):
    alive, most, done = [0], [0], []

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive[0] -= 1

    def watched(x):
        def read():
            out = Counted(x.shape, x.dtype)
            out[...] = x
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return out

        return lazy.Lazy(x.shape, x.dtype, read)

    orbax.save_orbax(tmp_path / "w", jax.tree.map(watched, tree()), progress=done.append)
    assert sum(done) == sum(x.nbytes for x in jax.tree.leaves(tree()))
    assert most[0] <= 2
    assert_same(orbax.open_orbax(tmp_path / "w"), tree())


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        orbax.save_orbax(tmp_path / "w", tree(), progress=interrupt)
    assert not any(tmp_path.iterdir())


def test_existing_folders(tmp_path):
    orbax.save_orbax(tmp_path / "w", tree())
    with pytest.raises(FileExistsError, match="exists"):
        orbax.save_orbax(tmp_path / "w", tree(1))
    orbax.save_orbax(tmp_path / "w", tree(1), overwrite=True)
    assert_same(orbax.open_orbax(tmp_path / "w"), tree(1))
    (tmp_path / "other").mkdir()
    with pytest.raises(FileExistsError, match="holds no _METADATA"):
        orbax.save_orbax(tmp_path / "other", tree(), overwrite=True)


def test_folders_that_are_none_or_damaged(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        orbax.open_orbax(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="empty is not a readable Orbax checkpoint"):
        orbax.open_orbax(tmp_path / "empty")
    # One leaf: where several fail at once, TensorStore's answers outlive Orbax's event loop.
    orbax.save_orbax(tmp_path / "w", {"a": np.ones(3)})
    manifest = tmp_path / "w" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:10])
    with pytest.raises(CheckpointError, match="is not a readable Orbax checkpoint") as e:
        lazy.read_all(orbax.open_orbax(tmp_path / "w"))
    assert "\n" not in str(e.value)


def test_only_arrays_are_written(tmp_path):
    with pytest.raises(CheckpointError, match="a: expected an array of numbers"):
        orbax.save_orbax(tmp_path / "w", {"a": "text"})
    assert not any(tmp_path.iterdir())
