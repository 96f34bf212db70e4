"""A connector for tests: the mean of each 2×2 square of the tower's tokens, and a linear layer.

with pool.known(): vlm.Model(…, connector=dict(kind="pool of tests", factor=2))
"""

import contextlib
import math

import flax.linen as nn
import jax.numpy as jnp

from paligemma_med.models import connector, leaves


class Pool(nn.Module):
    """See `connector.Connector`."""

    LEAVES = (leaves.Leaf("proj/kernel", "DE", "D"), leaves.Leaf("proj/bias", "E", role="bias"))

    width: int
    dtype: str
    lora: tuple
    factor: int

    @property
    def leaves(self):
        return self.LEAVES

    @nn.compact
    def __call__(self, x, *, train=False, capture_attention=False):
        batch, patches, width = x.shape
        n = math.isqrt(patches) // self.factor
        x = x.reshape(batch, n, self.factor, n, self.factor, width).mean((2, 4))
        return nn.Dense(self.width, dtype=self.dtype, name="proj")(x.reshape(batch, n * n, width)), {}

    @staticmethod
    def tokens(kw, patches):
        return patches // kw["factor"] ** 2

    @staticmethod
    def slots(kw, patches):
        return {}

    @staticmethod
    def weighted(slots):
        return {}

    @staticmethod
    def to_cells(kw, shares, out, rule):
        n, factor = math.isqrt(shares.shape[-1]), kw["factor"]
        x = jnp.asarray(shares).reshape(*shares.shape[:-1], n, 1, n, 1) / factor**2
        x = jnp.broadcast_to(x, (*shares.shape[:-1], n, factor, n, factor))
        return x.reshape(*shares.shape[:-1], -1)


@contextlib.contextmanager
def known():
    """Makes the kind "pool of tests" known."""
    connector.KINDS["pool of tests"] = Pool
    try:
        yield
    finally:
        del connector.KINDS["pool of tests"]
