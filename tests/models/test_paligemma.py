"""The preset: names, shapes and sizes of PaliGemma 3B as it was published."""

import math

import jax
import jax.numpy as jnp

from paligemma_med.models import paligemma


def flat(tree):
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(k.key for k in path): leaf for path, leaf in leaves}


def count(leaves):
    return sum(math.prod(leaf.shape) for leaf in leaves.values())


def test_names_and_shapes_of_the_3b_model_at_448():
    leaves = flat(paligemma.abstract_params(paligemma.Model(), image_size=448))
    vit = "img/Transformer/encoderblock"
    attn = f"{vit}/MultiHeadDotProductAttention_0"
    want = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/embedding/bias": (1152,),
        "img/pos_embedding": (1, 1024, 1152),
        **{f"{vit}/LayerNorm_{i}/{x}": (27, 1152) for i in (0, 1) for x in ("scale", "bias")},
        f"{vit}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
        f"{vit}/MlpBlock_0/Dense_0/bias": (27, 4304),
        f"{vit}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
        f"{vit}/MlpBlock_0/Dense_1/bias": (27, 1152),
        **{f"{attn}/{x}/kernel": (27, 1152, 16, 72) for x in ("query", "key", "value")},
        **{f"{attn}/{x}/bias": (27, 16, 72) for x in ("query", "key", "value")},
        f"{attn}/out/kernel": (27, 16, 72, 1152),
        f"{attn}/out/bias": (27, 1152),
        "img/Transformer/encoder_norm/scale": (1152,),
        "img/Transformer/encoder_norm/bias": (1152,),
        "img/head/kernel": (1152, 2048),
        "img/head/bias": (2048,),
        "llm/embedder/input_embedding": (257_152, 2048),
        "llm/final_norm/scale": (2048,),
        "llm/layers/attn/q_einsum/w": (18, 8, 2048, 256),
        "llm/layers/attn/kv_einsum/w": (18, 2, 1, 2048, 256),
        "llm/layers/attn/attn_vec_einsum/w": (18, 8, 256, 2048),
        "llm/layers/mlp/gating_einsum": (18, 2, 2048, 16_384),
        "llm/layers/mlp/linear": (18, 16_384, 2048),
        "llm/layers/pre_attention_norm/scale": (18, 2048),
        "llm/layers/pre_ffw_norm/scale": (18, 2048),
    }
    assert {k: leaf.shape for k, leaf in leaves.items()} == want
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float32")}

    def of(prefix):
        return count({k: v for k, v in leaves.items() if k.startswith(prefix)})

    assert count(leaves) == 2_924_220_144
    assert of("img/head/") == 2_361_344
    assert (of("img/"), of("llm/")) == (415_688_432, 2_508_531_712)


def test_size_of_the_3b_model_at_224():
    tree = paligemma.abstract_params(paligemma.Model(), image_size=224)
    assert count(flat(tree)) == 2_923_335_408
    assert tree["img"]["pos_embedding"].shape == (1, 256, 1152)
