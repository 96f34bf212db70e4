"""Where weights come from and go to. `load_params` takes any of the forms and gives one tree."""

import os
from collections.abc import Mapping

from paligemma_med.checkpoints.adapter import (
    Adapter,
    apply_adapter,
    extract_adapter,
    insert_adapter,
    merge,
    remove_adapter,
    rules_of,
)
from paligemma_med.checkpoints.npz import (
    CheckpointError,
    extend_vocab,
    load_npz,
    match_params,
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
    "apply_adapter",
    "extend_vocab",
    "extract_adapter",
    "insert_adapter",
    "load_adapter",
    "load_init",
    "load_npz",
    "load_params",
    "match_params",
    "merge",
    "remove_adapter",
    "resample_posemb",
    "rules_of",
    "save_adapter",
    "save_npz",
    "split_spec",
    "stack_layers",
    "unstack_layers",
]

_FORMS = (
    "a big_vision file 'x.npz', a part of one 'x.npz:img', or a workdir of this project (a folder "
    "with config.json and checkpoints/)"
)


def load_params(spec) -> dict:
    """Reads weights into a nested dict of numpy arrays named as big_vision names them.

    Args:
      spec: "x.npz", "x.npz:img" or a workdir.

    Returns:
      {"img": …, "llm": …} (or the subtree asked for), layers stacked on a leading axis; dtypes as
      stored. Fit it to a model with `match_params`.

    Raises:
      FileNotFoundError: nothing is there.
      CheckpointError: it is none of the accepted forms, or is damaged.
    """
    spec = os.path.expanduser(os.fspath(spec))
    if os.path.isdir(spec):
        entries = set(os.listdir(spec))
        if {"config.json", "checkpoints"} <= entries:
            from paligemma_med.checkpoints import workdir  # needs Orbax, which is slow to import

            return workdir.load_params(spec)
        if any(e.endswith((".safetensors", ".safetensors.index.json")) for e in entries):
            raise CheckpointError(
                f"{spec} looks like a Hugging Face directory, which is not supported yet: "
                f"expected {_FORMS}"
            )
        raise CheckpointError(f"{spec} is a folder without weights: expected {_FORMS}")
    if "@" in spec:
        from paligemma_med.checkpoints import workdir

        if workdir.split_spec(spec):
            return workdir.load_params(spec)
    path, subtree = split_spec(spec)
    if path.lower().endswith(".npz"):
        return stack_layers(load_npz(path, subtree))
    if not os.path.exists(path):
        raise FileNotFoundError(f"no weights at {spec}: expected {_FORMS}")
    raise CheckpointError(f"{spec} is not a form of weights known here: expected {_FORMS}")


def load_init(spec) -> dict:
    """`config.model_init`: one spec for `load_params`, or a mapping img=spec, llm=spec."""
    if not isinstance(spec, Mapping):
        return load_params(spec)
    if set(spec) != {"img", "llm"}:
        raise ValueError(f"model_init has the keys {sorted(spec)}: expected a path, or img and llm")
    return {part: load_params(path) for part, path in spec.items()}
