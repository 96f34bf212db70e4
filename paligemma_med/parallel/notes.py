"""Lines that a program prints while it works, in process 0 only, and notes on the stages of a long start."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator

from paligemma_med.parallel import distributed

# Seconds after which a stage is worth a line.
_PATIENCE = 3.0
# Seconds between lines of progress.
_BETWEEN = 10.0


def say(text, file=None) -> None:
    """Prints a line in process 0, nothing in the others."""
    if distributed.is_main():
        print(text, file=file, flush=True)


def _on_stderr(text):
    say(text, file=sys.stderr)


@contextlib.contextmanager
def stage(doing, say=_on_stderr) -> Iterator[Callable[[int, int], None]]:
    """A stage of a program's start. If it takes more than a few seconds, one line says what is being done and
    another, at the end, how long it took.

    As its value the context has a function of (parts done, parts in all), for stages of equal parts: every now and then
    it says how far things are, and about how much longer they take.

    Args:
      doing: "reading weights".
      say: prints a line; called from another thread. By default on stderr, since stdout has the results.
    """
    started, lines, first, last = time.monotonic(), [], [], []

    def tell():
        lines.append(doing)
        say(f"{_capital(doing)} …")

    def progress(done, total):
        now = time.monotonic()
        first.append((done, now))
        if done < total and now - (last or [started])[-1] >= (_BETWEEN if last else _PATIENCE):
            last.append(now)
            # The first part compiles programs, too, so its time says little as soon as there are others.
            parts, since = first[0] if len(first) > 1 else (0, started)
            left = (now - since) / (done - parts) * (total - done)
            say(f"{_capital(doing)}: {done} of {total} in {_clock(now - started)}, about {_clock(left)} left.")

    timer = threading.Timer(_PATIENCE, tell)
    timer.daemon = True
    timer.start()
    try:
        yield progress
    finally:
        timer.cancel()
    if lines:
        say(f"Done {doing}: {time.monotonic() - started:.0f} s.")


def _capital(text):
    return text[0].upper() + text[1:]


def _clock(seconds):
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
