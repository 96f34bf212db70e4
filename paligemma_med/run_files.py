"""The files of a run beside its checkpoints: config.json, base.npz, metrics.jsonl.

All are written whole or not at all, or appended line by line and flushed to the disk.
"""

import json
import os

import jax
from absl import logging

from paligemma_med import experiment
from paligemma_med.checkpoints import npz


def own_base(workdir, frozen, beside):
    """Of the frozen leaves, those that model_init doesn't give, as the run has had them from its
    start: {name: array}."""
    path = os.path.join(workdir, "base.npz")
    expected = {n: x for n, x in frozen.items() if n in beside}
    if not expected or not os.path.exists(path):
        return {}
    host = npz.flatten_tree(npz.load_npz(path))
    if host.keys() != expected.keys():
        raise npz.CheckpointError(f"{path} holds other parameters than the config freezes.")
    return {n: jax.device_put(host[n].astype(x.dtype), x.sharding) for n, x in expected.items()}


def start_workdir(workdir, config, base, first_step):
    """Writes config.json and the frozen leaves that model_init doesn't give; trims metrics after
    resume."""
    text = experiment.config_to_json(config)
    path = os.path.join(workdir, "config.json")
    if first_step and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if f.read() != text:
                logging.warning("%s differs from the config given; it is overwritten.", path)
    write_atomically(path, text)
    path = os.path.join(workdir, "base.npz")
    if not first_step:  # An older one may stand there, of a run that never made a checkpoint.
        if base:
            npz.save_npz(path, npz.unflatten_tree(jax.device_get(base)))
        elif os.path.exists(path):
            os.remove(path)
    # Steps after the checkpoint are taken again, and would stand twice.
    metrics = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(metrics):
        with open(metrics, encoding="utf-8") as f:
            lines = [s for s in f if s.endswith("\n") and json.loads(s)["step"] <= first_step]
        write_atomically(metrics, "".join(lines))


def write_atomically(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def _metrics_of(line, step):
    row = json.loads(line)
    return row if row["step"] == step else {}


def evals_at(workdir, step):
    """Names of the evaluators that have metrics of `step`."""
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as f:
        return {k.partition("/")[0] for line in f for k in _metrics_of(line, step) if "/" in k}


def add_metrics(workdir, step, metrics):
    """One object a step: to that of `step`, if there is one already, `metrics` are added."""
    path = os.path.join(workdir, "metrics.jsonl")
    if any("/" in k for k in metrics) and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        if lines and (row := _metrics_of(lines[-1], step)):
            write_atomically(path, "".join(lines[:-1]) + json.dumps({**row, **metrics}) + "\n")
            return
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": step, **metrics}) + "\n")
        f.flush()
        os.fsync(f.fileno())
