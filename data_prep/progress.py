"""Progress of long work: a bar on a terminal, a line per minute in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")
SECONDS = 60.0  # between lines in a log


def progress(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Yields `items` and prints to stderr the progress, the speed and the remaining time."""
    if sys.stderr.isatty():
        yield from tqdm.tqdm(items, desc=what, total=total, leave=False, unit="")
        return
    start = last = time.monotonic()
    for n, item in enumerate(items):
        if (now := time.monotonic()) - last >= SECONDS:
            last = now
            print(_line(what, n, total, now - start), file=sys.stderr, flush=True)
        yield item


def _line(what: str, done: int, total: int | None, seconds: float) -> str:
    speed = done / seconds
    line = f"{what}: {done:,}"
    if total:
        line += f" of {total:,} ({100 * done / total:.0f} %)"
    line += f", {speed:,.1f} a second"
    if total and speed:
        line += f", about {(total - done) / speed / 60:,.0f} min to go"
    return line
