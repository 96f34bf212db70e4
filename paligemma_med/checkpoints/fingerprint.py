"""A number for the contents of an array, computed on the array's own devices.

It detects damaged checkpoints, since compressed files with a flipped bit can be read without an error, and
weights that differ from those that a run started from. It is a sum of integers, so it doesn't depend on how
an array is cut over devices and processes, and costs one read of the array. It protects against accidents,
not against attacks.

The sum is made piece by piece: the integers of a whole array would take twice its memory, or more, and that
beside the weights of a run that may just fit.
"""

import functools
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from paligemma_med.models import lean
from paligemma_med.models.leaves import flatten_tree

# Odd numbers, one per dimension (and one for the total): a permutation changes the fingerprint too.
_STRIDES = (0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1, 0xD3A2646D)
_PIECE = 2**20  # numbers that are added at a time


def of_leaves(tree: Any) -> list[str]:
    """Fingerprints of the leaves of `tree`, in the order of `jax.tree.leaves`.

    Args:
      tree: arrays with 8, 16, 32 or 64 bits per number, on any devices. All processes of a run must call
        this together.

    Returns:
      A list of strings of 16 hexadecimal digits.
    """
    leaves = [jnp.asarray(x) for x in jax.tree.leaves(tree)]
    # Leaf by leaf: trees differ, but their leaves share a few shapes, and each shape is compiled once.
    sums = [[_sum(shard.data, _first(shard)) for shard in _shards(x)] for x in leaves]
    zero = np.zeros(2, np.uint32)  # as is their sum, overflow included
    totals = np.asarray([sum(jax.device_get(parts), zero) for parts in sums], np.uint32).reshape(-1, 2)
    if jax.process_count() > 1:
        whole = multihost_utils.process_allgather(totals).sum(axis=0, dtype=np.uint32)
        # An array of this process alone, such as one read into numpy, is in each of them: one is counted.
        is_own = np.array([x.is_fully_addressable for x in leaves], bool)[:, None]
        totals = np.where(is_own, totals, whole)
    return [f"{a:08x}{b:08x}" for a, b in totals.tolist()]


def of_params(params: Any) -> str:
    """A digest of all parameters (a nested tree) and their names, in 32 hexadecimal digits. Collective."""
    flat = flatten_tree(params)
    names = sorted(flat)
    prints = of_leaves([flat[n] for n in names])
    return hashlib.sha256(json.dumps([names, prints]).encode()).hexdigest()[:32]


def temporary_bytes(leaf: jax.ShapeDtypeStruct) -> int:
    """Memory beside a leaf, or a device's part of one, that its fingerprint takes."""
    compiled = _sum.lower(leaf, jax.ShapeDtypeStruct((len(leaf.shape),), jnp.uint32)).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def _shards(x):
    """The parts of an array that this process holds, of copies only one in all processes."""
    return [shard for shard in x.addressable_shards if shard.replica_id == 0 and shard.data.size]


def _first(shard):
    """uint32[axes]: where a part begins in its array."""
    first = np.asarray([s.start or 0 for s in shard.index], np.uint32)
    return jax.device_put(first, shard.device)


@functools.partial(lean.jit, static_argnames="piece", large=0)
def _sum(x, first, piece=_PIECE):
    """uint32[2] of a part of an array that begins at `first`: the sum of the bits, and the sum weighted by
    position."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    shape = x.shape
    # As a matrix, whose last axis stays as it is: on a TPU another one would be a copy.
    x = x.reshape(-1, shape[-1] if shape else 1)
    columns = min(piece, x.shape[1])
    size = min(max(1, piece // columns), x.shape[0]), columns
    counts = [-(-n // m) for n, m in zip(x.shape, size)]

    def add(i, total):
        # The last piece of an axis ends with it; what the one before has counted weighs nothing.
        wanted = [jnp.uint32(j * m) for j, m in zip(divmod(i, counts[1]), size)]
        starts = [jnp.minimum(s, n - m) for s, n, m in zip(wanted, x.shape, size)]
        places = [s + jnp.arange(m, dtype=jnp.uint32) for s, m in zip(starts, size)]
        row, column = (p >= s for p, s in zip(places, wanted))
        bits = _bits(jax.lax.dynamic_slice(x, starts, size))
        bits = jnp.where((row[:, None] & column)[..., None], bits, 0)
        weight = _weights(shape, first, *places, bits.shape[-1])
        return total + jnp.stack([jnp.sum(b, dtype=jnp.uint32) for b in (bits, bits * weight)])

    return jax.lax.fori_loop(0, math.prod(counts), add, jnp.zeros(2, jnp.uint32))


def _bits(x):
    """uint32[rows, columns, n]: 64 bits, which only occur under JAX_ENABLE_X64, become two numbers."""
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)
    return bits.reshape(*x.shape, -1)


def _weights(shape, first, rows, columns, parts):
    """uint32[rows, columns, n], odd: a change of any single number changes the product."""
    places = []
    for size in reversed(shape[:-1]):
        places.append((rows % size)[:, None, None])
        rows = rows // size
    places = [*reversed(places), *([columns[:, None]] if shape else [])]
    places = [p + first[i] for i, p in enumerate(places)]
    if parts > 1:
        places.append(jnp.arange(parts, dtype=jnp.uint32))
    weight = jnp.uint32(1)
    for place, stride in zip(places, _STRIDES):
        weight = weight + place * jnp.uint32(stride)
    return weight * 2 + 1
