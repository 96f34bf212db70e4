"""Fingerprints change with any number, and with nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.checkpoints import fingerprint


def of(x):
    (print_,) = fingerprint.of_leaves([x])
    return print_


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5)])
def test_any_flipped_bit_changes_it(dtype, shape):
    rng = np.random.default_rng(0)
    x = np.asarray(rng.integers(0, 2, shape) if dtype == "bool" else rng.normal(0, 9, shape) ** 2)
    x = x.astype(jnp.dtype(dtype))
    before = of(x)
    raw = bytearray(x.tobytes())
    for bit in {0, 8 * len(raw) - x.dtype.itemsize * 8, *(rng.integers(0, 8 * len(raw), 20))}:
        if dtype == "bool" and bit % 8:
            continue
        changed = bytearray(raw)
        changed[bit // 8] ^= 1 << (bit % 8)
        assert of(np.frombuffer(bytes(changed), x.dtype).reshape(shape)) != before
    assert of(x.copy()) == before


def test_order_counts_and_devices_do_not():
    x = np.arange(64, dtype=np.float32).reshape(16, 4)
    swapped = x.copy()
    swapped[[3, 11]] = x[[11, 3]]
    assert of(swapped) != of(x) != of(x.T.copy())
    mesh = jax.make_mesh((8,), ("data",))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert of(jax.device_put(x, cut)) == of(x)


def test_leaves_in_order():
    a, b = np.ones(3, np.float32), np.zeros(2, np.float32)
    assert fingerprint.of_leaves({"x": a, "y": b}) == [of(a), of(b)]
    assert fingerprint.of_leaves({}) == []
