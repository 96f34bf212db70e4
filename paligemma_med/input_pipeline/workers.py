"""The processes or threads that make batches ahead of their use, by Grain.

Worker processes (`num_workers` > 0) are started afresh ("spawn"), never forked from a process in
which JAX has threads. A program that asks for them must therefore guard its entry point
(`if __name__ == "__main__": app.run(main)`): each worker imports the main module again. They leave
accelerators alone, and hand batches back through shared memory (`/dev/shm` must hold a few batches;
give docker `--shm-size`). With `num_workers=0` a few threads do the same work.
"""

import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable

import grain
from absl import flags

from paligemma_med.input_pipeline.errors import InputError

# Seconds that a worker keeps running after SIGTERM.
_LAST_BATCHES = 60


def _worker_init(index: int, count: int) -> None:
    del index, count
    # A worker imports the main module, and JAX with it; it must not take GPU memory or a TPU.
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Ctrl-C reaches the whole group. The main process decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Schedulers send SIGTERM to all processes of a job. The main process may still need batches to
    # reach the step after which it stops; it then ends its workers, or they end themselves.
    signal.signal(signal.SIGTERM, lambda *_: _start_daemon(_exit_later))
    # Grain ends workers when an iterator is closed. A main process that is killed closes nothing,
    # and its workers would wait forever for room in their queues.
    _start_daemon(_exit_after_parent)


def _start_daemon(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True).start()


def _exit_later() -> None:
    time.sleep(_LAST_BATCHES)
    os._exit(1)


def _exit_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def run_ahead(batches: grain.MapDataset, *, num_workers: int, num_threads: int, ahead: int) -> grain.IterDataset:
    """Makes `batches` in order and ahead of their use, by workers or by threads of this process."""
    if num_workers:
        # Grain reads absl flags of its own when it starts workers. Outside of app.run (in a notebook
        # or a test) nobody parses them, and absl refuses to give even their defaults.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        # Threads inside workers would only compete for the same cores.
        ds = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
        options = grain.MultiprocessingOptions(
            num_workers=num_workers, per_worker_buffer_size=max(1, math.ceil(ahead / num_workers))
        )
        return ds.mp_prefetch(options, worker_init_fn=_worker_init)
    return batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max(ahead, num_threads))
    )


def default_threads() -> int:
    """A few: each thread holds a whole batch in the making, so more of them cost memory."""
    return min(4, os.cpu_count() or 1)


def clear_error(e: Exception) -> Exception:
    """`e` without the frames of threads and workers, which would bury its one sentence."""
    if isinstance(e, InputError):
        error = InputError(str(e))
        error.__cause__ = e.__cause__
        return error
    if "Worker process was terminated" in str(e):
        return InputError(
            f"an input worker process died: {str(e).split('. ')[0]}; it may have run out of memory "
            "or of /dev/shm (docker: --shm-size), or the main module doesn't guard its entry point "
            'with `if __name__ == "__main__":`; input.num_workers=0 uses threads instead'
        )
    return e
