"""From the start of a process to its first training step: ours, with JAX's compilation cache cold
and warm, beside transformers + peft.

    python -m tools.bench load --size=bench-s --peer=hf

Each turn starts a process that imports what it needs, reads the same weights from a Hugging Face
folder and the adapter from a PEFT folder, and takes one step; the clock stops when its loss is
there. Turns alternate. The warm cache is one that a run before has filled, and the cold one an
empty folder. The files lie in the system's memory by then, for all sides. `paligemma_med.train`
imports TFDS and Grain and opens its data, too, which is no part of this (nor is a DataLoader).

`ratio` is the peer's seconds over ours with a warm cache.
"""

import os
import tempfile
import time

from tools.bench import sizes, train_speed, workers


def run(*, size, peer, what, dtype, batch_size, rounds, remat_policy, scan, cores):
    """Measures both.

    Args:
      As `train_speed.run` has them. peer: "hf" or "none".

    Returns:
      dict: medians of seconds until the first step for "cold", "warm" and the peer, until imports
      were done and until the weights lay in place, `ratio`, and "row", a line of a Markdown table.

    Raises:
      ValueError: an unknown name, or a side that ends early.
    """
    sizes.check(size, what, dtype)
    if peer not in ("hf", "none"):
        raise ValueError(f"--peer is {peer!r}; expected 'hf' or 'none'.")
    if rounds < 1:
        raise ValueError(f"--rounds={rounds} must be 1 or more.")
    made = sizes.SIZES[size]
    dtype, rows = dtype or made.dtype, batch_size or made.batch_size
    cores = cores or made.cores
    train_speed.bind(cores)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="load-speed-") as folder:
        train_speed.draw(folder, size, dtype, what)
        settings = dict(
            size=size, dtype=dtype, what=what, cores=cores, rows=rows, weights=folder,
            remat_policy=remat_policy or made.remat_policy,
            scan=made.scan if scan is None else scan,
        )  # fmt: skip

        def start(name, cache=None):
            env = {}
            if cache:
                env = dict(
                    JAX_COMPILATION_CACHE_DIR=os.path.join(folder, cache),
                    # What train writes with the same settings: programs of a second and more.
                    JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="1",
                )
            began = time.time()
            with workers.Worker(name, settings, env) as side:
                loss = side.ask(do="steps", n=1)["losses"][0]
                seconds = time.time() - began
                return dict(side.about["seconds_from_start"], first_step=seconds), loss, side.about

        sides = {"cold": ("ours", "cold{}"), "warm": ("ours", "warm")}
        if peer == "hf":
            sides["hf"] = ("hf", None)
        turns, losses, abouts = {name: [] for name in sides}, {}, []
        start("ours", "warm")  # fills the cache
        for i in range(rounds):
            for name, (side, cache) in sides.items():
                turn, losses[name], about = start(side, cache and cache.format(i))
                turns[name].append(turn)
                abouts.append(about)
    train_speed.check_losses({k: [x] for k, x in losses.items()}, dtype, "warm")
    medians = {
        name: {k: workers.median(t[k] for t in found) for k in found[0]}
        for name, found in turns.items()
    }
    out = {
        "size": size, "what": what, "dtype": dtype, "batch_size": rows, "rounds": rounds,
        "seconds_until": medians,
        "seconds": {n: [round(t["first_step"], 2) for t in x] for n, x in turns.items()},
        "device": abouts[0]["device"], "machine": workers.machine(),
        "versions": train_speed.versions(abouts), "date": time.strftime("%Y-%m-%d"),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }  # fmt: skip
    if peer != "none":
        out["ratio"] = medians[peer]["first_step"] / medians["warm"]["first_step"]
    return {**out, "row": _row(out)}


def _row(out):
    """| work | seconds: cold, warm, the peer's | ratio | device |"""
    seconds = [f"{x['first_step']:.1f}" for x in out["seconds_until"].values()]
    cells = [
        f"load, {out['what']}, {out['size']}, {out['dtype']}", ", ".join(seconds),
        f"{out['ratio']:.2f}" if "ratio" in out else "",
        out["machine"] if out["device"] == "cpu" else out["device"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
