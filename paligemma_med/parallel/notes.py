"""What a program that is busy says: lines of the process that speaks, and where a long start is at."""

import contextlib
import threading
import time

from paligemma_med.parallel import distributed

# A stage that takes longer is worth a line.
_PATIENCE = 3.0


def say(text, file=None) -> None:
    """Prints a line, in process 0 alone."""
    if distributed.is_main():
        print(text, file=file, flush=True)


@contextlib.contextmanager
def stage(doing, say=say):
    """A stage of a program's start. If it isn't done within a few seconds a line says what is being done, and
    another one, at the end, how long it took.

    Args:
      doing: "reading weights".
      say: prints a line; called from another thread.
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
