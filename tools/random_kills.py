"""Runs a command again and again, killing it at random moments, until it ends by itself.

    python -m tools.random_kills --every=60,180 --for=2700 -- \
        python -m paligemma_med.train --config=configs/slake_mini.py --workdir=out/disturbed

It imitates a scheduler that takes machines away: the result of training under it must be the same as
without. Signals are drawn from SIGKILL, SIGTERM and SIGINT; when the process is gone, it is started
again. After --for seconds it isn't killed any more.
"""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable

from absl import app, flags

from paligemma_med.cli import command
from paligemma_med.pp import command_line

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def run(command, *, moment, limit, seed=0, grace=120, signals=SIGNALS, log=print, **popen) -> tuple:
    """Runs `command` to its end under random kills.

    Args:
      command: list of strings; may be started any number of times.
      moment: function(random.Random, number of the start, subprocess.Popen) that returns when it is
        time to kill, or when the process has ended.
      limit: function(number of kills) → whether to stop killing.
      grace: seconds that a process may take to end after SIGTERM or SIGINT.
      popen: further arguments of subprocess.Popen.

    Returns:
      (exit status of the last start, [(signal name, seconds it had run), …]).

    Raises:
      RuntimeError: a process didn't end within `grace` seconds of a signal, or ended by itself with an
        error.
    """
    rng, kills, deck = random.Random(seed), [], []
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Shells make background jobs ignore SIGINT, and their children would inherit that.
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
            # All signals equally often, in random order.
            deck = deck or rng.sample(signals, len(signals))
            kind = deck.pop()
            process.send_signal(kind)
            try:
                process.wait(grace)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"the command didn't end within {grace} s of {kind.name}.") from None
            if process.returncode == 0:  # it finished before the kill
                return 0, kills
            kills.append((kind.name, time.monotonic() - started))
            log(f"kill {len(kills)}: {kind.name} after {kills[-1][1]:.0f} s", flush=True)
        finally:
            process.kill()
            process.wait()


def after_seconds(low, high) -> Callable:
    """A `moment` for `run`: a random number of seconds after the start."""

    def moment(rng, start, process):
        del start
        try:
            process.wait(rng.uniform(low, high))
        except subprocess.TimeoutExpired:
            pass

    return moment


@command
def main(argv) -> None:
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
    flags.DEFINE_float("for", 2700, "Seconds after which it isn't killed any more.")
    flags.DEFINE_integer("seed", 0, "Of the moments and the signals.")
    app.run(main, flags_parser=command_line.parse_flags)
