"""Hugging Face PaliGemma weights: their names and layouts, reading and writing, without PyTorch.

One table says which of their tensors makes which of our parameters. Names in it are canonical,
that is, without what the generations of transformers differ in; see `canonical`. transformers'
own table of PaliGemma is models/paligemma/convert_paligemma_weights_to_hf.py.

Axis letters: L layers, P and Q height and width of a patch, C colours, T image tokens, D width of a
tower, E width of the language model (where an image enters it), N query heads, K key/value heads,
H width of a head, F width of an MLP, V vocabulary. In a layout, axes in brackets are one axis.
"""

import re
from typing import NamedTuple


class Row(NamedTuple):
    """One kind of tensor.

    Attributes:
      name: its canonical name; "{i}" stands for the layer.
      theirs: its layout.
      param: path of our parameter, which has the layers (L) in front where the name has "{i}".
      ours: layout of the part of it that is this tensor, in one layer.
      index: place of that part on the axis after that of layers; None if there is but one.
    """

    name: str
    theirs: str
    param: str
    ours: str
    index: int | None = None

    @property
    def stacked(self):
        return "{i}" in self.name


def _rows():
    tower, block = "vision_tower", "img/Transformer/encoderblock"
    at = f"{tower}.embeddings"
    yield Row(f"{at}.patch_embedding.weight", "D C P Q", "img/embedding/kernel", "P Q C D")
    yield Row(f"{at}.patch_embedding.bias", "D", "img/embedding/bias", "D")
    # One position table, whose leading axis of 1 is no axis of theirs: a part like k and v.
    yield Row(f"{at}.position_embedding.weight", "T D", "img/pos_embedding", "T D", 0)
    at, attn = f"{tower}.encoder.layers.{{i}}", f"{block}/MultiHeadDotProductAttention_0"
    for theirs, ours in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name = f"{at}.self_attn.{theirs}"
        yield Row(f"{name}.weight", "(N H) D", f"{attn}/{ours}/kernel", "D N H")
        yield Row(f"{name}.bias", "(N H)", f"{attn}/{ours}/bias", "N H")
    yield Row(f"{at}.self_attn.out_proj.weight", "D (N H)", f"{attn}/out/kernel", "N H D")
    yield Row(f"{at}.self_attn.out_proj.bias", "D", f"{attn}/out/bias", "D")
    for theirs, ours, layout in (("fc1", "Dense_0", "D F"), ("fc2", "Dense_1", "F D")):
        out = layout[-1]
        mlp = f"{block}/MlpBlock_0/{ours}"
        yield Row(f"{at}.mlp.{theirs}.weight", layout[::-1], f"{mlp}/kernel", layout)
        yield Row(f"{at}.mlp.{theirs}.bias", out, f"{mlp}/bias", out)
    for theirs, ours in (
        (f"{at}.layer_norm1", f"{block}/LayerNorm_0"),
        (f"{at}.layer_norm2", f"{block}/LayerNorm_1"),
        (f"{tower}.post_layernorm", "img/Transformer/encoder_norm"),
    ):
        yield Row(f"{theirs}.weight", "D", f"{ours}/scale", "D")
        yield Row(f"{theirs}.bias", "D", f"{ours}/bias", "D")
    yield Row("multi_modal_projector.linear.weight", "E D", "img/head/kernel", "D E")
    yield Row("multi_modal_projector.linear.bias", "E", "img/head/bias", "E")

    decoder = "language_model"
    yield Row(f"{decoder}.embed_tokens.weight", "V D", "llm/embedder/input_embedding", "V D")
    at, attn, mlp = f"{decoder}.layers.{{i}}", "llm/layers/attn", "llm/layers/mlp"
    q, k, v, o = (f"{at}.self_attn.{c}_proj.weight" for c in "qkvo")
    yield Row(q, "(N H) D", f"{attn}/q_einsum/w", "N D H")
    yield Row(k, "(K H) D", f"{attn}/kv_einsum/w", "K D H", 0)
    yield Row(v, "(K H) D", f"{attn}/kv_einsum/w", "K D H", 1)
    for i, name in enumerate((q, k, v)):  # where every query head has keys of its own
        yield Row(name, "(N H) D", f"{attn}/qkv_einsum/w", "N D H", i)
    yield Row(o, "D (N H)", f"{attn}/attn_vec_einsum/w", "N H D")
    for i, name in enumerate(("gate", "up")):
        yield Row(f"{at}.mlp.{name}_proj.weight", "F D", f"{mlp}/gating_einsum", "D F", i)
    yield Row(f"{at}.mlp.down_proj.weight", "D F", f"{mlp}/linear", "F D")
    yield Row(f"{decoder}.norm.weight", "D", "llm/final_norm/scale", "D")


ROWS = tuple(_rows())

# Norms of a decoder layer: (theirs, ours). Gemma 1's second norm bears the name of Gemma 2's other.
_NORMS = {
    False: (
        ("input_layernorm", "pre_attention_norm"),
        ("post_attention_layernorm", "pre_ffw_norm"),
    ),
    True: (
        ("input_layernorm", "pre_attention_norm"),
        ("post_attention_layernorm", "post_attention_norm"),
        ("pre_feedforward_layernorm", "pre_ffw_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    ),
}


def canonical(name):
    """A tensor's or module's name without what the generations of transformers differ in.

    "model.language_model.layers.0…" (since 4.52), "language_model.model.layers.0…" (before, and on
    Google's pages) → "language_model.layers.0…"; "…vision_tower.vision_model.encoder…" (before 5)
    → "vision_tower.encoder…"; "language_model.lm_head…" → "lm_head…".
    """
    name = name.removeprefix("model.")
    name = re.sub(r"^language_model\.model\.", "language_model.", name)
    name = re.sub(r"^language_model\.lm_head\.", "lm_head.", name)
    return re.sub(r"^vision_tower\.vision_model\.", "vision_tower.", name)


def module_of(target):
    """Canonical name of the module that a `lora.Target` adapts; "{i}" stands for the layer."""
    for row in ROWS:
        if (row.param, row.index) == (target.param, target.index):
            return row.name.removesuffix(".weight")
    raise KeyError(f"{target.name} is not in the table")
