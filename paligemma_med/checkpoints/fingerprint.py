"""A number for the contents of an array, computed on the array's own devices.

It detects damaged checkpoints, since compressed files with a flipped bit can be read without an error, and
weights that differ from those that a run started from. It is a sum of integers, so it doesn't depend on how
an array is cut over devices and processes, and costs one read of the array. It protects against accidents,
not against attacks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Odd numbers, one per dimension (and one for the total): a permutation changes the fingerprint too.
_STRIDES = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)


def of_leaves(tree: Any) -> list[str]:
    """Fingerprints of the leaves of `tree`, in the order of `jax.tree.leaves`.

    Args:
      tree: arrays with 8, 16, 32 or 64 bits per number, on any devices. All processes of a run must call
        this together.

    Returns:
      A list of strings of 16 hexadecimal digits.
    """
    # Leaf by leaf: trees differ, but their leaves share a few shapes, and each shape is compiled once.
    sums = [_sum(jnp.asarray(x)) for x in jax.tree.leaves(tree)]
    return [f"{a:08x}{b:08x}" for a, b in (np.asarray(s.addressable_data(0)).tolist() for s in sums)]


@jax.jit
def _sum(x):
    """uint32[2]: the sum of the bits, and the sum weighted by position."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # 64 bits, which only occur under JAX_ENABLE_X64, become two numbers on a new axis.
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    places = [
        jax.lax.broadcasted_iota(jnp.uint32, bits.shape, i) * jnp.uint32(stride)
        for i, stride in zip(range(bits.ndim), _STRIDES)
    ]
    weight = functools.reduce(jnp.add, places, jnp.uint32(1))
    # Odd weights: a change of any single number changes the product.
    weighted = bits * (weight * 2 + 1)
    return jnp.stack([jnp.sum(bits, dtype=jnp.uint32), jnp.sum(weighted, dtype=jnp.uint32)])
