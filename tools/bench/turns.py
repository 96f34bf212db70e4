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
from tools.bench import machine, sizes, workers

# Sizes of the matrices whose product gives the peak, and how often each is multiplied. Which size is fastest
# differs by processor, and the fastest counts.
_MATRICES = {"cpu": {1024: 20, 2048: 10, 4096: 2}}
_ON_OTHERS = {8192: 20}


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
def sides(rows, settings, own=None) -> Iterator[dict]:
    """{name: `workers.Worker`} of the sides, ready for their turns.

    Args:
      rows: {name: examples in a step}.
      settings: for all sides.
      own: {name: settings of this side alone}; the sides are then several of ours, on different data.

    Raises:
      ValueError: sides on devices of different kinds.
    """
    with contextlib.ExitStack() as stack:
        made = {}
        for name, n in rows.items():
            given = {**settings, "rows": n, **(own[name] if own else {})}
            module = workers.SIDES[settings["work"]]["ours"] if own else None
            made[name] = stack.enter_context(workers.Worker(name, given, module=module))
        kinds = {n: s.about["platform"] for n, s in made.items()}
        if len(set(kinds.values())) > 1:
            raise ValueError(f"the sides compute on different devices, {kinds}: expected one kind.")
        yield made


def take(sides, units, rounds, steps, one="ours", ahead=0, peak=True) -> dict:
    """Figures of `rounds` turns of each side.

    Args:
      sides: from `sides`, warmed up.
      units: {name: how many examples or answers a step makes}.
      rounds, steps: turns, and steps in each.
      one: the side that the others are compared with. For the peak, it reports the FLOPs of its step, `flops_a_step`.
      ahead: steps before each turn that aren't timed.
      peak: whether products of matrices are measured, too.

    Returns:
      dict for JSON. `of_peak` is a side's rate of the FLOPs of side `one` divided by `peak_tflops_per_second`, that of
      the fastest product of two large matrices, in the same type, that any side made in the same run. With a peer:
      `ratio`, its seconds per unit over ours, and `cpu_ratio`, the same for processor time. And what
      `machine.Watch` found during the turns.
    """
    for side in sides.values():
        side.ask(do="forget")
    seconds, cpu = ({n: [] for n in sides} for _ in range(2))
    watch = machine.Watch()
    for _ in range(rounds):
        for name, side in sides.items():
            if ahead:
                side.ask(do="steps", n=ahead)
            turn = side.ask(do="steps", n=steps)
            seconds[name].append(turn["seconds"])
            cpu[name].append(turn["cpu_seconds"])
    others = watch.found()
    memory = {n: s.ask(do="memory")["bytes"] for n, s in sides.items()}
    about = sides[one].about
    each = {n: statistics.median(x) / units[n] for n, x in seconds.items()}
    out = {
        "seconds_a_step": {n: [round(x, 4) for x in s] for n, s in seconds.items()},
        "median_seconds": {n: workers.median(x) for n, x in seconds.items()},
        "fastest_seconds": {n: round(min(x), 4) for n, x in seconds.items()},
        "median_cpu_seconds": {n: workers.median(x) for n, x in cpu.items()},
        "per_second": {n: round(1 / s, 3) for n, s in each.items()},
        "memory_gb": {n: round(x / 1e9, 3) for n, x in memory.items()},
        "memory_is": "growth of resident memory" if about["platform"] == "cpu" else "the device's peak",
        **others,
    }
    if peak:
        # After the memory is read, since matrices take some too.
        products = peaks(sides, about["platform"])
        peak = max(rate for found in products.values() for rate in found.values())
        flops = {n: about["flops_a_step"] / units[one] / s for n, s in each.items()}
        out |= {
            "tflops_per_second": {n: round(x / 1e12, 4) for n, x in flops.items()},
            "matmul_tflops_per_second": {
                name: {n: round(x / 1e12, 4) for n, x in found.items()} for name, found in products.items()
            },
            "peak_tflops_per_second": round(peak / 1e12, 4),
            "of_peak": {n: round(x / peak, 3) for n, x in flops.items()},
        }
    for name in sides:
        if name != one:
            of_cpu = {n: statistics.median(x) / units[n] for n, x in cpu.items()}
            out["cpu_ratio"] = round(of_cpu[name] / of_cpu[one], 2) if of_cpu[one] else None
            out["ratio"] = each[name] / each[one]
    return out


def peaks(sides, platform) -> dict:
    """{name of a side: {size: FLOP/s of the best of its products of two matrices of this size}}."""
    matrices = _MATRICES.get(platform, _ON_OTHERS)
    return {
        name: {str(n): side.ask(do="multiply", n=n, times=k)["flops_per_second"] for n, k in matrices.items()}
        for name, side in sides.items()
    }


def surroundings(abouts) -> dict:
    """The conditions of a measurement: device, machine, versions, date."""
    known = ("jax", "torch", "transformers", "peft")
    return {
        "device": abouts[0]["device"],
        "machine": machine.describe(),
        "processor": machine.about(),
        "versions": {k: about[k] for about in abouts for k in known if k in about},
        "date": time.strftime("%Y-%m-%d"),
    }


def row(work, out, peer) -> str:
    """| work | seconds a step: ours, theirs | of the processor | ratio | of processor time | memory, GB | TFLOP/s |
    of peak | device |"""
    if peer != "none":
        work += f", {peer}"

    def both(key, form):
        return ", ".join(form.format(x) for x in out[key].values())

    cells = [
        work,
        both("median_seconds", "{:.3f}"),
        both("median_cpu_seconds", "{:.3f}"),
        ratio(out),
        ratio(out, "cpu_ratio"),
        both("memory_gb", "{:.2f}"),
        both("tflops_per_second", "{:.3f}"),
        both("of_peak", "{:.0%}"),
        where(out),
    ]
    return markdown.row(cells)


def ratio(out, key="ratio") -> str:
    """A cell: the ratio, or "cpu_ratio", if there is a peer."""
    return f"{out[key]:.2f}" if out.get(key) else ""


def where(out) -> str:
    """A cell: the accelerator's name, or the processor's; and that the run is invalid, if it is."""
    name = out["machine"] if out["device"] == "cpu" else out["device"]
    return name + (" (INVALID: the machine was busy)" if out["invalid"] else "")


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
