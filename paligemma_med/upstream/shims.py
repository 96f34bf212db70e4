"""What big_vision @0127fb6 asks of JAX that today's no longer has, put back from outside.

Each shim names the line of big_vision it serves. Its checkout is never edited.
"""

import jax
import numpy as np


def apply():
    """All shims. Idempotent; to be called before big_vision is imported."""
    _positional_sharding()


def _positional_sharding():
    """jax.sharding.PositionalSharding, removed in JAX 0.6.

    big_vision/utils.py:1165: the barrier `sync` lays one number on each device with it.
    """
    if not hasattr(jax.sharding, "PositionalSharding"):
        jax.sharding.PositionalSharding = _one_axis


def _one_axis(devices):
    """A sharding of a vector, one part a device; all that `sync` uses of the class."""
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))
