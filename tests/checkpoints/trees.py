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


def tree(seed=0):
    rng = np.random.default_rng(seed)

    def f(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "img": {
            "pos_embedding": f(1, 16, 6),
            "head": {"kernel": f(6, 4), "bias": f(4)},
            "Transformer": {
                "encoderblock": {"LayerNorm_0": {"scale": f(3, 6)}, "mlp": {"kernel": f(3, 6, 8)}},
                "encoder_norm": {"scale": f(6)},
            },
        },
        "llm": {"embedder": {"input_embedding": f(11, 4)}, "layers": {"w": f(2, 5, 4)}},
    }
