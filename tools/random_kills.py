"""Runs a command again and again, and kills it at random moments, until it ends by itself.

    python -m tools.random_kills --every=60,180 --for=2700 -- \
        python -m paligemma_med.train --config=configs/slake_mini.py --workdir=out/disturbed

It stands in for a scheduler that takes machines away: what is trained under it must come out as if
nothing had happened. Signals are drawn from SIGKILL, SIGTERM and SIGINT; when the process has gone,
it is started anew. After --for seconds nothing is killed any more.
"""

import random
import signal
import subprocess
import sys
import time

from absl import app, flags

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run(command, *, moment, limit, seed=0, grace=120, signals=SIGNALS, log=print, **popen):
    """Runs `command` to its end under random kills.

    Args:
      command: list of strings; may be started any number of times.
      moment: function(random.Random, number of the start, subprocess.Popen) that returns when it is
        time to kill, or when the process has ended.
      limit: function(number of kills) → whether to kill no more.
      grace: seconds that a process may take to end after SIGTERM or SIGINT.
      popen: further arguments of subprocess.Popen.

    Returns:
      (exit status of the last start, [(signal name, seconds it had run), …]).

    Raises:
      RuntimeError: a process that didn't end within `grace` of a signal, or that ended by itself
        with an error.
    """
    rng, kills, deck = random.Random(seed), [], []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell ignores it for background jobs, and what they start would inherit that.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        started = time.monotonic()
        process = subprocess.Popen(command, **popen)
        try:
            if not limit(len(kills)):
                moment(rng, len(kills), process)
            else:
                process.wait()
            if process.poll() is not None:
                if process.returncode:
                    raise RuntimeError(f"the command ended with status {process.returncode}.")
                return process.returncode, kills
            # Each signal as often as the others, in random order.
            deck = deck or rng.sample(signals, len(signals))
            kind = deck.pop()
            process.send_signal(kind)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"the command didn't end within {grace} s of {kind.name}.") from None
            if process.returncode == 0:  # it was faster
                return 0, kills
            kills.append((kind.name, time.monotonic() - started))
            log(f"kill {len(kills)}: {kind.name} after {kills[-1][1]:.0f} s", flush=True)
        finally:
            process.kill()
            process.wait()


def after_seconds(low, high):
    """A `moment` of `run`: so many seconds after the start."""

    def moment(rng, start, process):
        del start
        try:
            process.wait(rng.uniform(low, high))
        except subprocess.TimeoutExpired:
            pass

    return moment


def main(argv):
    if len(argv) < 2:
        raise app.UsageError("Give the command to run after --.")
    try:
        low, high = (float(x) for x in flags.FLAGS.every)
    except ValueError:
        raise app.UsageError("--every takes two numbers, as in --every=60,180.") from None
    end = time.monotonic() + flags.FLAGS["for"].value
    started = time.monotonic()
    status, kills = run(
        argv[1:],
        moment=after_seconds(low, high),
        limit=lambda _: time.monotonic() > end,
        seed=flags.FLAGS.seed,
    )
    print(f"{len(kills)} kills in {time.monotonic() - started:.0f} s; it ended with {status}.")
    sys.exit(status)


if __name__ == "__main__":
    flags.DEFINE_list("every", ["60", "180"], "Seconds from a start to its kill: least,most.")
    flags.DEFINE_float("for", 2700, "Seconds after which nothing is killed any more.")
    flags.DEFINE_integer("seed", 0, "Of the moments and the signals.")
    app.run(main)
