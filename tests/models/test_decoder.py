"""The language model's parts: norms, RoPE, embeddings, variants and their published sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.models import decoder

BF16_HALF_STEP = 2.0**-8  # rounding to bfloat16 moves a number by at most this part of it


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


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    """2,048 numbers around 100: their squares don't add up in bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + 30 * rng.normal(size=(3, 2048)), jnp.bfloat16)
    scale = rng.normal(size=2048).astype(np.float32)
    got = decoder.RMSNorm().apply({"params": {"scale": scale}}, x)
    x64 = np.float64(np.float32(x))
    want = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-6) * (1 + np.float64(scale))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(np.float32(got)), want, rtol=1.01 * BF16_HALF_STEP)


def test_rms_norm_counts_its_epsilon():
    got = decoder.RMSNorm().apply({"params": {"scale": np.zeros(4)}}, np.full((1, 4), 1e-3, np.float32))
    np.testing.assert_allclose(got, np.full((1, 4), 1e-3 / np.sqrt(2e-6)), rtol=1e-5)


def rope_by_definition(x, positions, head_dim):
    """Pairs (i, i + H/2) as complex numbers turned by position / 10000^(2i/H), in float64."""
    x = np.asarray(x, np.float64)
    half = head_dim // 2
    turn = positions[..., None] / 10_000.0 ** (2 * np.arange(half) / head_dim)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[..., None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rope_of_bfloat16_at_large_positions_is_computed_in_float32():
    rng = np.random.default_rng(1)
    positions = np.array([[0, 1, 255, 1100, 4095]])
    x = jnp.asarray(rng.normal(size=(1, 5, 3, 256)), jnp.bfloat16)
    got = decoder.apply_rope(x, decoder.rope_angles(positions, 256))
    want = rope_by_definition(np.float32(x), positions, 256)
    assert got.dtype == jnp.bfloat16
    # A float32 angle of 4,095 rad is off by up to 2.5e-4; a bfloat16 one by 8 rad.
    np.testing.assert_allclose(np.float64(np.float32(got)), want, rtol=1.01 * BF16_HALF_STEP, atol=2e-3)
    exact = decoder.apply_rope(jnp.float32(x), decoder.rope_angles(positions, 256))
    np.testing.assert_allclose(exact, want, atol=2e-3)
    np.testing.assert_allclose(exact[:, :3], want[:, :3], atol=1e-4)


def test_rope_depends_on_distance_only():
    """Hugging Face counts PaliGemma's positions from 1, big_vision from 0: the same thing."""
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def dot(at_q, at_k):
        turned = (decoder.apply_rope(x, decoder.rope_angles(np.array([[at]]), 16)) for x, at in ((q, at_q), (k, at_k)))
        return np.sum(next(turned) * next(turned))

    np.testing.assert_allclose(dot(7, 3), dot(107, 103), atol=1e-4)
    assert abs(dot(7, 3) - dot(3, 7)) > 1e-2


def test_embeddings_are_scaled_and_tied_to_the_output():
    model = decoder.Model(**SIZES, final_logits_softcap=3.0)
    table = np.random.default_rng(3).normal(size=(33, 20)).astype(np.float32)
    params = {"params": {"embedder": {"input_embedding": table}}}
    tokens = np.array([[0, 32, 5]])
    got = model.apply(params, tokens, method="embed_tokens")
    np.testing.assert_allclose(got, table[tokens] * np.sqrt(20), rtol=1e-6)
    h = np.random.default_rng(4).normal(size=(2, 20)).astype(np.float32)
    logits = model.apply(params, h, method="compute_logits")
    np.testing.assert_allclose(logits, 3 * np.tanh(h @ table.T / 3), atol=1e-5)


def test_logits_are_float32_under_bfloat16():
    """Accumulated and capped in float32: bfloat16 logits near 30 would have steps of 0.125."""
    model = decoder.Model(**SIZES, dtype="bfloat16", final_logits_softcap=30.0)
    rng = np.random.default_rng(5)
    table, h = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((33, 20), (4, 20)))
    params = {"params": {"embedder": {"input_embedding": table}}}
    logits = model.apply(params, h, method="compute_logits")
    want = 30 * np.tanh(np.float64(np.float32(h)) @ np.float64(np.float32(table)).T / 30)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, want, atol=1e-5)
    assert model.apply(params, np.array([[1]]), method="embed_tokens").dtype == jnp.bfloat16
