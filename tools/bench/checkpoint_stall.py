"""How much training time a checkpoint costs, with a config's real trained state.

    python -m tools.bench.checkpoint_stall --config=configs/stage2_medpix2.py --folder=/scratch

The trained leaves and their moments have the config's shapes and random numbers; the frozen weights
are left out, as in a checkpoint. A matrix product of nearly constant duration stands in for the
training step. Runs with and without checkpoints take turns, so that a busy machine slows both.

Two figures are printed: how long `save` blocks the loop, and what share of the steps is lost in total,
including the writing in the background. A CPU is the worst case for the second: there compression and
writing use the cores that compute.
"""

import json
import statistics
import tempfile
import time

import jax
import jax.numpy as jnp
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli
from paligemma_med.checkpoints import workdir
from paligemma_med.pp import command_line
from paligemma_med.setup import TrainingSetup


def make_state(config) -> tuple:
    """(trained, optimizer state) of `config`, with random numbers."""
    setup = TrainingSetup.without_data(config)
    keys = jax.random.split(jax.random.key(0), len(setup.trained_names))
    trained = {n: jax.random.normal(k, setup.abstract[n].shape) for n, k in zip(setup.trained_names, keys)}
    state = jax.jit(setup.tx.init)(trained)
    # Zeros would compress to nothing.
    noise = jax.tree.map(lambda x: jax.random.normal(keys[0], x.shape) if x.ndim else x, state)
    return trained, noise


def run(config, folder, *, seconds, every, turns) -> dict:
    """Measures; see the top of this file.

    Args:
      seconds: length of a turn. every: seconds between two checkpoints in a turn.

    Returns:
      dict of figures.
    """
    trained, state = make_state(config)
    work = jax.jit(lambda x: x @ x / jnp.float32(1000))
    x = jax.random.normal(jax.random.key(0), (1500, 1500))
    change = jax.jit(lambda tree: jax.tree.map(lambda a: a + 1, tree))
    blocked, rates = [], {True: [], False: []}
    with tempfile.TemporaryDirectory(dir=folder) as where:
        with workdir.Checkpoints(where, keep=2) as checkpoints:
            checkpoints.save(0, trained, state)  # compiles and imports what the first use needs
            checkpoints.wait()
            number = 0
            for turn in range(2 * turns):
                saving = bool(turn % 2)
                start = last = time.monotonic()
                steps = 0
                while time.monotonic() - start < seconds:
                    x = work(x).block_until_ready()
                    steps += 1
                    if saving and time.monotonic() - last >= every:
                        last, number = time.monotonic(), number + 1
                        trained = jax.block_until_ready(change(trained))
                        before = time.monotonic()
                        checkpoints.save(number, trained, state)
                        blocked.append(time.monotonic() - before)
                checkpoints.wait()  # within the turn that it belongs to
                rates[saving].append(steps / (time.monotonic() - start))
    without, with_ = (statistics.median(rates[k]) for k in (False, True))
    size = sum(a.nbytes for a in jax.tree.leaves((trained, state)))
    return {
        "state_MB": size / 1e6,
        "checkpoints": len(blocked),
        "save_blocks_ms_median": 1e3 * statistics.median(blocked),
        "save_blocks_ms_max": 1e3 * max(blocked),
        "seconds_between": every,
        "blocked_share": statistics.median(blocked) / every,
        "steps_lost_share": 1 - with_ / without,
    }


@cli.command
def main(argv) -> None:
    del argv
    v = flags.FLAGS
    found = run(v.config, v.folder, seconds=v.seconds, every=v.every, turns=v.turns)
    print(json.dumps({k: round(x, 4) for k, x in found.items()}, indent=1))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/stage2_medpix2.py", "Experiment.")
    command_line.define_path("folder", None, "Where to write checkpoints, for the time of the run.")
    flags.DEFINE_float("seconds", 60, "Length of a turn.")
    flags.DEFINE_float("every", 20, "Seconds between two checkpoints.")
    flags.DEFINE_integer("turns", 3, "Turns with, and as many without checkpoints.")
    app.run(main, flags_parser=command_line.parse_flags)
