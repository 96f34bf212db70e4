"""The adapter in a checkpoint of MiniGPT-v2 or PeFoMed: PEFT's factors of a LLaMA, in one file with other weights.

MiniGPT-4, minigpt4/models/minigpt_v2.py and runners/runner_base.py: a checkpoint keeps what was trained, which is
`llama_proj` (see `hf.originals`) and these. It is a pickle; `tools.torch_to_safetensors` makes safetensors of it.
"""

import os
import re

import ml_dtypes  # noqa: F401 (numpy knows "bfloat16" once it is imported, and safetensors needs that)
import safetensors

from paligemma_med.checkpoints import peft
from paligemma_med.checkpoints.adapter import Adapter
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import assemble, tensors

NAME = "MiniGPT"
_BEGIN = "llama_model."
_KEY = re.compile(rf"{re.escape(_BEGIN)}base_model\.model\..+\.lora_[AB](?:\.default)?\.weight")
# Their class' defaults, which the file doesn't hold; the rank is that of its factors.
_ALPHA, _DROPOUT = 16, 0.05


def is_adapter(path: os.PathLike | str) -> bool:
    """Whether a file is one of safetensors with such factors."""
    return os.path.isfile(path) and str(path).endswith(".safetensors") and bool(_keys(path))


def _keys(path):
    """The factors' names; none if it is no such file."""
    try:
        return [tensor.name for tensor in tensors.open_all(os.fspath(path)) if _KEY.fullmatch(tensor.name)]
    except CheckpointError:
        return []


def load_adapter(path: os.PathLike | str, *, allow_nonfinite: bool = False) -> Adapter:
    """Reads the factors, scaled by MiniGPT-v2's own alpha, 16, which is said on stderr.

    Args:
      path: the file.
      allow_nonfinite: whether factors may be NaN or infinite.

    Raises:
      CheckpointError: it is damaged, or keys are missing or unexpected.
    """
    path = os.path.expanduser(os.fspath(path))
    with safetensors.safe_open(path, "np") as f:
        factors = {key.removeprefix(_BEGIN): f.get_tensor(key) for key in _keys(path)}
    first = next(iter(factors))
    rank = min(factors[first].shape)
    modules = sorted({re.split(r"\.lora_[AB]\.", key)[0].rpartition(".")[2] for key in factors})
    assemble.tell(f"{path} doesn't say how its adapter is scaled: alpha is {_ALPHA}, as in MiniGPT-v2's code")
    config = dict(r=rank, lora_alpha=_ALPHA, lora_dropout=_DROPOUT, target_modules=modules)
    return peft.of_tensors(path, config, factors, allow_nonfinite=allow_nonfinite)
