"""Several processes of one run: how they start, and what they exchange.

JAX does the work: `jax.distributed` joins the processes, and collectives over all devices carry what
they exchange. This file holds the few functions that the programs need. With a single process they
work too, at no cost.

A function that is marked "collective" waits for all processes: every process must call it, in the
same order, from its main thread.
"""

import json
import os
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils

from paligemma_med.parallel import jax_private

# Nodes of a cluster may start minutes apart; a process still missing after this isn't coming.
START_TIMEOUT = 300
# How long a process may be silent before the others consider it dead and stop. Heartbeats come from
# a separate thread, so long steps or compilations don't silence it.
PEER_TIMEOUT = 60


# --- Starting ---


def define_flags() -> None:
    """The flags of every program that may run in several processes; read by `start`."""
    flags.DEFINE_string("coordinator_address", None, "host:port of process 0, for all processes.")
    flags.DEFINE_integer("num_processes", None, "How many processes run together; 1: none but this")
    flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
    flags.DEFINE_integer("start_timeout", START_TIMEOUT, "Seconds to wait for all to start.")
    flags.DEFINE_integer("peer_timeout", PEER_TIMEOUT, "Seconds of silence that mean death.")


def start_from_flags(**kw) -> None:
    """`start` with the flags of `define_flags`."""
    v = flags.FLAGS
    start(
        v.coordinator_address,
        v.num_processes,
        v.process_id,
        start_timeout=v.start_timeout,
        peer_timeout=v.peer_timeout,
        **kw,
    )


def start(
    coordinator=None,
    num_processes=None,
    process_id=None,
    *,
    start_timeout=START_TIMEOUT,
    peer_timeout=PEER_TIMEOUT,
    awaits_sigterm=True,
) -> None:
    """Joins the processes of this run. Call it once, before any other use of JAX.

    Missing arguments are read from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID; the rest
    is left to JAX's own detection if a scheduler (SLURM, Open MPI, an indexed Kubernetes job, a TPU
    pod) reports more than one task. Otherwise, or with num_processes=1, nothing is started or awaited.

    awaits_sigterm: SIGTERM then ends no process by itself but becomes a notice to all of them, which
    must ask for it (`interrupts.Signals`).

    Raises:
      ValueError: a setup that can't work. If the others don't come, JAX aborts the process.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "JAX_PROCESS_ID")
    nothing_said = (coordinator or None, num_processes, process_id) == (None, None, None)
    if num_processes == 1 or (nothing_said and not _many_tasks()):
        return
    _check(coordinator, num_processes, process_id)
    jax.config.update("jax_enable_preemption_service", awaits_sigterm)
    # Printed first, since JAX aborts a process that waits in vain or loses another one.
    which = "" if process_id is None else f"process {process_id} of {num_processes}: "
    where = f" at {coordinator}" if coordinator else ""
    print(
        f"{which}waiting for the other processes of this run{where}, for {start_timeout} s. Should "
        f"one of them end later, this one stops within {peer_timeout} s; the same command resumes the run.",
        file=sys.stderr,
        flush=True,
    )
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=peer_timeout,
        )
    except ValueError as e:
        raise ValueError(
            f"{e} JAX found no scheduler that says it: give --coordinator_address, "
            "--num_processes and --process_id (or --num_processes=1 for a run on its own)."
        ) from None
    _meet()


def _meet():
    """A first collective while all processes are here: CPU connections are made at the first one, and
    fail if another process gets there 30 s later, as it may after compiling something large."""
    count = jax.device_count()
    if jax.process_count() > 1:
        mesh = jax.make_mesh((count,), ("all",))
        where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("all"))
        jax.block_until_ready(jax.jit(jnp.sum)(place(np.zeros(count, np.float32), where)))
        barrier("started")


def _number(value, variable):
    text = os.environ.get(variable)
    if value is not None or not text:
        return value
    if not re.fullmatch("[0-9]{1,9}", text):
        raise ValueError(f"{variable} is {text!r}; expected a whole number.")
    return int(text)


def _check(coordinator, num_processes, process_id):
    if coordinator and not re.fullmatch("[0-9]{1,5}", coordinator.rpartition(":")[2]):
        raise ValueError(f"--coordinator_address is {coordinator!r}; expected host:port.")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"--num_processes is {num_processes}; expected 1 or more.")
    if None not in (process_id, num_processes) and not 0 <= process_id < num_processes:
        raise ValueError(f"--process_id is {process_id} of {num_processes}; they count from 0.")
    if _many_tasks():  # JAX knows the rest.
        return
    names = ("--coordinator_address", "--num_processes", "--process_id")
    given = dict(zip(names, (coordinator, num_processes, process_id)))
    if missing := [k for k, v in given.items() if v is None]:
        found = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None)
        raise ValueError(f"{found} needs {' and '.join(missing)} too (or --num_processes=1).")


def _many_tasks():
    """Whether a scheduler that JAX knows started more than one task; True also if it doesn't say, so that
    JAX finds out."""
    env = os.environ
    if "SLURM_STEP_NODELIST" in env and "SLURM_PROCID" in env:
        # SLURM_NTASKS counts the job's tasks; an interactive shell in it is a step of one task.
        return int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS", 1)) > 1
    if "OMPI_COMM_WORLD_SIZE" in env:
        return int(env["OMPI_COMM_WORLD_SIZE"]) > 1
    if hosts := env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES"):
        return "," in hosts or int(env.get("MEGASCALE_NUM_SLICES") or 1) > 1
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return True
    return jax_private.is_cloud_tpu()


# --- Talking ---


def is_main() -> bool:
    """Whether this is the process that writes files and shows progress."""
    return jax.process_index() == 0


def to_host(tree) -> Any:
    """A tree of arrays → whole numpy arrays in every process. Collective.

    Arrays that this process has whole aren't sent; the rest is gathered from all devices.
    """
    return jax.tree.map(_to_host, tree)


def _to_host(x):
    if not isinstance(x, jax.Array) or x.is_fully_addressable:
        return np.asarray(x)
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0))
    return multihost_utils.process_allgather(x, tiled=True)


def place(array, sharding) -> jax.Array:
    """A numpy array that is the same in all processes → a jax.Array with that sharding.

    Each process copies its devices' parts to them; unlike `jax.device_put`, nothing is sent to compare
    the copies.
    """
    array = np.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def gather(value) -> list:
    """[value of process 0, of process 1, …] in every process, of JSON-able values. Collective.

    Numpy's scalars and arrays come back as numbers and lists, tuples as lists.
    """
    if jax.process_count() == 1:
        return [value]
    data = json.dumps(value, default=_plain).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    # Powers of two, so that few sizes are ever compiled.
    buffer = np.zeros(1 << max(8, int(lengths.max() - 1).bit_length()), np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(buffer)
    return [json.loads(row[:n].tobytes()) for row, n in zip(rows, lengths)]


def _plain(x):
    if isinstance(x, (np.generic, np.ndarray)):
        return x.tolist()
    raise TypeError(f"{type(x).__name__} can't be sent between processes.")


def broadcast(value) -> Any:
    """The value of process 0, in every process; values as in `gather`. Collective."""
    return gather(value if is_main() else None)[0]


def barrier(name) -> None:
    """Waits until all processes are here. Collective."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
