"""What the comparisons share: the same weights and cores for all sides, turns, and their figures.

Each side is a separate process (`workers`). A turn is some steps of one side; the sides take turns, so
that a busy machine slows all of them, and a figure is a median over turns. Nothing here imports JAX or
PyTorch, so that the driver holds no device.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

from paligemma_med import files
from paligemma_med.pp import markdown
from tools.bench import sizes, workers

_MATRIX = {"cpu": 2048}  # size of the matrices; 8192 on other platforms
_PRODUCTS = 20


def check(peer, peers, **counts) -> None:
    """Raises ValueError unless `peer` is one of `peers` and the counts are 1 or more."""
    if peer not in peers:
        *most, last = map(repr, peers)
        raise ValueError(f"--peer is {peer!r}; expected {', '.join(most)} or {last}.")
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} is {value}; expected 1 or more.")


def bind(cores) -> None:
    """Binds this process, and those it starts, to this many cores; None leaves them free."""
    if cores:
        os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:cores]))
        os.environ["OMP_NUM_THREADS"] = str(cores)


@contextlib.contextmanager
def weights(size, dtype, folder=None) -> Iterator[str]:
    """The folder of `sizes.write_weights`: a temporary one for the block, or one in `folder`, which is kept
    and reused."""
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="bench-") as made:
            draw(made, size, dtype)
            yield made
        return
    path = os.path.join(os.path.expanduser(folder), f"{size}-{dtype}")
    if not os.path.isdir(path):
        with files.whole_folder(path) as made:
            draw(made, size, dtype)
    yield path


def draw(folder, size, dtype) -> None:
    """`sizes.write_weights` in a separate process, so that this one never holds a device."""
    settings = json.dumps(dict(size=size, dtype=dtype))
    command = [sys.executable, "-m", "tools.bench.sizes", folder, settings]
    if subprocess.run(command, check=False).returncode:
        raise ValueError(f"the weights of {size} could not be written to {folder}; see above.")


@contextlib.contextmanager
def sides(rows, settings) -> Iterator[dict]:
    """{name: `workers.Worker`} of the sides, ready for their turns.

    Args:
      rows: {name: examples in a step}.
      settings: for all sides.

    Raises:
      ValueError: sides on devices of different kinds.
    """
    with contextlib.ExitStack() as stack:
        made = {}
        for name, n in rows.items():
            made[name] = stack.enter_context(workers.Worker(name, {**settings, "rows": n}))
        kinds = {n: s.about["platform"] for n, s in made.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"the sides compute on different devices, {kinds}: expected one kind.")
        yield made


def take(sides, units, rounds, steps) -> dict:
    """Figures of `rounds` turns of each side.

    Args:
      sides: from `sides`, warmed up. Ours reports the FLOPs of its step, `flops_a_step`.
      units: {name: how many examples or answers a step makes}.
      rounds, steps: turns, and steps in each.

    Returns:
      dict for JSON. `of_peak` is a side's rate of our FLOPs divided by that of the fastest product of
      two large matrices, in the same type, that any side made in the same run. With a peer: `ratio`, its
      seconds per unit over ours, and `cpu_ratio`, the same for processor time.
    """
    for side in sides.values():
        side.ask(do="forget")
    seconds, cpu = ({n: [] for n in sides} for _ in range(2))
    for _ in range(rounds):
        for name, side in sides.items():
            turn = side.ask(do="steps", n=steps)
            seconds[name].append(turn["seconds"])
            cpu[name].append(turn["cpu_seconds"])
    memory = {n: s.ask(do="memory")["bytes"] for n, s in sides.items()}
    # After the memory is read, since matrices take some too.
    about = sides["ours"].about
    n = _MATRIX.get(about["platform"], 8192)
    products = {name: side.ask(do="multiply", n=n, times=_PRODUCTS)["flops_per_second"] for name, side in sides.items()}
    each = {n: statistics.median(x) / units[n] for n, x in seconds.items()}
    flops = {n: about["flops_a_step"] / units["ours"] / s for n, s in each.items()}
    out = {
        "seconds_a_step": {n: [round(x, 4) for x in s] for n, s in seconds.items()},
        "median_seconds": {n: workers.median(x) for n, x in seconds.items()},
        "fastest_seconds": {n: round(min(x), 4) for n, x in seconds.items()},
        "median_cpu_seconds": {n: workers.median(x) for n, x in cpu.items()},
        "per_second": {n: round(1 / s, 3) for n, s in each.items()},
        "memory_gb": {n: round(x / 1e9, 3) for n, x in memory.items()},
        "memory_is": "growth of resident memory" if about["platform"] == "cpu" else "the device's peak",
        "tflops_per_second": {n: round(x / 1e12, 4) for n, x in flops.items()},
        "matmul_tflops_per_second": {n: round(x / 1e12, 4) for n, x in products.items()},
        "of_peak": {n: round(x / max(products.values()), 3) for n, x in flops.items()},
    }
    for name in sides:
        if name != "ours":
            of_cpu = {n: statistics.median(x) / units[n] for n, x in cpu.items()}
            out["cpu_ratio"] = round(of_cpu[name] / of_cpu["ours"], 2) if of_cpu["ours"] else None
            out["ratio"] = each[name] / each["ours"]
    return out


def surroundings(abouts, load_before) -> dict:
    """The conditions of a measurement: device, machine, versions, date, and the load before and after."""
    known = ("jax", "torch", "transformers", "peft")
    return {
        "device": abouts[0]["device"],
        "machine": workers.machine(),
        "versions": {k: about[k] for about in abouts for k in known if k in about},
        "date": time.strftime("%Y-%m-%d"),
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
    }


def row(work, out, peer) -> str:
    """| work | seconds a step: ours, theirs | ratio | memory, GB | TFLOP/s | of peak | device |"""
    if peer != "none":
        work += f", {peer}"

    def both(key, form):
        return ", ".join(form.format(x) for x in out[key].values())

    cells = [
        work,
        both("median_seconds", "{:.3f}"),
        f"{out['ratio']:.2f}" if "ratio" in out else "",
        both("memory_gb", "{:.2f}"),
        both("tflops_per_second", "{:.3f}"),
        both("of_peak", "{:.0%}"),
        where(out),
    ]
    return markdown.row(cells)


def where(out) -> str:
    """A cell: the accelerator's name, or the processor's."""
    return out["machine"] if out["device"] == "cpu" else out["device"]


def same(found, one, tolerance, what) -> None:
    """Raises ValueError unless all sides have the same numbers as side `one`.

    Args:
      found: {name: list of numbers}, all of one length.
      tolerance: relative.
      what: what the numbers are called, such as "loss of {} at step".
    """
    for name, numbers in found.items():
        for i, (a, b) in enumerate(zip(numbers, found[one], strict=True)):
            if not abs(a - b) <= tolerance * abs(b):
                raise ValueError(f"the {what.format(name)} {i + 1} is {a}, that of {one} {b}.")


def model_settings(size, dtype, cores, remat_policy=None, scan=None, attn_impl=None) -> dict:
    """Settings of all sides; None means the default of `size`."""
    made = sizes.SIZES[size]
    return dict(
        size=size,
        dtype=dtype or made.dtype,
        cores=cores or made.cores,
        remat_policy=remat_policy or made.remat_policy,
        scan=made.scan if scan is None else scan,
        attn_impl=attn_impl or "xla",
    )
