"""All rows of the benchmarks that need a GPU, one after another, each as a separate command.

    python -m tools.bench gpu --out=bench_gpu

For a machine rented by the minute: it needs JAX, Flax, optax, safetensors, PyTorch, transformers and
peft, but neither TFDS, Grain, ml_collections nor a network. No row is started that wouldn't end within
--minutes; the same command again continues with the remaining rows. Each row leaves OUT/NAME.json (its
figures and command, or why there are none) and OUT/NAME.log; a failed row is only tried again with
--retry. Weights and JAX's compiled programs stay in OUT/cache, so that rows share them.

The most important rows come first: the training step and sampled answers against transformers, then
batches and settings one by one to find the best of each side, and these against each other. --size=tiny
tries everything out on a CPU.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

from paligemma_med import files
from paligemma_med.pp import markdown
from tools.bench import sizes


class Row(NamedTuple):
    """A command: `python -m tools.bench part --key=value …`.

    Attributes:
      part: a part of tools.bench.
      flags: {name: value}, or a function that makes them from earlier figures, {name of row: figures},
        and returns None if those it needs are missing.
      minutes: how long it may take; it is only started with as much time left.
    """

    part: str
    flags: dict | Callable
    minutes: float


_STEP = dict(what="lora", rounds=5, steps=4)
_ALONE = dict(_STEP, peer="none", rounds=3)
_MINUTES = 4.0  # for starting both sides; the measurement itself takes seconds


def _best(found, prefix, side):
    """The figures with the most examples per second of a side, among "train" and rows with the prefix."""
    rows = [x for n, x in found.items() if n == "train" or n.startswith(prefix)]
    rows = [x for x in rows if side in x.get("per_second", {})]
    return max(rows, key=lambda x: x["per_second"][side], default=None)


def _best_of_each(found):
    ours, theirs = _best(found, "train-ours", "ours"), _best(found, "train-hf", "hf")
    if ours is None or theirs is None:
        return None
    return dict(
        _STEP,
        peer="hf",
        batch_size=ours["batch_size"]["ours"],
        peer_batch_size=theirs["batch_size"]["hf"],
        remat_policy=ours["ours"]["remat_policy"],
        attn_impl=ours["ours"]["attn_impl"],
    )


def _ours(batch_size, remat_policy="nothing_saveable", attn_impl="xla"):
    flags = dict(batch_size=batch_size, remat_policy=remat_policy, attn_impl=attn_impl)
    return Row("train_step", dict(_ALONE, **flags), 3.0)


def _frozen(batch_size, dtype):
    """Quantised; by default with the size's batch, like "train"."""
    batch = dict(batch_size=batch_size) if batch_size else {}
    return Row("train_step", dict(_ALONE, **batch, frozen_dtype=dtype), 5.0)


def _theirs(batch_size):
    # Ours is only needed for its count of FLOPs, so its batch is one, which takes little memory.
    flags = dict(_STEP, peer="hf", batch_size=1, peer_batch_size=batch_size, rounds=3)
    return Row("train_step", flags, 3.0)


_DOTS = "dots_with_no_batch_dims_saveable"
ROWS = {
    "train": Row("train_step", dict(_STEP, peer="hf"), _MINUTES),
    "decode": Row("decode", dict(peer="hf", rounds=5), _MINUTES),
    "memory-1": Row("train_step", dict(_ALONE, batch_size=1), 3.0),
    "train-ours-16": _ours(16),
    "train-ours-16-cudnn": _ours(16, attn_impl="cudnn"),
    "train-ours-32": _ours(32),
    "train-ours-16-dots": _ours(16, _DOTS),
    "train-ours-4-none": _ours(4, "none"),
    "train-hf-4": _theirs(4),
    "train-hf-16": _theirs(16),
    "train-best": Row("train_step", _best_of_each, _MINUTES),
    "memory-1-int8": _frozen(1, "int8"),
    "memory-1-nf4": _frozen(1, "nf4"),
    "frozen-int8": _frozen(None, "int8"),
    "frozen-nf4": _frozen(None, "nf4"),
    "train-stage1": Row("train_step", dict(_STEP, what="stage1", peer="hf"), _MINUTES),
    "saliency": Row("saliency", dict(peer="hf"), _MINUTES),
    # In float32 greedy answers must be equal, which shows that `decode` measures the same work.
    "decode-same": Row("decode", dict(peer="hf", rounds=1, dtype="float32"), 7.0),
    "load": Row("load", dict(peer="hf", rounds=1), 6.0),
}


