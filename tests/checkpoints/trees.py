"""Comparing trees of weights, for the tests of every form they are kept in."""

import numpy as np

from paligemma_med.models.leaves import flatten_tree


def assert_same(a, b):
    """Same names, dtypes, shapes and bits; leaves may still be in their files."""
    a, b = flatten_tree(a), flatten_tree(b)
    assert a.keys() == b.keys()
    for key in a:
        x, y = np.asarray(a[key]), np.asarray(b[key])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), key
        assert x.tobytes() == y.tobytes(), key
