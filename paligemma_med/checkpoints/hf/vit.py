"""Image towers by themselves in Hugging Face's names (transformers' ViTModel), such as BiomedCLIP's.

Canonical names are those of files, which transformers 5 still writes; its modules, and so PEFT's adapters made with it,
have others.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import config, siglip, towers
from paligemma_med.checkpoints.hf.layout import Row, Sizes
from paligemma_med.models import vit

MODEL_TYPE = "vit"
NAME = "ViT"
STYLES, PUBLISHED, PADDING = {"4.41": {}, "5": {}}, "4.41", 0
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
GELUS = {"gelu": "exact", "gelu_pytorch_tanh": "tanh", "quick_gelu": "quick"}
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


def in_style(name: str, style: str) -> str:
    """A canonical name as the modules of versions of transformers from `style` on have it."""
    match = re.fullmatch(r"encoder\.layer\.([^.]+)\.(.+)", name)
    if style == "4.41" or not match:
        return name
    layer, rest = match.groups()
    for new, old in _MODULES.items():
        if rest == old or rest.startswith(f"{old}."):
            rest = new + rest.removeprefix(old)
            break
    return f"layers.{layer}.{rest}"


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


make_processor = config.no_processor


def make_config(
    sizes: Sizes,
    paths: Collection[str],
    img: Mapping[str, Any] | None,
    llm: Mapping[str, Any] | None,
    connector: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The config.json of a tower; arguments and errors are `families.Family.make_config`'s."""
    del paths, llm, connector
    size = sizes["img"]
    if img is None:
        raise CheckpointError(
            "an image tower's activation and eps are not among its weights: say them with img=dict(…)"
        )
    made = vit.Model(**{**img, "num_classes": None})
    side, eps = math.isqrt(size["T"] - 1), made.norm_eps
    config.check_agrees("img", img, dict(width=size["D"], depth=size["L"], mlp_dim=size["F"], num_heads=size["N"]))
    if made.final_norm != eps or not made.key_bias:
        raise CheckpointError(
            f"transformers' {NAME} has biases of keys and a last norm with the others' eps ({eps}): this tower has "
            f"final_norm={made.final_norm} and key_bias={made.key_bias}"
        )
    if size["Y"] != size["X"] or side**2 + 1 != size["T"]:
        raise CheckpointError(
            f"expected square patches on a square grid, and a class token: found patches of {size['Y']}×"
            f"{size['X']} px, {size['T']} positions"
        )
    return dict(
        architectures=["ViTModel"],
        model_type=MODEL_TYPE,
        hidden_size=size["D"],
        intermediate_size=size["F"],
        num_hidden_layers=size["L"],
        num_attention_heads=size["N"],
        num_channels=size["C"],
        image_size=side * size["Y"],
        patch_size=size["Y"],
        layer_norm_eps=eps,
        hidden_act={ours: theirs for theirs, ours in GELUS.items()}[made.gelu],
        qkv_bias=True,
    )
