"""The language model's parts: embeddings, variants and their published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.models import decoder
from tests.rounding import assert_close


def shapes_of(model):
    x, mask = jnp.zeros((1, 2, model.width)), jnp.ones((1, 2, 2), bool)

    def init():
        def run(m):
            m.embed_tokens(jnp.zeros((1, 2), jnp.int32))
            return m(x, mask)

        return model.init(jax.random.key(0), method=run)

    leaves = jax.tree_util.tree_flatten_with_path(jax.eval_shape(init)["params"])[0]
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}


# Parameter counts that Hugging Face shows for these checkpoints, whose vocabulary is 256,000.
@pytest.mark.parametrize(
    "variant,count",
    [
        ("gemma_2b", 2_506_172_416),
        ("gemma_7b", 8_537_680_896),
        ("gemma2_2b", 2_614_341_888),
        ("gemma2_9b", 9_241_705_984),
        ("gemma2_27b", 27_227_128_320),
    ],
)
def test_variants_have_the_published_size(variant, count):
    shapes = shapes_of(decoder.Model(variant=variant, vocab_size=256_000))
    assert sum(math.prod(s) for s in shapes.values()) == count


def test_names_of_grouped_heads_with_post_norms():
    assert shapes_of(decoder.Model(variant="gemma2_2b")) == {
        "embedder/input_embedding": (257_152, 2304),
        "final_norm/scale": (2304,),
        "layers/attn/q_einsum/w": (26, 8, 2304, 256),
        "layers/attn/kv_einsum/w": (26, 2, 4, 2304, 256),
        "layers/attn/attn_vec_einsum/w": (26, 8, 256, 2304),
        "layers/mlp/gating_einsum": (26, 2, 2304, 9216),
        "layers/mlp/linear": (26, 9216, 2304),
        "layers/pre_attention_norm/scale": (26, 2304),
        "layers/post_attention_norm/scale": (26, 2304),
        "layers/pre_ffw_norm/scale": (26, 2304),
        "layers/post_ffw_norm/scale": (26, 2304),
    }


@pytest.mark.parametrize(
    "variant,depth,width,heads,kv_heads,head_dim,mlp_dim",
    [
        ("gemma2_9b", 42, 3584, 16, 8, 256, 14_336),
        ("gemma2_27b", 46, 4608, 32, 16, 128, 36_864),
    ],
)
def test_shapes_of_larger_gemma2(variant, depth, width, heads, kv_heads, head_dim, mlp_dim):
    model = decoder.Model(variant=variant)
    shapes = shapes_of(model)
    assert shapes["layers/attn/q_einsum/w"] == (depth, heads, width, head_dim)
    assert shapes["layers/attn/kv_einsum/w"] == (depth, 2, kv_heads, width, head_dim)
    assert shapes["layers/mlp/linear"] == (depth, mlp_dim, width)
    assert shapes["layers/post_ffw_norm/scale"] == (depth, width)
    assert (model.attn_logits_softcap, model.final_logits_softcap) == (50.0, 30.0)


def test_full_heads_share_one_einsum():
    shapes = shapes_of(decoder.Model(variant="gemma_7b"))
    assert shapes["layers/attn/qkv_einsum/w"] == (28, 3, 16, 3072, 256)
    assert not [k for k in shapes if "/q_einsum" in k or "/kv_einsum" in k or "post_" in k]


SIZES = dict(width=20, depth=3, mlp_dim=9, num_heads=6, num_kv_heads=2, head_dim=4, vocab_size=33)


@pytest.mark.parametrize("variant", ["gemma_mu", "gemma2_2b"])
def test_every_size_stands_on_top_of_a_variant(variant):
    shapes = shapes_of(decoder.Model(variant=variant, **SIZES, post_norms=False))
    assert shapes == shapes_of(decoder.Model(**SIZES))
    assert shapes["layers/attn/q_einsum/w"] == (3, 6, 20, 4)
    assert shapes["embedder/input_embedding"] == (33, 20)


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(variant="gemma_3b"), "LLM variant 'gemma_3b' is unknown; expected one of"),
        (dict(variant="gemma_mu", num_kv_heads=3), "num_heads=4 is no multiple of num_kv_heads=3"),
        (dict(width=8, depth=1), r"has no variant and lacks \['mlp_dim', 'num_heads'"),
        (
            dict(variant="gemma_mu", query_pre_attn_norm="none"),
            "query_pre_attn_norm is 'none'; expected",
        ),
        (dict(variant="gemma_mu", remat_policy="all"), "remat_policy is 'all'; expected"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(decoder.Model(**kw))


def test_embeddings_are_scaled_and_tied_to_the_output():
    model = decoder.Model(**SIZES, final_logits_softcap=3.0)
    table = np.random.default_rng(3).normal(size=(33, 20)).astype(np.float32)
    params = {"params": {"embedder": {"input_embedding": table}}}
    tokens = np.array([[0, 32, 5]])
    got = model.apply(params, tokens, method="embed_tokens")
    np.testing.assert_allclose(got, table[tokens] * np.sqrt(20), rtol=1e-6)
    h = np.random.default_rng(4).normal(size=(2, 20)).astype(np.float32)
    logits = model.apply(params, h, method="compute_logits")
    assert_close(logits, 3 * np.tanh(h @ table.T / 3))


def test_logits_are_float32_under_bfloat16():
    """Accumulated and capped in float32: bfloat16 logits near 30 would have steps of 0.125."""
    model = decoder.Model(**SIZES, dtype="bfloat16", final_logits_softcap=30.0)
    rng = np.random.default_rng(5)
    table, h = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((33, 20), (4, 20)))
    params = {"params": {"embedder": {"input_embedding": table}}}
    logits = model.apply(params, h, method="compute_logits")
    want = 30 * np.tanh(np.float64(np.float32(h)) @ np.float64(np.float32(table)).T / 30)
    assert logits.dtype == jnp.float32
    assert_close(logits, want)
    assert model.apply(params, np.array([[1]]), method="embed_tokens").dtype == jnp.bfloat16