def run(*, out, minutes, size, only, retry) -> dict:
    """Runs the remaining rows of ROWS.

    Args:
      out: folder of figures.
      minutes: how long this call may take.
      size: a name in `sizes.SIZES`.
      only: names of rows; None is all.
      retry: also run failed rows again.

    Returns:
      dict(left: rows still to run, failed: {row: why}, row: a Markdown table of all figures).

    Raises:
      ValueError: no `out`, an unknown row or size, figures of another size in `out`.
    """
    if not out:
        raise ValueError("give --out, a folder for the figures.")
    sizes.check(size, "lora", None)
    if unknown := sorted(set(only or ()) - set(ROWS)):
        raise ValueError(f"--only has {unknown}; expected some of {list(ROWS)}.")
    out = os.path.abspath(os.path.expanduser(out))
    os.makedirs(os.path.join(out, "cache"), exist_ok=True)
    found, end = read(out, size), time.monotonic() + 60 * minutes
    began = False
    for name, row in ROWS.items():
        before = found.get(name)
        if (only and name not in only) or (before and not (retry and "error" in before)):
            continue
        flags = row.flags(found) if callable(row.flags) else row.flags
        if flags is None:
            continue
        left = end - time.monotonic()
        # The first row is always started, or a call could do nothing.
        if began and left < 60 * row.minutes:
            print(f"{name}: for another call", file=sys.stderr)
            break
        figures = _run_one(out, name, row.part, {"size": size, **flags}, max(left, 1))
        if figures is None and began:
            break
        began = True
        if figures is None:
            figures = dict(error=f"took longer than --minutes={minutes:g}.", size=size)
        files.write_text(os.path.join(out, f"{name}.json"), json.dumps(figures, indent=1) + "\n")
        found[name] = figures
        print(f"{name}: {figures.get('error') or figures.get('row')}", file=sys.stderr)
    wanted = [n for n in ROWS if not only or n in only]
    return dict(
        left=[n for n in wanted if n not in found],
        failed={n: found[n]["error"] for n in wanted if "error" in found.get(n, {})},
        row=table({n: found[n] for n in wanted if n in found}),
    )


def read(out, size) -> dict:
    """{row: figures} of a folder."""
    found = {}
    for name in ROWS:
        path = os.path.join(out, f"{name}.json")
        if os.path.exists(path):
            with open(path, encoding="utf-8") as f:
                found[name] = json.load(f)
            if found[name].get("size") != size:
                raise ValueError(
                    f"{path} is of size {found[name].get('size')!r}; expected {size!r}: give another --out."
                )
    return found


def table(found) -> str:
    """A Markdown table of the rows that have figures; a part's `row` is its line."""
    head = ["row", "work", "seconds: ours, theirs", "processor's", "ratio", "of processor time"]
    head += ["memory, GB", "TFLOP/s", "of peak", "device"]
    lines = [markdown.head(head, left=len(head))]
    for name, figures in found.items():
        if "row" in figures:
            cells = [x.strip() for x in figures["row"].strip("| ").split("|")]
            cells[5:5] = [""] * (len(head) - 1 - len(cells))  # `load` has no FLOPs
            lines.append(markdown.row([name, *cells]))
    return "\n".join(lines)


def _run_one(out, name, part, flags, seconds):
    """Figures of one command, whose output goes to a log; None if it took too long."""
    made = os.path.join(out, "cache", "figures.json")
    given = [f"--{k}={v}" for k, v in flags.items()]
    # A run beside other work is marked as invalid, not lost: the GPU may be ours for minutes only.
    kept = [f"--weights={out}/cache/weights", f"--json={made}", "--allow_busy"]
    command = [sys.executable, "-m", "tools.bench", part, *given]
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": os.path.join(out, "cache", "jax")}
    log = os.path.join(out, f"{name}.log")
    if os.path.exists(made):
        os.remove(made)
    start = time.monotonic()
    with open(log, "w", encoding="utf-8") as f:
        # A new process group, so that its sides can be ended with it.
        process = subprocess.Popen(
            [*command, *kept],
            stdout=f,
            stderr=f,
            stdin=subprocess.DEVNULL,
            env=env,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _end(process)
    about = dict(
        command=" ".join(["python", *command[1:]]), size=flags["size"], took_seconds=round(time.monotonic() - start, 1)
    )
    if process.returncode:
        with open(log, encoding="utf-8") as f:
            said = [x for x in f.read().splitlines() if x.strip()]
        # A failed side says why; the driver's own message follows.
        why = [x for x in said[:-1] if re.match(r"[\w.]*Error\b", x)][-1:] + said[-1:]
        return {**about, "error": " ".join(why) or f"status {process.returncode}"}
    with open(made, encoding="utf-8") as f:
        return {**json.load(f), **about}


def _end(process):
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
