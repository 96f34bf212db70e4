"""Which rows of a batch this process loads, and onto which devices they go."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.parallel import sharding as sharding_lib


def batch_sharding(mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    """Batches cut along the mesh axis "data"; without a mesh, whole on the first local device."""
    if mesh is None:
        return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return sharding_lib.batch_sharding(mesh)


def shards(mesh: jax.sharding.Mesh | None) -> int:
    """Into how many parts a batch is cut."""
    return 1 if mesh is None else sharding_lib.batch_sharding(mesh).mesh.shape[sharding_lib.DATA_AXIS]


def check_batch_size(batch_size: Any, mesh: jax.sharding.Mesh | None, what: str) -> int:
    """`batch_size`; InputError, which calls it `what`, if the mesh can't divide it evenly."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise InputError(f"{what}={batch_size!r}: expected a positive whole number")
    axis, parts = sharding_lib.DATA_AXIS, shards(mesh)
    if batch_size % parts:
        down = batch_size // parts * parts
        raise InputError(
            f"{what}={batch_size} doesn't divide by the {parts} shards of the mesh axis "
            f'"{axis}"; use {f"{down} or " if down else ""}{down + parts}'
        )
    return batch_size


def process_share(sharding: jax.sharding.Sharding, batch_size: int) -> tuple[int, int]:
    """(p, n): this process's devices need the p-th of n equal contiguous pieces of a batch.

    This is read off the sharding and not the process index: the order of devices in a mesh is JAX's
    choice, and processes that differ only along another axis need the same rows.
    """
    slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    bounds = sorted({s[0].indices(batch_size)[:2] for s in slices})
    low, high = bounds[0][0], bounds[-1][1]
    size = high - low
    covered = sum(stop - start for start, stop in bounds)
    if covered != size or batch_size % size or low % size:
        raise InputError(
            f"the devices of this process hold rows {bounds} of a batch of {batch_size}, expected "
            'one contiguous piece; put the axis "data" first in config.mesh'
        )
    return low // size, batch_size // size


def put(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding, batch_size: int) -> dict[str, jax.Array]:
    """The global batch, of which `batch` is this process's piece."""
    return {
        k: jax.make_array_from_process_local_data(sharding, _own(v), (batch_size, *v.shape[1:]))
        for k, v in batch.items()
    }


def _own(array):
    """A copy of what a worker has put into shared memory, an array type of Grain's. JAX would hold on to that memory,
    which is scarce, until Python collects garbage, and at the end of a program Python warns of leaked memory."""
    return array if type(array) is np.ndarray else np.array(array)
