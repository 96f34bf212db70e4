"""How a run is stopped from outside: Ctrl-C (SIGINT), or SIGTERM from a scheduler.

With one process a signal raises KeyboardInterrupt, but never in the middle of a step, when the old
parameters have been donated and the new ones don't exist yet. With several processes all must stop after
the same step: JAX's preemption service forwards SIGTERM and makes them agree on that step, and Ctrl-C is
turned into SIGTERM. A second Ctrl-C ends a process immediately.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils


class Terminated(KeyboardInterrupt):
    """Raised for SIGTERM."""

    exit_code = 128 + signal.SIGTERM


class Signals:
    """Handles SIGINT and SIGTERM inside a `with`.

    Signals that the shell ignores (for background jobs) stay ignored. Outside the main thread nothing is
    handled.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._before, self._caught, self._deferred = {}, None, False

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            # With several processes, SIGTERM is JAX's.
            for number in (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _handle(self, number, frame):
        del frame
        again, self._caught = self._caught, self._caught or number
        if self._several:
            if again:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)
        elif not self._deferred and not again:
            self._raise()
        elif again and number == signal.SIGINT:
            raise KeyboardInterrupt

    def _raise(self):
        raise Terminated if self._caught == signal.SIGTERM else KeyboardInterrupt

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """A signal in this context takes effect at its end."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self._caught and not self._several:
            self._raise()

    def together(self, error) -> bool:
        """Whether all processes stop because of this KeyboardInterrupt, so that they can still save together."""
        return not self._several or isinstance(error, Terminated)

    def stop_if_agreed(self, step) -> None:
        """With several processes, raises Terminated if all are to stop after `step`. All of them must call
        this after every step."""
        if self._several and multihost_utils.reached_preemption_sync_point(step):
            raise Terminated
