"""What big_vision @0127fb6 asks of JAX that today's no longer has, put back from outside; and one
fault of its own, without whose mending its figures can't be read.

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


def number_metrics(writer):
    """Rows of big_vision_metrics.txt get the number of their own step. Idempotent.

    big_vision/utils.py:1289: a thread writes the row, and takes the number when it gets to it, from
    the loop that has gone on: step 50 was seen as 55. Here the loop waits for the thread.

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
