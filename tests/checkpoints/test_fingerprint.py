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


@pytest.mark.parametrize(
    "dtype, expected",
    [("float32", "8090000012d00000"), ("bfloat16", "00278090749712d0"), ("int8", "00001850d8ebc20e")],
)
def test_values_are_those_of_earlier_versions(dtype, expected):
    """Runs that they began are resumed by them."""
    x = (np.arange(2 * 3 * 4 * 5) % 17 - 3).reshape(2, 3, 4, 5)
    assert of(x.astype(jnp.dtype(dtype))) == expected


@pytest.mark.parametrize("shape", [(), (0,), (1000,), (7, 131), (3, 2, 5, 41), (257, 1)])
@pytest.mark.parametrize("piece", [1, 64, 100])
def test_pieces_of_any_size_give_the_same(shape, piece, monkeypatch):
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    bits = np.asarray(x).view(np.uint16).astype(np.uint64)
    places = np.indices(shape, np.uint64) if shape else np.zeros((0, 1), np.uint64)
    weight = 1 + sum(p * np.uint64(s) for p, s in zip(places, fingerprint._STRIDES))
    sums = np.sum(bits), np.sum(bits * ((2 * weight + 1) % 2**32))
    sums = [int(s) % 2**32 for s in sums]
    found = fingerprint._sum(x, np.zeros(len(shape), np.uint32), piece=piece).tolist() if x.size else [0, 0]
    assert found == sums and of(x) == "{:08x}{:08x}".format(*sums)


@pytest.mark.parametrize("axes", [("a",), (None, "b"), ("b", None, "a"), (("a", "b"),), ()])
def test_cut_in_any_way(axes):
    x = np.random.default_rng(0).normal(size=(16, 8, 6)).astype(np.float32)
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))
    assert of(jax.device_put(x, cut)) == of(x)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_costs_less_memory_than_one_leaf(dtype, optimised):
    """A 3B model's, as integers, took 22 GiB. Asked of the compiler; nothing is allocated."""
    leaf = jax.ShapeDtypeStruct((18, 2, 256, 1024), dtype)
    first = jax.ShapeDtypeStruct((4,), "uint32")
    found = fingerprint._sum.lower(leaf, first, piece=2**16).compile().memory_analysis()
    assert found.temp_size_in_bytes < 0.2 * leaf.size * leaf.dtype.itemsize


def test_arrays_that_each_process_has_for_itself_count_once(monkeypatch):
    """Weights read into numpy are in every process of a run."""
    x = np.arange(6, dtype=np.float32)
    alone = fingerprint.of_leaves([x])
    monkeypatch.setattr(fingerprint.jax, "process_count", lambda: 2)
    monkeypatch.setattr(fingerprint.multihost_utils, "process_allgather", lambda totals: np.stack([totals, totals]))
    assert fingerprint.of_leaves([x]) == alone
