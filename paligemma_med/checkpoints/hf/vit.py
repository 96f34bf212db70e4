"""Image towers by themselves in Hugging Face's names (transformers' ViTModel), such as BiomedCLIP's.

Canonical names are those of files, which transformers 5 still writes; its modules, and so PEFT's adapters made with it,
have others.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, siglip, towers
from paligemma_med.checkpoints.hf.layout import Row

MODEL_TYPE = "vit"
NAME = "ViT"
STYLES, PUBLISHED, PADDING = {"4.41": {"encoder": "encoder"}}, "4.41", 0
BUFFERS = ()
UNREAD = (r"pooler\..*", r"classifier\..*")
EMBEDDING, HEAD = "", ""
# Keys missing in a config.json have their class' default; these are transformers 5.24's.
DEFAULTS = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_channels=3,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-12,
    hidden_act="gelu",
)
FIXED = dict(qkv_bias=True)
GELUS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh"}
_MODULES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


def table(paths: Collection[str]) -> tuple[Row, ...]:
    """All rows of a tower; every one has the same."""
    del paths
    return tuple(towers.rows(towers.HF_VIT))


def canonical(name: str) -> str:
    """A tensor's or module's name; "vit." may be in front, and layers may have the names of version 5's modules:
    "layers.0.attention.q_proj.weight" → "encoder.layer.0.attention.attention.query.weight"."""
    name = name.removeprefix("vit.")
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if not match:
        return name
    layer, rest = match.groups()
    for new, old in _MODULES.items():
        if rest == new or rest.startswith(f"{new}."):
            rest = old + rest.removeprefix(new)
            break
    return f"encoder.layer.{layer}.{rest}"


def describe(whole: Mapping[str, Any], path: str) -> config.Described:
    """The tower of a config.json. Its pixels' mean and deviation aren't in that file.

    Raises:
      CheckpointError: it needs something that our tower doesn't compute.
    """
    section = config.section(
        whole,
        None,
        path,
        types=(MODEL_TYPE,),
        absent={},
        defaults={MODEL_TYPE: DEFAULTS},
        fixed={MODEL_TYPE: FIXED},
    )
    if section["hidden_act"] not in GELUS:
        raise CheckpointError(f"{path}: hidden_act is {section['hidden_act']!r}, expected {' or '.join(GELUS)}")
    img, size = siglip.describe(section, 1)
    del size["E"]
    size["T"] += 1
    eps = section.positive("layer_norm_eps")
    img |= dict(cls=True, gelu=GELUS[section["hidden_act"]], norm_eps=eps, final_norm=eps)
    return config.Described(img, None, dict(img=size))


make_config = config.read_only(NAME)
