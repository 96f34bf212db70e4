"""Whether a function takes time in proportion to its input, judged without a bound in seconds.

Seconds depend on the processor; how they grow doesn't. Eight times the input takes eight times as long
if the time is linear and 64 times if it is quadratic: the line is drawn between the two.
"""

import time

GROWTH = 8
_MOST = 3 * GROWTH
_SHORT = 0.02  # seconds below which a measurement says nothing


def _seconds(function, *args):
    start = time.thread_time()  # other threads of this process (XLA's) don't count
    function(*args)
    return time.thread_time() - start


def assert_linear(function, text, tries=4):
    """`function(text)` takes less than 24 times as long as with the first eighth of the text.

    The shortest of some tries counts, so that a collection of garbage in one doesn't.
    """
    long = short = float("inf")
    for _ in range(tries):
        long = min(long, _seconds(function, text))
        short = min(short, _seconds(function, text[: len(text) // GROWTH]))
        if long < max(_SHORT, _MOST * short):
            return
    raise AssertionError(f"{long:.3f} s for {len(text):,} characters, {short:.4f} s for an eighth: {text[:20]!r}")
