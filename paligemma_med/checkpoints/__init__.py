"""Reading and writing weights and adapters. `open_params` takes any form of weights and returns one tree.

Each form is a file (npz, hf, orbax, workdir, bv: big_vision's own; peft: adapters); `forms` recognises them, `fit`
fits the weights to a model, and `adapter` inserts and extracts adapters.
"""

from paligemma_med.checkpoints.adapter import (
    Adapter,
    apply_adapter,
    extract_adapter,
    insert_adapter,
    merge,
    remove_adapter,
    rules_of,
)
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.fit import (
    extend_vocab,
    match_params,
    resample_posemb,
    stack_layers,
    unstack_layers,
)
from paligemma_med.checkpoints.forms import (
    kind_of,
    load_adapter,
    load_init,
    load_params,
    open_init,
    open_params,
    save_adapter,
)
from paligemma_med.checkpoints.hf import model_config, open_hf, save_hf
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.checkpoints.npz import load_npz, open_npz, save_npz, split_spec

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
