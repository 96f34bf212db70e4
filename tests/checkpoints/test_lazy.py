"""Arrays that are read when asked for."""

import jax
import ml_dtypes
import numpy as np
import pytest

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.lazy import Lazy


def counted(x):
    """(Lazy of x, list that grows with each read)."""
    reads = []

    def read():
        reads.append(1)
        return x.copy()

    return Lazy(x.shape, x.dtype, read), reads


def test_it_looks_like_an_array_and_is_read_when_asked_alone():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    leaf, reads = counted(x)
    assert (leaf.shape, np.shape(leaf), leaf.dtype) == ((2, 3), (2, 3), x.dtype)
    assert (leaf.ndim, leaf.size, leaf.nbytes) == (2, 6, 24)
    assert jax.tree.leaves({"a": leaf}) == [leaf]
    assert not reads
    np.testing.assert_array_equal(np.asarray(leaf), x)
    assert np.asarray(leaf, np.float16).dtype == np.float16
    assert len(reads) == 2  # nothing is kept
    with pytest.raises(ValueError, match="without a copy"):
        np.array(leaf, copy=False)


def test_stack_fills_one_array_and_holds_one_leaf():
    x = np.random.default_rng(0).normal(size=(4, 2, 3)).astype(ml_dtypes.bfloat16)
    leaves, reads = zip(*map(counted, x))
    stacked = lazy.stack(leaves)
    assert isinstance(stacked, Lazy) and not any(reads)
    assert (stacked.shape, stacked.dtype) == (x.shape, x.dtype)
    np.testing.assert_array_equal(np.asarray(stacked), x)
    mixed = lazy.stack([leaves[0], x[1]])
    np.testing.assert_array_equal(np.asarray(mixed), x[:2])
    assert isinstance(lazy.stack(list(x)), np.ndarray)


def test_stacking_unlike_types_promotes_as_numpy_does():
    out = lazy.stack([counted(np.ones(2, np.float32))[0], np.ones(2, np.float64)])
    assert out.dtype == np.float64


def test_derive_is_lazy_for_lazy_alone():
    x = np.arange(4.0)
    leaf, reads = counted(x)
    out = lazy.derive(leaf, (2,), lambda a: a[:2])
    assert out.shape == (2,) and not reads
    np.testing.assert_array_equal(np.asarray(out), x[:2])
    assert isinstance(lazy.derive(x, (2,), lambda a: a[:2]), np.ndarray)
