"""How a process of a run ends, whether alone or while others wait for it. Importing this needs no JAX."""

import os
import re
import sys
from typing import NoReturn

from paligemma_med.parallel import jax_private


def is_alone() -> bool:
    """Whether this run has a single process; unlike jax.process_count, starts no device."""
    jax = sys.modules.get("jax")  # without JAX imported, no other process was joined
    return jax is None or not jax.distributed.is_initialized()


def leave(status) -> NoReturn:
    """`sys.exit(status)`, but with several processes it doesn't wait for the others.

    At an orderly exit JAX waits until all processes get there. A process that fails alone would wait for
    others that are waiting for it.
    """
    if is_alone():
        sys.exit(status)
    if isinstance(status, str):
        print(f"{_this()}: {status}", file=sys.stderr)
    leave_at_once(status if isinstance(status, int) else 1)


def leave_at_once(status) -> NoReturn:
    """Ends this process without Python's own shutdown, in which XLA's threads can crash if a signal
    interrupted their compiling. Files must be closed before."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _this():
    index = jax_private.process_index()
    return "this process" if index is None else f"process {index}"


# What XLA's errors mention when another process is gone, on CPUs, GPUs and in the coordinator.
_LOST = re.compile(
    r"gloo|nccl|coordination|heartbeat|closed by peer|connection re|UNAVAILABLE|DEADLINE_EXCEEDED",
    re.IGNORECASE,
)
_told = False


def tell_if_peer_lost(error) -> bool:
    """Whether an error means that another process of this run is gone; if so, prints that to stderr once.

    Call it before anything that could wait for that process.
    """
    global _told
    if is_alone():
        return False
    lost_peer = sys.modules["jax"].errors.JaxRuntimeError
    causes, e = [], error
    while e is not None:
        causes.append(e)
        e = e.__cause__ or e.__context__
    lost = [e for e in causes if isinstance(e, lost_peer) and _LOST.search(str(e))]
    if not lost:
        return False
    if not _told:
        print(
            f"{_this()}: error: another process of this run has ended or can't "
            "be reached, so this one stops too. Start all of them again with the same command: "
            "training resumes from its newest checkpoint. "
            f"({str(lost[-1]).splitlines()[0][:200]})",
            file=sys.stderr,
            flush=True,
        )
        _told = True
    return True
