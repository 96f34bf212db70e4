"""Where weights come from and go to. `open_params` takes any of the forms and gives one tree."""

import os
from collections.abc import Mapping

from paligemma_med.checkpoints import bv, lazy
from paligemma_med.checkpoints.adapter import (
    Adapter,
    apply_adapter,
    extract_adapter,
    insert_adapter,
    merge,
    remove_adapter,
    rules_of,
)
from paligemma_med.checkpoints.hf import model_config, open_hf, save_hf
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.checkpoints.npz import (
    CheckpointError,
    extend_vocab,
    load_npz,
    match_params,
    open_npz,
    resample_posemb,
    save_npz,
    split_spec,
    stack_layers,
    unstack_layers,
)
from paligemma_med.checkpoints.peft import load_adapter, save_adapter

__all__ = [
    "Adapter",
    "CheckpointError",
    "Lazy",
    "apply_adapter",
    "extend_vocab",
    "extract_adapter",
    "insert_adapter",
    "kind_of",
    "load_adapter",
    "load_init",
    "load_npz",
    "load_params",
    "match_params",
    "merge",
    "model_config",
    "open_hf",
    "open_init",
    "open_npz",
    "open_params",
    "remove_adapter",
    "resample_posemb",
    "rules_of",
    "save_adapter",
    "save_hf",
    "save_npz",
    "split_spec",
    "stack_layers",
    "unstack_layers",
]

_FORMS = (
    "a big_vision file 'x.npz' or a part of one 'x.npz:img', a Hugging Face PaliGemma directory, "
    "an Orbax checkpoint, a workdir of this project (or one 'workdir@step' of its checkpoints), or "
    "a training checkpoint of big_vision's (folder, prefix 'x/checkpoint.bv' or workdir)"
)


def kind_of(spec) -> str:
    """Which form of weights `spec` names: "npz", "hf", "orbax", "workdir" or "big_vision".

    Raises:
      FileNotFoundError: nothing is there.
      CheckpointError: it is none of them.
    """
    spec = os.path.expanduser(os.fspath(spec))
    if os.path.isdir(spec):
        entries = set(os.listdir(spec))
        if {"config.json", "checkpoints"} <= entries:
            if bv.PREFIX + bv.LAST in entries:
                raise CheckpointError(
                    f"{spec} holds checkpoints of this project and of big_vision's: name "
                    f"{spec}@step, or {os.path.join(spec, bv.PREFIX)}"
                )
            return "workdir"
        if "adapter_config.json" in entries:
            raise CheckpointError(
                f"{spec} holds a PEFT adapter, not weights of a model: name it where adapters are "
                "taken (config.adapter_init, --adapter)"
            )
        if any(e.endswith((".safetensors", ".safetensors.index.json")) for e in entries):
            return "hf"
        if "_METADATA" in entries:
            return "orbax"
        if bv.find(spec):
            return "big_vision"
        if any(e.endswith((".bin", ".pt", ".pth")) for e in entries):
            raise CheckpointError(
                f"{spec} holds PyTorch pickles, which are never read: save it with safe_serialization=True"
            )
        raise CheckpointError(f"{spec} is a folder without weights: expected {_FORMS}")
    if "@" in spec:
        from paligemma_med.checkpoints import workdir  # needs Orbax, which is slow to import

        if workdir.split_spec(spec):
            return "workdir"
    path, _ = split_spec(spec)
    if path.lower().endswith(".npz"):
        return "npz"
    if bv.find(spec):
        return "big_vision"
    if not os.path.exists(path):
        raise FileNotFoundError(f"no weights at {spec}: expected {_FORMS}")
    raise CheckpointError(f"{spec} is not a form of weights known here: expected {_FORMS}")


def open_params(spec) -> dict:
    """Opens weights of any form: a nested dict whose leaves are named as big_vision names them.

    Args:
      spec: "x.npz", "x.npz:img", a Hugging Face PaliGemma directory, an Orbax checkpoint, a workdir
        or "workdir@step", or a training checkpoint of big_vision's, as `bv.find` takes it.

    Returns:
      {"img": …, "llm": …} (or the subtree asked for), layers stacked on a leading axis; dtypes as
      stored. Leaves are `Lazy`, which np.asarray reads, or already arrays. Fit it to a model with
      `match_params`, which reads none.

    Raises:
      FileNotFoundError: nothing is there.
      CheckpointError: it is none of the accepted forms, or is damaged.
    """
    spec = os.path.expanduser(os.fspath(spec))
    kind = kind_of(spec)
    if kind == "npz":
        return stack_layers(open_npz(spec))
    if kind == "hf":
        return open_hf(spec)
    if kind == "orbax":
        from paligemma_med.checkpoints import orbax

        return stack_layers(orbax.open_orbax(spec))
    if kind == "big_vision":
        return stack_layers(bv.open_bv(spec))
    from paligemma_med.checkpoints import workdir

    return workdir.open_params(spec)


def load_params(spec) -> dict:
    """`open_params`, all read into numpy arrays."""
    return lazy.read_all(open_params(spec))


def open_init(spec) -> dict:
    """`config.model_init`: one spec for `open_params`, or a mapping img=spec, llm=spec."""
    if not isinstance(spec, Mapping):
        return open_params(spec)
    if set(spec) != {"img", "llm"}:
        raise ValueError(f"model_init has the keys {sorted(spec)}: expected a path, or img and llm")
    return {part: open_params(path) for part, path in spec.items()}


def load_init(spec) -> dict:
    """`open_init`, all read into numpy arrays."""
    return lazy.read_all(open_init(spec))
