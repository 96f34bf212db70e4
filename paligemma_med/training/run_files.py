"""The files of a run besides its checkpoints: config.json, base.npz, base.json, and those that grow
line by line (metrics.jsonl, nonfinite.jsonl, skipped.jsonl).

The former are written whole or not at all; lines are appended and flushed to disk. With several processes
the first one writes, and all must share the folder.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator

import jax
import ml_collections
import numpy as np
from absl import logging

from paligemma_med import files
from paligemma_med.checkpoints import bv, fingerprint, finite, hub, npz, step_lines, workdir
from paligemma_med.config import eval_names
from paligemma_med.config import files as config_files
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import distributed

_GROWING = ("metrics.jsonl", "nonfinite.jsonl", "skipped.jsonl")


@contextlib.contextmanager
def sole_use(folder: str) -> Iterator[None]:
    """In a `with`: no other run is in `folder`, which is made if need be. Collective.

    Raises:
      OSError: one is; it names host and process. Raised in all processes.
    """
    with contextlib.ExitStack() as stack:
        problem = None
        if distributed.is_main():
            try:
                os.makedirs(folder, exist_ok=True)
                stack.enter_context(files.sole_use(folder, "give another --workdir"))
            except OSError as e:
                problem = str(e)
        if problem := distributed.broadcast(problem):
            raise OSError(problem)
        yield


def with_pinned_init(config: ml_collections.ConfigDict, folder: str) -> ml_collections.ConfigDict:
    """The config with which a run is started or resumed in `folder`.

    A run may start from the newest checkpoint of another run, which may have newer ones by now, or from a model of the
    Hub, which may have a newer commit. A resumed run stays
    with the checkpoint it started from: model_init names its step.
    """
    init = config.get("model_init")
    if workdir.newest_step(folder) is None or not isinstance(init, str):
        return config
    old = workdir.read_config(folder).get("model_init")
    is_same = hub.is_pinned_from(old, init)
    init = os.path.abspath(os.path.expanduser(init.removesuffix("@best")))
    if not is_same and (not isinstance(old, str) or init not in {old.rpartition("@")[0], *bv.pinned_from(old)}):
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.model_init = old
    return config


def load_kept(folder: str, expected: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The frozen leaves that model_init doesn't give, unchanged since the run's start.

    Args:
      expected: {name: array} of the same shapes, with the type and sharding to use.

    Returns:
      {name: array}; empty if the run wrote none.

    Raises:
      npz.CheckpointError: base.npz has other leaves.
    """
    path = os.path.join(folder, "base.npz")
    if not expected or not os.path.exists(path):
        return {}
    host = flatten_tree(finite.checked(npz.open_npz(path), path))
    if host.keys() != expected.keys():
        raise npz.CheckpointError(f"{path} holds other parameters than the config freezes.")
    return {n: distributed.place(np.asarray(host[n]).astype(x.dtype), x.sharding) for n, x in expected.items()}


def check_base(folder: str, config: ml_collections.ConfigDict, base: dict[str, jax.Array], step: int) -> None:
    """Refuses to resume a run with other frozen weights than it began with; records them when it begins.

    Args:
      base: the frozen leaves that model_init gives.
      step: steps taken so far.

    Raises:
      npz.CheckpointError: the weights differ; it names both, and the first leaf that differs.
    """
    names = sorted(base)
    prints = dict(zip(names, fingerprint.of_leaves([base[n] for n in names])))
    now = {
        "model_init": json.loads(config_files.to_json(config)).get("model_init"),
        "frozen_dtype": config.get("frozen_dtype", "float32"),
        "fingerprints": prints,
    }
    path = os.path.join(folder, "base.json")
    if step and os.path.exists(path):
        then = workdir.read_base(folder)
        was = then["fingerprints"]
        wrong = sorted(n for n in {*prints, *was} if prints.get(n) != was.get(n))
        if wrong:
            raise npz.CheckpointError(
                f"{folder} was trained on the frozen weights {then['model_init']} in "
                f"{then['frozen_dtype']}; {now['model_init']} in {now['frozen_dtype']} has other "
                f"ones in {len(wrong)} parameters, the first is {wrong[0]}. Give it back its "
                "weights, or start anew in another --workdir."
            )
    elif prints:
        write(path, json.dumps(now, indent=1) + "\n")
    elif os.path.exists(path) and distributed.is_main():
        os.remove(path)


def start(folder: str, config: ml_collections.ConfigDict, kept: dict[str, jax.Array], first_step: int) -> None:
    """Writes config.json and the frozen leaves that model_init doesn't give; removes the lines of later steps.
    Collective.

    Args:
      kept: those leaves. first_step: steps taken so far.
    """
    text = config_files.to_json(config)
    path = os.path.join(folder, "config.json")
    if first_step and os.path.exists(path):
        if changed := _changes(workdir.read_config(folder), json.loads(text)):
            logging.warning(
                "The config isn't the one this run began with; it continues with the new one: %s",
                "; ".join(changed),
            )
    distributed.barrier("config.json is read")
    write(path, text)
    path = os.path.join(folder, "base.npz")
    if not first_step:  # a run without any checkpoint may have left one
        kept = distributed.to_host(kept)
        if distributed.is_main():
            if kept:
                npz.save_npz(path, unflatten_tree(kept))
            elif os.path.exists(path):
                os.remove(path)
    # Steps after the checkpoint are repeated, and would be listed twice.
    for name in _GROWING:
        path = os.path.join(folder, name)
        if distributed.is_main() and os.path.exists(path):
            write(path, "".join(line for line, row in step_lines.read(path) if row["step"] <= first_step))


def _changes(was, now, where="config"):
    """["config.lr was 0.001 and is now 0.01", …]: the differences of two configs read from JSON."""
    if was == now:
        return []
    if not (isinstance(was, dict) and isinstance(now, dict)):
        text = f"{where} was {was!r} and is now {now!r}"
        return [text if len(text) < 200 else f"{where} is another"]
    out = []
    for key in sorted({*was, *now}):
        out += _changes(was.get(key), now.get(key), f"{where}.{key}")
    return out


def write(path, text) -> None:
    """Replaces a whole file, in the main process."""
    if not distributed.is_main():
        return
    try:
        files.write_text(path, text)
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror}.") from e


def append(folder, name, step, values) -> None:
    """Adds a line to one of the growing files, and flushes it to disk."""
    path = os.path.join(folder, name)
    try:
        with open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
            f.flush()
            os.fsync(f.fileno())
    except OSError as e:
        raise OSError(f"{path} can't be written: {e.strerror}.") from e


def evals_at(folder, step, names) -> set[str]:
    """Which of the evaluators `names` have metrics of `step`."""
    lines = step_lines.read(os.path.join(folder, "metrics.jsonl"))
    metrics = {k for _, row in lines if row["step"] == step for k in row}
    return {name for name, _ in (eval_names.split_metric(k, names) for k in metrics) if name}


def add_metrics(folder, step, metrics) -> None:
    """Adds metrics to the line of `step`. Values that aren't finite become null."""
    if not distributed.is_main():
        return
    metrics = {k: v if math.isfinite(v) else None for k, v in metrics.items()}
    path = os.path.join(folder, "metrics.jsonl")
    if any("/" in k for k in metrics):
        lines = step_lines.read(path)
        if lines and (row := lines[-1][1])["step"] == step:
            write(path, "".join(line for line, _ in lines[:-1]) + json.dumps({**row, **metrics}) + "\n")
            return
    append(folder, "metrics.jsonl", step, metrics)
