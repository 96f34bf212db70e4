"""How far a program is with its questions, and how much longer it takes."""

import io
import sys

import tqdm

from paligemma_med.parallel import distributed


def bar(what, total, *, done=0) -> tqdm.tqdm:
    """A progress bar on a terminal, a line now and then in a log; nothing in other processes than the first.

    Args:
      done: of `total`, before this start; the rate is that of the rest.
    """
    if not distributed.is_main():
        return tqdm.tqdm(disable=True)
    kw = dict(total=total, initial=done, desc=what, unit="q")
    if sys.stderr.isatty():
        return tqdm.tqdm(**kw, leave=False)
    form = "{desc}: {n_fmt} of {total_fmt} in {elapsed}, {remaining} left, {rate_fmt}"
    return tqdm.tqdm(**kw, mininterval=30, bar_format=form, file=_Lines())


class _Lines(io.TextIOBase):
    """A log file for tqdm: a line for each state, none drawn over."""

    def write(self, text):
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)
