"""Image towers with a class token, under the names that they have in different files: one table of rows for all.

timm's is open_clip's BiomedCLIP, EVA's is LAVIS' and MiniGPT's (models/eva_vit.py), the other two are transformers'
(models/vit/modeling_vit.py, models/blip_2/modeling_blip_2.py). All have the same layers; q, k and v are three linear
layers or one.
"""

from collections.abc import Iterator
from typing import NamedTuple

from paligemma_med.checkpoints.hf.layout import Row, dense, norm

_BLOCK = "img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"


class Names(NamedTuple):
    """Names of a tower's modules and parameters; those of a layer follow `layer`.

    Attributes:
      attention: the linear layers of query, key and value, or the one that holds all three.
      biases: their biases, without that of keys if those have none; None: the linear layers' own.
      norm: the last norm.
      cls_axes, position_axes: layouts of the class token and of the positions.
      pre_norm: the norm in front of the layers, if there is one.
      patch_bias: whether the patches' layer has a bias.
    """

    patches: str
    cls: str
    positions: str
    layer: str
    attention: tuple[str, ...]
    out: str
    norms: tuple[str, str]
    mlp: tuple[str, str]
    norm: str
    biases: tuple[str, ...] | None = None
    cls_axes: str = "1 1 D"
    position_axes: str = "1 T D"
    pre_norm: str | None = None
    patch_bias: bool = True


HF_VIT = Names(
    patches="embeddings.patch_embeddings.projection",
    cls="embeddings.cls_token",
    positions="embeddings.position_embeddings",
    layer="encoder.layer.{i}",
    attention=tuple(f"attention.attention.{name}" for name in ("query", "key", "value")),
    out="attention.output.dense",
    norms=("layernorm_before", "layernorm_after"),
    mlp=("intermediate.dense", "output.dense"),
    norm="layernorm",
)
TIMM = Names(
    patches="trunk.patch_embed.proj",
    cls="trunk.cls_token",
    positions="trunk.pos_embed",
    layer="trunk.blocks.{i}",
    attention=("attn.qkv",),
    out="attn.proj",
    norms=("norm1", "norm2"),
    mlp=("mlp.fc1", "mlp.fc2"),
    norm="trunk.norm",
)
EVA = TIMM._replace(biases=("attn.q_bias", "attn.v_bias"), norm="ln_vision")
# Its keys' third of the bias must be 0, which `originals` sees to.
BLIP2 = Names(
    patches="vision_model.embeddings.patch_embedding",
    cls="vision_model.embeddings.class_embedding",
    positions="vision_model.embeddings.position_embedding",
    layer="vision_model.encoder.layers.{i}",
    attention=("self_attn.qkv",),
    out="self_attn.projection",
    norms=("layer_norm1", "layer_norm2"),
    mlp=("mlp.fc1", "mlp.fc2"),
    norm="vision_model.post_layernorm",
)


def rows(names: Names, *, key_bias: bool = True) -> Iterator[Row]:
    """The rows of a tower whose keys have a bias or none."""
    yield Row(f"{names.patches}.weight", "D C Y X", "img/embedding/kernel")
    if names.patch_bias:
        yield Row(f"{names.patches}.bias", "D", "img/embedding/bias")
    yield Row(names.cls, names.cls_axes, "img/cls")
    yield Row(names.positions, names.position_axes, "img/pos_embedding")
    if names.pre_norm:
        yield from norm(names.pre_norm, "img/pre_norm", bias=True)
    yield from _attention_rows(names, key_bias)
    yield from dense(f"{names.layer}.{names.out}", f"{_ATTENTION}/out")
    for j in (0, 1):
        yield from norm(f"{names.layer}.{names.norms[j]}", f"{_BLOCK}/LayerNorm_{j}", bias=True)
        yield from dense(f"{names.layer}.{names.mlp[j]}", f"{_BLOCK}/MlpBlock_0/Dense_{j}")
    yield from norm(names.norm, "img/Transformer/encoder_norm", bias=True)


def _attention_rows(names, key_bias):
    ours = [f"{_ATTENTION}/{name}" for name in ("query", "key", "value")]
    fused = len(names.attention) == 1
    modules = [f"{names.layer}.{name}" for name in names.attention] * (3 if fused else 1)
    pieces = [(j, 3) if fused else (0, 1) for j in range(3)]
    for module, folder, piece in zip(modules, ours, pieces, strict=True):
        yield Row(f"{module}.weight", "(N H) D", f"{folder}/kernel", piece=piece)
    biased = [j for j in range(3) if key_bias or j != 1]
    apart = names.biases and dict(zip(biased, names.biases, strict=True))
    for j in biased:
        name, piece = (f"{names.layer}.{apart[j]}", (0, 1)) if apart else (f"{modules[j]}.bias", pieces[j])
        yield Row(name, "(N H)", f"{ours[j]}/bias", piece=piece)
