"""How far a LoRA step is from what this processor can do, ours and others', and where our time goes.

    python -m tools.bench cpu
    BIG_VISION_DIR=~/big_vision python -m tools.bench cpu --rounds=5

No program that computes in float32 can take less time than its matrix products at the machine's peak. So the measure is
the share of that peak: the FLOPs that a step needs by the 4N count (`paligemma_med.models.flops`), over the time that
it takes, over the rate of the fastest product of two large matrices in the same run. `limit_seconds` is the step's time
at a share of 1. All sides that are installed take turns in one run: ours, transformers + peft, and big_vision where
$BIG_VISION_DIR names a checkout. Then our step is profiled on one core (`profile_step`), products by kind and the rest.
"""

import importlib.util
import json
import os
import subprocess
import sys
import tempfile

from paligemma_med.pp import markdown
from tools.bench import machine, sizes, train_speed, turns

_HF = ("torch", "transformers", "peft")


def peers() -> list[str]:
    """The other sides that can run here."""
    found = ["hf"] if all(importlib.util.find_spec(name) for name in _HF) else []
    return found + ["big_vision"] * bool(os.environ.get("BIG_VISION_DIR"))


def run(*, size, batch_size, cores, rounds, steps, remat_policy, scan) -> dict:
    """Measures all sides, and profiles ours.

    Args:
      size: a name in `sizes.SIZES`, which gives the defaults of batch_size, cores, remat_policy and scan. float32.
      rounds, steps: turns of each side, and steps in each.

    Returns:
      dict: the figures of `turns.take`; `over_ours` and `cpu_over_ours`, each side's time over ours, and the
      processor's; `limit_seconds`; `profile`, the figures of `profile_step`, or dict(error=why there are none);
      `invalid`, of the first of both that is; the conditions of the measurement, and "row", two Markdown tables.

    Raises:
      ValueError: an unknown name, or sides that don't do the same work.
    """
    sizes.check(size, "lora", "float32")
    turns.check("none", ("none",), rounds=rounds, steps=steps, batch_size=batch_size)
    settings = turns.model_settings(size, "float32", cores, remat_policy, scan)
    settings |= dict(work="train_step", what="lora", frozen_dtype=None)
    rows = dict.fromkeys(["ours", *peers()], batch_size or sizes.SIZES[size].batch_size)
    allowed = os.sched_getaffinity(0)
    turns.bind(settings["cores"])
    with turns.weights(size, "float32") as folder:
        with turns.sides(rows, {**settings, "weights": folder}) as sides:
            losses = train_speed.first_steps(sides, rows, settings)
            found = turns.take(sides, rows, rounds, steps)
            about = {n: s.about for n, s in sides.items()}
    conditions = turns.surroundings(list(about.values()))
    os.sched_setaffinity(0, allowed)  # the profile binds itself
    profile = _profile(size, rows["ours"], remat_policy, scan)
    for key in ("ratio", "cpu_ratio"):  # of the last side alone
        found.pop(key, None)
    wall, cpu = found["median_seconds"], found["median_cpu_seconds"]
    flops = about["ours"]["flops_a_step"]
    out = {
        "size": size,
        "batch_size": rows,
        "cores": settings["cores"],
        "rounds": rounds,
        "steps_a_round": steps,
        "ours": {k: settings[k] for k in ("remat_policy", "scan")},
        "losses": losses,
        "gflops_a_step": round(flops / 1e9, 1),
        "limit_seconds": round(flops / found["peak_tflops_per_second"] / 1e12, 4),
        "over_ours": {n: round(x / wall["ours"], 3) for n, x in wall.items()},
        "cpu_over_ours": {n: round(x / cpu["ours"], 3) for n, x in cpu.items()},
        **found,
        "profile": profile,
        **conditions,
    }
    out["invalid"] = found["invalid"] or profile.get("invalid")
    return {**out, "row": _table(out)}


def _profile(size, rows, remat_policy, scan):
    """The figures of `tools.bench profile` in a process of its own, which holds JAX; or dict(error=…)."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        to = os.path.join(folder, "profile.json")
        command = [sys.executable, "-m", "tools.bench", "profile", f"--size={size}", f"--batch_size={rows}"]
        command += [f"--remat_policy={remat_policy}"] * (remat_policy is not None)
        command += ["--scan" if scan else "--noscan"] * (scan is not None)
        command += ["--dtype=float32", f"--json={to}", "--allow_busy"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
            return dict(error=said[-1])
        with open(to, encoding="utf-8") as f:
            return json.load(f)


def _table(out):
    """Two Markdown tables: sides, and parts of our step."""
    head = ["side", "seconds", "processor's", "over ours", "of processor time", "share of peak", "memory, GB"]
    lines = [markdown.head(head)]
    for name, seconds in out["median_seconds"].items():
        cells = [name, f"{seconds:.3f}", f"{out['median_cpu_seconds'][name]:.3f}"]
        cells += [f"{out['over_ours'][name]:.2f}", f"{out['cpu_over_ours'][name]:.2f}"]
        lines.append(markdown.row([*cells, f"{out['of_peak'][name]:.0%}", f"{out['memory_gb'][name]:.2f}"]))
    lines.append(
        f"\nThe peak is {out['peak_tflops_per_second']:.3f} TFLOP/s; {out['gflops_a_step']:.0f} GFLOPs by the 4N count "
        f"take {out['limit_seconds']:.3f} s at it. {turns.where(out)}; {machine.describe_others(out)}.\n"
    )
    lines.append(out["profile"].get("row") or f"no profile: {out['profile']['error']}")
    return "\n".join(lines)
