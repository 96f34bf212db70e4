"""Peak memory and time of converting a checkpoint of the full 3B model, with random bfloat16 weights.

    python -m tools.bench.convert_memory --folder=/scratch

Writes an npz of PaliGemma's shapes leaf by leaf (5.8 GB), converts it with the command that users run
(to Hugging Face and back, to Orbax, and with an adapter merged in), and prints a Markdown table.
Needs three times the checkpoint on disk; everything is deleted afterwards.
"""

import filecmp
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags

from paligemma_med import checkpoints
from paligemma_med.checkpoints import lazy, npz
from paligemma_med.models import lora_targets, vlm
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.pp import command_line, markdown

LORA = [("(img/Transformer|llm/layers)/.*(query|key|value|out|einsum)/(kernel|w)", dict(rank=8))]


def random_leaf(shape) -> lazy.Lazy:
    """Random bits as bfloat16, drawn when read; they include NaN, whose bits must be preserved too."""

    def read():
        out = np.empty(shape, np.uint16)
        flat, rng = out.reshape(-1), np.random.default_rng(out.size)
        for i in range(0, flat.size, 2**24):
            part = flat[i : i + 2**24]
            part[:] = rng.integers(0, 2**16, part.size, np.uint16)
        return out.view(lazy.BFLOAT16)

    return lazy.Lazy(shape, lazy.BFLOAT16, read)


def write_adapter(folder, tree) -> None:
    """A random adapter on the attention of both towers, as a PEFT folder."""
    flat, rng = flatten_tree(tree), np.random.default_rng(0)
    specs, factors = lora_targets.resolve(LORA, flat), {}
    for target, spec in specs.items():
        a, b = lora_targets.factor_shapes(target, spec, flat[target.param].shape)
        a, b = (rng.normal(0, 0.1, shape).astype("f4") for shape in (a, b))
        layers = len(a) if target.stacked else 1
        factors[target] = a.reshape(layers, -1, spec.rank), b.reshape(layers, spec.rank, -1)
    checkpoints.save_adapter(folder, checkpoints.Adapter(specs, factors))


def measure(*args) -> tuple:
    """Runs the converter; returns (seconds, peak resident memory in GB)."""
    command = [sys.executable, "-m", "tools.convert_checkpoint", *map(str, args)]
    start = time.monotonic()
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e9  # Linux gives kilobytes


def main(argv) -> None:
    del argv
    work = pathlib.Path(tempfile.mkdtemp(dir=flags.FLAGS.folder))
    try:
        tree = vlm.abstract_params(vlm.Model(), image_size=224)
        leaves = jax.tree.map(lambda x: random_leaf(x.shape), tree)
        size = sum(x.nbytes for x in jax.tree.leaves(leaves)) / 1e9
        largest = max(x.nbytes for x in jax.tree.leaves(leaves)) / 1e9
        print(f"{size:.2f} GB, largest leaf {largest:.2f} GB", flush=True)
        start, hf, orbax, back = (work / n for n in ("3b.npz", "hf", "orbax", "back.npz"))
        npz.save_npz(start, leaves)
        write_adapter(work / "adapter", tree)
        rows = [("npz → Hugging Face", *measure(start, hf, "--to=hf"))]
        rows.append(("Hugging Face → npz", *measure(hf, back, "--to=npz")))
        same = filecmp.cmp(start, back, shallow=False)
        back.unlink()
        shutil.rmtree(hf)
        rows.append(("npz → Orbax", *measure(start, orbax, "--to=orbax")))
        rows.append(("Orbax → npz", *measure(orbax, back, "--to=npz")))
        same &= filecmp.cmp(start, back, shallow=False)
        shutil.rmtree(orbax)
        back.unlink()
        merge = (start, hf, "--to=hf", "--merge", f"--adapter={work / 'adapter'}")
        rows.append(("npz and adapter, merged → Hugging Face", *measure(*merge)))
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(markdown.head(["conversion", "seconds", "peak resident memory, GB"]))
    for name, seconds, peak in rows:
        print(markdown.row([name, f"{seconds:.0f}", f"{peak:.2f}"]))
    print(f"round trips give the same bytes: {same}")


if __name__ == "__main__":
    command_line.define_path("folder", None, "Where 18 GB are free; default: the system's own.")
    app.run(main, flags_parser=command_line.parse_flags)
