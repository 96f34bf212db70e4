"""Writing a config to a workdir's config.json, and reading it."""

import json
import os

import ml_collections

from paligemma_med.checkpoints import bv, compose, hub, npz, workdir


def to_json(config) -> str:
    """The config as JSON text. Paths of weights become absolute, and a workdir gets its newest step
    (`workdir.pin`), so that they are found later and still mean the same weights."""
    plain = json.loads(config.to_json_best_effort())
    init = plain.get("model_init")
    if isinstance(init, dict):
        plain["model_init"] = {k: absolute(v) for k, v in init.items()}
    elif init:
        plain["model_init"] = absolute(init)
    for key in ("adapter_init", "base"):
        if plain.get(key):
            plain[key] = absolute(plain[key])
    return json.dumps(plain, indent=2, sort_keys=True) + "\n"


def absolute(spec) -> str:
    """A spec of weights ("w.npz:img", a run's workdir, "img=a,llm=b") with absolute paths; of runs with their steps, of
    the Hub's models with their commits."""
    if several := compose.parts_of(spec):
        return ",".join(f"{part}={absolute(path)}" for part, path in several.items())
    if name := hub.pinned(spec):
        return name
    path, part = npz.split_spec(spec)
    path = os.path.abspath(os.path.expanduser(path))
    return bv.pin(workdir.pin(path)) + (f":{part}" if part else "")


def from_json(plain) -> ml_collections.ConfigDict:
    """The reverse: a dict read from config.json → ConfigDict (lists of pairs stay lists)."""
    return ml_collections.ConfigDict(plain)
