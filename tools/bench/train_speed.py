"""A training step beside that of transformers + peft, or of big_vision, on the same work.

    python -m tools.bench train_step --size=bench-s --peer=hf
    BIG_VISION_DIR=~/big_vision python -m tools.bench train_step --peer=big_vision
    python -m tools.bench train_step --size=3b-448 --peer=hf --batch_size=8

Both sides have the same weights, batch, trained parameters and optimizer; before any time is taken
they make a few steps each, whose losses must be equal (in float32: in bfloat16 they are told). They
run in processes of their own on the same cores (`workers`) and take turns, so that a busy machine
slows both. A turn ends when the last loss is there. Figures are medians over turns; compilation and
first steps are left out. `cpu_ratio` is of the processor's time.

The peer's batch may be another (--peer_batch_size), as where memory allows it less: `ratio` is of
seconds an example. `of_peak` is what the chip does of the model's FLOPs (`paligemma_med.flops`, 4N
for adapters; logits at supervised positions) by the fastest product of two large matrices, in the
same type, that any side made in the same run.

On a machine that others use, too, PyTorch's threads wait for each other, and do so busily, and the
ratio grows. With --cores=1 there is no such waiting, and `cpu_ratio` hardly depends on others.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

from tools.bench import sizes, workers

_SAME = 1e-4  # of losses in float32, relative
_WARM_UP = 3  # steps; with fewer, the adapters' first factors have hardly changed
_MATRIX = {"cpu": 2048}  # rows of the matrices; 8192 on other platforms


def run(
    *, size, peer, what, dtype, batch_size, peer_batch_size, rounds, steps, remat_policy, scan,
    cores,
):  # fmt: skip
    """Measures both.

    Args:
      size: a name in `sizes.SIZES`, of which dtype, batch_size and cores are by default, and of
        ours remat_policy and scan.
      peer: "hf", "big_vision" or "none".
      what: is trained: "lora", "stage1" or "full".
      peer_batch_size: by default as ours.
      rounds, steps: turns of each, and steps in a turn.

    Returns:
      dict: medians, `ratio` (the peer's seconds an example over ours), `cpu_ratio`, memory,
      achieved FLOP/s, what the figures hold for, and "row", a line of a Markdown table.

    Raises:
      ValueError: an unknown name, a peer that isn't there, sides on different devices, or losses
        that differ.
    """
    sizes.check(size, what, dtype)
    if peer not in ("hf", "big_vision", "none"):
        raise ValueError(f"--peer is {peer!r}; expected 'hf', 'big_vision' or 'none'.")
    if min(rounds, steps) < 1:
        raise ValueError(f"--rounds={rounds} and --steps={steps} must be 1 or more.")
    made = sizes.SIZES[size]
    dtype, batch_size = dtype or made.dtype, batch_size or made.batch_size
    rows = {"ours": batch_size}
    if peer != "none":
        rows[peer] = peer_batch_size or batch_size
    cores = cores or made.cores
    bind(cores)
    settings = dict(
        size=size, dtype=dtype, what=what, cores=cores,
        remat_policy=remat_policy or made.remat_policy, scan=made.scan if scan is None else scan,
    )  # fmt: skip
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="train-speed-") as folder:
        draw(folder, size, dtype, what)
        sides = {}
        try:
            for name, n in rows.items():
                sides[name] = workers.Worker(name, {**settings, "weights": folder, "rows": n})
            found = _measure(sides, rows, dtype, rounds, steps)
        finally:
            for side in sides.values():
                side.close()
    about = {n: s.about for n, s in sides.items()}
    out = {
        "size": size, "what": what, "dtype": dtype, "batch_size": rows,
        "parameters": about["ours"]["parameters"], "trained": about["ours"]["trained"],
        "rounds": rounds, "steps_a_round": steps, "ours": {
            k: settings[k] for k in ("remat_policy", "scan")
        },
        **found, "device": about["ours"]["device"], "machine": workers.machine(),
        "versions": versions(about.values()), "date": time.strftime("%Y-%m-%d"),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }  # fmt: skip
    return {**out, "row": _row(out, peer)}


def bind(cores):
    """Binds this process, and those it starts, to so many cores; None leaves them free."""
    if cores:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
        os.environ["OMP_NUM_THREADS"] = str(cores)


def draw(folder, size, dtype, what):
    """`sizes.write_weights` in a process of its own, so that this one never holds a device."""
    settings = json.dumps(dict(size=size, dtype=dtype, what=what))
    command = [sys.executable, "-m", "tools.bench.sizes", folder, settings]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the weights of {size} could not be written to {folder}; see above.")


def versions(abouts):
    """{library: version} of what sides say of themselves."""
    known = ("jax", "torch", "transformers", "peft")
    return {k: about[k] for about in abouts for k in known if k in about}


def _measure(sides, rows, dtype, rounds, steps):
    kinds = {n: s.about["platform"] for n, s in sides.items()}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the sides compute on different devices, {kinds}: expected one kind.")
    trained = {n: s.about["trained"] for n, s in sides.items()}
    if len(set(trained.values())) > 1:
        raise ValueError(f"the sides train different numbers of parameters: {trained}.")
    first = {n: s.ask(do="steps", n=_WARM_UP)["losses"] for n, s in sides.items()}
    if len(set(rows.values())) == 1:  # other batches are other work
        check_losses(first, dtype, "ours")
    for side in sides.values():
        side.ask(do="forget")
    seconds, cpu = ({n: [] for n in sides} for _ in range(2))
    for _ in range(rounds):
        for name, side in sides.items():
            turn = side.ask(do="steps", n=steps)
            seconds[name].append(turn["seconds"])
            cpu[name].append(turn["cpu_seconds"])
    memory = {n: s.ask(do="memory")["bytes"] for n, s in sides.items()}
    # After the memory, since matrices take some, too.
    matrix = _MATRIX.get(kinds["ours"], 8192)
    products = {
        n: s.ask(do="multiply", n=matrix, times=20)["flops_per_second"] for n, s in sides.items()
    }
    per_example = {n: statistics.median(x) / rows[n] for n, x in seconds.items()}
    flops = {n: sides["ours"].about["flops_per_example"] / s for n, s in per_example.items()}
    out = {
        "losses": first,
        "seconds_a_step": {n: [round(x, 4) for x in s] for n, s in seconds.items()},
        "median_seconds": {n: workers.median(x) for n, x in seconds.items()},
        "fastest_seconds": {n: round(min(x), 4) for n, x in seconds.items()},
        "median_cpu_seconds": {n: workers.median(x) for n, x in cpu.items()},
        "examples_per_second": {n: round(1 / s, 3) for n, s in per_example.items()},
        "memory_gb": {n: round(x / 1e9, 3) for n, x in memory.items()},
        "memory_is": "growth of resident memory" if kinds["ours"] == "cpu" else "the device's peak",
        "tflops_per_second": {n: round(x / 1e12, 4) for n, x in flops.items()},
        "matmul_tflops_per_second": {n: round(x / 1e12, 4) for n, x in products.items()},
        "of_peak": {n: round(x / max(products.values()), 3) for n, x in flops.items()},
    }
    for name in sides:
        if name != "ours":
            each = {n: statistics.median(x) / rows[n] for n, x in cpu.items()}
            out["cpu_ratio"] = round(each[name] / each["ours"], 2) if each["ours"] else None
            out["ratio"] = per_example[name] / per_example["ours"]
    return out


def check_losses(losses, dtype, one):
    """ValueError unless all sides have the losses of side `one`: the same work has the same ones.
    In bfloat16 sides round differently, and nothing is checked."""
    for name, found in losses.items():
        for i, (a, b) in enumerate(zip(found, losses[one], strict=True)):
            if dtype == "float32" and not abs(a - b) <= _SAME * abs(b):
                raise ValueError(f"the loss of {name} at step {i + 1} is {a}, that of {one} {b}.")


def _row(out, peer):
    """| work | seconds a step: ours, theirs | ratio | memory, GB | TFLOP/s | of peak | device |"""
    work = f"{out['what']}, {out['size']}, {out['dtype']}, batch {out['batch_size']['ours']}"
    if peer != "none":
        work += f", {peer}"
        if out["batch_size"][peer] != out["batch_size"]["ours"]:
            work += f" with {out['batch_size'][peer]}"

    def both(key, form):
        return ", ".join(form.format(x) for x in out[key].values())

    cells = [
        work, both("median_seconds", "{:.3f}"),
        f"{out['ratio']:.2f}" if "ratio" in out else "", both("memory_gb", "{:.2f}"),
        both("tflops_per_second", "{:.3f}"), both("of_peak", "{:.0%}"),
        out["machine"] if out["device"] == "cpu" else out["device"],
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"
