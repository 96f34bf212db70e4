"""Restores what big_vision @0127fb6 needs and today's JAX no longer has, and fixes one of its own bugs
that makes its figures unreadable.

Each shim names the line of big_vision that needs it. The checkout itself is never edited.
"""

import jax
import numpy as np


def apply() -> None:
    """Applies all shims. Idempotent; call it before big_vision is imported."""
    _positional_sharding()


def _positional_sharding():
    """jax.sharding.PositionalSharding, removed in JAX 0.6.

    big_vision/utils.py:1165: the barrier `sync` uses it to put one number on each device.
    """
    if not hasattr(jax.sharding, "PositionalSharding"):
        jax.sharding.PositionalSharding = _one_axis


def _one_axis(devices):
    """A sharding of a vector with one part per device, which is all that `sync` uses of the class."""
    mesh = jax.sharding.Mesh(np.asarray(devices), ("devices",))
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("devices"))


def number_metrics(writer) -> None:
    """Gives each row of big_vision_metrics.txt the number of its own step. Idempotent.

    big_vision/utils.py:1289: a thread writes the row and reads the step's number only then, when the
    loop may already be further: step 50 appeared as 55. Here the loop waits for the thread.

    Args:
      writer: big_vision.utils.BigVisionMetricWriter, the class.
    """
    step_end = writer.step_end
    if getattr(step_end, "waits", False):
        return

    def step_end_and_wait(self):
        step_end(self)
        if getattr(self, "fname", None):  # only one process writes
            self.pool.apply(int)  # the pool has one thread, which has then written

    step_end_and_wait.waits = True
    writer.step_end = step_end_and_wait
