"""From the start of a process to its first training step: ours, with JAX's compilation cache cold
and warm, against transformers + peft.

    python -m tools.bench load --size=bench-s --peer=hf

Each turn starts a process that imports what it needs, reads the same weights from a Hugging Face folder
and the adapter from a PEFT folder, and takes one step; the clock stops when its loss is known. Turns
alternate. The warm cache was filled by an earlier run, the cold one is an empty folder. For all sides the
files are in the system's page cache by then. `paligemma_med.train` also imports TFDS and Grain and opens
its data, which isn't included here (nor is a DataLoader).

`ratio` is the peer's seconds over ours with a warm cache.
"""

import os
import resource
import tempfile
import time

from paligemma_med.pp import markdown
from tools.bench import machine, sizes, train_speed, turns, workers


def run(
    *,
    size,
    peer,
    what,
    dtype,
    batch_size,
    rounds,
    remat_policy,
    scan,
    attn_impl,
    cores,
    weights=None,
) -> dict:
    """Measures both.

    Args:
      As in `train_speed.run`. peer: "hf" or "none".

    Returns:
      dict: median seconds until the first step for "cold", "warm" and the peer, until imports were done
      and until the weights were in place, and the processor's (of the whole process), `ratio`, `cpu_ratio`, and "row",
      a line of a Markdown table.

    Raises:
      ValueError: an unknown name, or a side that ends early.
    """
    sizes.check(size, what, dtype)
    turns.check(peer, ("hf", "none"), rounds=rounds, batch_size=batch_size)
    settings = turns.model_settings(size, dtype, cores, remat_policy, scan, attn_impl)
    settings |= dict(work="train_step", what=what)
    dtype, rows = settings["dtype"], batch_size or sizes.SIZES[size].batch_size
    turns.bind(settings["cores"])
    with (
        turns.weights(size, dtype, weights) as drawn,
        tempfile.TemporaryDirectory(prefix="load-speed-") as caches,
    ):
        settings |= dict(rows=rows, weights=drawn)

        def start(name, cache=None):
            env = {}
            if cache:
                env = dict(
                    JAX_COMPILATION_CACHE_DIR=os.path.join(caches, cache),
                    # Like `train`, caches programs that take a second or more to compile.
                    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1",
                )
            began, cpu = time.time(), _cpu_of_ended()
            with workers.Worker(name, settings, env) as side:
                loss = side.ask(do="steps", n=1)["values"][0]
                seconds = time.time() - began
            turn = dict(side.about["seconds_from_start"], first_step=seconds, processor=_cpu_of_ended() - cpu)
            return turn, loss, side.about

        sides = {"cold": ("ours", "cold{}"), "warm": ("ours", "warm")}
        if peer == "hf":
            sides["hf"] = ("hf", None)
        found, losses, abouts = {name: [] for name in sides}, {}, []
        start("ours", "warm")  # fills the cache
        watch = machine.Watch()
        for i in range(rounds):
            for name, (side, cache) in sides.items():
                turn, losses[name], about = start(side, cache and cache.format(i))
                found[name].append(turn)
                abouts.append(about)
        others = watch.found()
    train_speed.check_losses({k: [x] for k, x in losses.items()}, dtype, "warm")
    medians = {name: {k: workers.median(t[k] for t in x) for k in x[0]} for name, x in found.items()}
    out = {
        "size": size,
        "what": what,
        "dtype": dtype,
        "batch_size": rows,
        "rounds": rounds,
        "seconds_until": medians,
        "seconds": {n: [round(t["first_step"], 2) for t in x] for n, x in found.items()},
        "cores": settings["cores"],
        **others,
        **turns.surroundings(abouts),
    }
    if peer != "none":
        out["ratio"] = medians[peer]["first_step"] / medians["warm"]["first_step"]
        out["cpu_ratio"] = round(medians[peer]["processor"] / medians["warm"]["processor"], 2)
    return {**out, "row": _row(out)}


def _cpu_of_ended():
    """The processor's seconds of this process's children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _row(out):
    """| work | seconds: cold, warm, the peer's | of the processor | ratio | of processor time | device |"""
    seconds, cpu = ([f"{x[k]:.1f}" for x in out["seconds_until"].values()] for k in ("first_step", "processor"))
    work = f"load, {out['what']}, {out['size']}, {out['dtype']}"
    ratios = turns.ratio(out), turns.ratio(out, "cpu_ratio")
    return markdown.row([work, ", ".join(seconds), ", ".join(cpu), *ratios, turns.where(out)])
