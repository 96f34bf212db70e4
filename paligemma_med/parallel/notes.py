"""Lines that a program prints while it works, in process 0 only, and notes on the stages of a long start."""

import contextlib
import sys
import threading
import time
from collections.abc import Iterator

from paligemma_med.parallel import distributed

# Seconds after which a stage is worth a line.
_PATIENCE = 3.0


def say(text, file=None) -> None:
    """Prints a line in process 0, nothing in the others."""
    if distributed.is_main():
        print(text, file=file, flush=True)


def _on_stderr(text):
    say(text, file=sys.stderr)


@contextlib.contextmanager
def stage(doing, say=_on_stderr) -> Iterator[None]:
    """A stage of a program's start. If it takes more than a few seconds, one line says what is being done and
    another, at the end, how long it took.

    Args:
      doing: "reading weights".
      say: prints a line; called from another thread. By default on stderr, since stdout has the results.
    """
    started, lines = time.monotonic(), []

    def tell():
        lines.append(doing)
        say(f"{doing[0].upper()}{doing[1:]} …")

    timer = threading.Timer(_PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    if lines:
        say(f"Done {doing}: {time.monotonic() - started:.0f} s.")
