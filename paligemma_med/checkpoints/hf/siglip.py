"""SigLIP's image tower in Hugging Face's names (transformers' SiglipVisionModel)."""

import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf.config import Section, check_agrees
from paligemma_med.checkpoints.hf.layout import Row, dense, norm
from paligemma_med.models import vit

TYPES = ("siglip_vision_model",)
# Keys missing in a config.json have their class' default; these are transformers 5.23's,
# models/siglip/configuration_siglip.py.
DEFAULTS = {
    "siglip_vision_model": dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_channels=3,
        image_size=224,
        patch_size=16,
    ),
}
# What our tower computes without having an argument for it.
FIXED = {"siglip_vision_model": dict(hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6)}
_COMPUTES = dict(gelu="tanh", norm_eps=1e-6, final_norm=1e-6, mean=None, std=None)  # as arguments of our tower
BUFFERS = (r"embeddings\.position_ids",)  # saved by some versions of transformers; nothing learned


def rows(paths: Collection[str], name: str, part: str = "img") -> Iterator[Row]:
    """The rows of a tower.

    Args:
      paths: of our tower's leaves; every tower has all of these.
      name: their tower's canonical name.
      part: our part's name.
    """
    del paths
    at, block = f"{name}.embeddings", f"{part}/Transformer/encoderblock"
    yield Row(f"{at}.patch_embedding.weight", "D C Y X", f"{part}/embedding/kernel")
    yield Row(f"{at}.patch_embedding.bias", "D", f"{part}/embedding/bias")
    yield Row(f"{at}.position_embedding.weight", "T D", f"{part}/pos_embedding")
    at, attn = f"{name}.encoder.layers.{{i}}", f"{block}/MultiHeadDotProductAttention_0"
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"), ("out_proj", "out")):
        yield from dense(f"{at}.self_attn.{theirs}", f"{attn}/{ours}")
    for theirs, ours in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
        yield from dense(f"{at}.mlp.{theirs}", f"{block}/MlpBlock_0/{ours}")
    yield from norm(f"{at}.layer_norm1", f"{block}/LayerNorm_0", bias=True)
    yield from norm(f"{at}.layer_norm2", f"{block}/LayerNorm_1", bias=True)
    yield from norm(f"{name}.post_layernorm", f"{part}/Transformer/encoder_norm", bias=True)


def describe(section: Section, out_width: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Our dict and the sizes of a tower that feeds a language model of width `out_width`.

    Raises:
      CheckpointError: numbers that don't make a tower.
    """
    width, heads, patch, side = (
        section.number(k) for k in ("hidden_size", "num_attention_heads", "patch_size", "image_size")
    )
    if width % heads or side % patch:
        raise CheckpointError(
            f"{section.path}: {heads} heads must divide the tower's width of {width}, and patches of "
            f"{patch} px images of {side} px"
        )
    img = dict(
        variant=None,
        width=width,
        depth=section.number("num_hidden_layers"),
        mlp_dim=section.number("intermediate_size"),
        num_heads=heads,
        patch_size=patch,
    )
    size = dict(
        Y=patch,
        X=patch,
        C=section.number("num_channels"),
        T=(side // patch) ** 2,
        D=width,
        N=heads,
        H=width // heads,
        F=img["mlp_dim"],
        E=out_width,
        L=img["depth"],
    )
    return img, size


def make_section(size: Mapping[str, int], img: Mapping[str, Any] | None) -> dict[str, Any]:
    """vision_config of a tower of these sizes.

    Args:
      img: our dict for it, or None.

    Raises:
      CheckpointError: transformers has no such tower, or `img` gives other sizes.
    """
    side = math.isqrt(size["T"])
    if size["Y"] != size["X"] or side**2 != size["T"]:
        raise CheckpointError(
            f"expected square patches on a square grid: found patches of {size['Y']}×{size['X']} px, "
            f"{size['T']} positions"
        )
    if img is not None:
        given = {**(vit.decode_variant(img["variant"]) if img.get("variant") else {}), **img}
        if isinstance(given.get("patch_size"), int):
            given["patch_size"] = (given["patch_size"],) * 2
        ours = dict(width=size["D"], depth=size["L"], mlp_dim=size["F"], num_heads=size["N"])
        check_agrees("img", given, dict(ours, patch_size=(size["Y"], size["X"])))
        for key, value in _COMPUTES.items():
            if given.get(key, value) != value:
                raise CheckpointError(f"img has {key}={given[key]!r}, but transformers' SigLIP has {value!r}")
    return dict(
        model_type=TYPES[0],
        hidden_size=size["D"],
        intermediate_size=size["F"],
        num_hidden_layers=size["L"],
        num_attention_heads=size["N"],
        num_channels=size["C"],
        patch_size=size["Y"],
        image_size=side * size["Y"],
        num_image_tokens=size["T"],
        projection_dim=size["E"],
        vision_use_head=False,
    )
