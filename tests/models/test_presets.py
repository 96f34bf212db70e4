"""Models at their true size, by shapes alone: as many parameters and image tokens as published. Tiny ones that run."""

import jax
import numpy as np
import pytest

from paligemma_med.models import lora_targets, presets, vlm
from paligemma_med.models.leaves import flatten_tree

# Sums of published parts: MedGemma's file without its 64 further rows; BiomedCLIP's tower 85,798,656, of which a layer
# has 7,087,872 and a norm 1,536; EVA's 985,897,344 with 768 more positions at 448 px; a head of 768 × 4096 + 4096;
# BLIP-2's Q-Former on tokens of width 768; LLaMA-3 8,030,261,248; LLaMA-2 6,738,415,616; BLOOM 7,069,016,064.
SIZES = {
    "paligemma_3b": (224, 256, 2_923_335_408),
    "medgemma_4b": (896, 256, 4_299_915_632),
    "llama_clip": (224, 196, 85_798_656 - 7_087_872 - 1_536 + 3_149_824 + 8_030_261_248),
    "bloom_qformer": (224, 32, 85_798_656 + 99_264_000 + 3_149_824 + 7_069_016_064),
    "pefomed": (448, 256, 985_897_344 + 768 * 1408 + 5632 * 4096 + 4096 + 6_738_415_616),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
    res, tokens, count = SIZES[name]
    model = vlm.Model(**presets.PRESETS[name])
    shapes = flatten_tree(vlm.abstract_params(model, image_size=res))
    assert {*shapes} == {*model.leaves}
    assert sum(int(np.prod(x.shape)) for x in shapes.values()) == count
    assert vlm.num_image_tokens(model, np.zeros((res, res, 3))) == tokens
    assert vlm.image_size(model.leaves, shapes) == res


def trained(name, res, rules):
    model = vlm.Model(**presets.PRESETS[name], lora=rules)
    shapes = flatten_tree(vlm.abstract_params(model, image_size=res))
    specs = lora_targets.resolve(rules, [n for n in shapes if "lora_" not in n], model.leaves)
    assert specs
    return {n: int(np.prod(x.shape)) for n, x in shapes.items() if "lora_" in n}


@pytest.mark.parametrize(
    "name, rules, count",
    [
        # Google's notebook: all linear layers of decoder and tower (its projector is none).
        ("medgemma_4b", [("connector/.*", None), (".*", dict(rank=16))], 38_497_792),
        ("bloom_qformer", [("llm/layers/attn/qkv/kernel", dict(rank=16))], 7_864_320),
        ("llama_clip", [("llm/layers/attn/.*", dict(rank=16))], 13_631_488),
        ("llama_clip", [("img/.*MultiHeadDotProductAttention_0/.*", dict(rank=16))], 1_081_344),
        # With the projector, 56,627,200 parameters are trained in system 004.
        ("pefomed", [("llm/layers/attn/qkv_einsum/w:[qv]", dict(rank=64))], 56_627_200 - 5632 * 4096 - 4096),
    ],
)
def test_adapters_have_the_published_size(name, rules, count):
    assert sum(trained(name, SIZES[name][0], rules).values()) == count


TINY = {
    "medgemma_4b": dict(
        img=dict(variant="mu/8"), llm=dict(variant="gemma_mu", post_norms=True, qk_norm=True, window=8, window_every=2)
    ),
    "llama_clip": dict(
        img=dict(variant="mu/8", cls=True, gelu="exact", final_norm=None),
        llm=dict(variant="gemma_mu", norm="rms", act="silu", embed_scale=False, tie=False),
    ),
    "bloom_qformer": dict(
        img=dict(variant="mu/8", cls=True, keep_cls=True, gelu="exact"),
        connector=dict(queries=3, inner=16, depth=2, mlp_dim=24, num_heads=2),
        llm=dict(
            variant="gemma_mu",
            num_kv_heads=4,
            norm="layer",
            fused=True,
            position="alibi",
            embed_norm=True,
            embed_scale=False,
        ),
    ),
    "pefomed": dict(
        img=dict(variant="mu/8", cls=True, gelu="exact", key_bias=False),
        llm=dict(variant="gemma_mu", num_kv_heads=4, norm="rms", act="silu", embed_scale=False, tie=False),
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_one_decodes_what_a_whole_pass_says(name):
    """The image in the prompt, or in front of it; after a prompt, token by token."""
    kw = {**presets.PRESETS[name], **TINY[name]}
    if "connector" in TINY[name]:
        kw["connector"] = {**presets.PRESETS[name]["connector"], **TINY[name]["connector"]}
    model = vlm.Model(**kw)
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_params(model, image_size=32)
    params = jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes)
    image = rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    text = rng.integers(2, 1024, (1, 9)).astype(np.int32)
    at = None if name == "bloom_qformer" else np.array([2], np.int32)
    whole = jax.jit(lambda: model.apply({"params": params}, image, text, np.ones_like(text), image_at=at)[0])
    want = whole()

    def prefill(m):
        (x, mask, ar), _ = m.embed_image_and_text(image, text[:, :5], image_at=at)
        return m.prefill_cache(x, mask, ar, cache_size=x.shape[1] + 4)

    def extend(m, token):
        return m.extend_cache(m.embed_text(token)[0])

    logits, cache = jax.jit(lambda: model.apply({"params": params}, method=prefill, mutable=["cache"]))()
    step = jax.jit(lambda c, t: model.apply({"params": params, **c}, t, method=extend, mutable=["cache"]))
    got = [logits[0, 0]]
    for i in range(5, 8):
        logits, cache = step(cache, text[:, i : i + 1])
        got.append(logits[0, 0])
    scale = float(np.abs(want).max())
    np.testing.assert_allclose(np.stack(got), want[0, 4:8], rtol=0, atol=2e-5 * scale)
