"""Gemma 3, LLaMA and BLOOM decoders against transformers, in whole passes and token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from paligemma_med.models import decoder, splice
from paligemma_med.models.layers import positions
from paligemma_med.models.leaves import flatten_tree
from tests.models import hf_decoders
from tests.rounding import assert_close

LENGTHS = (13, 7, 1)  # longer than two of the windows
TOLERANCE = 1e-5  # of logits up to about 5


def texts(vocab_size, seed=0):
    """(tokens int32[3, 13], valid bool[3, 13])."""
    rng = np.random.default_rng(seed)
    valid = np.arange(max(LENGTHS)) < np.array(LENGTHS)[:, None]
    return np.where(valid, rng.integers(4, vocab_size, valid.shape), 3).astype(np.int32), valid


def forward(model, params, tokens, valid, **kw):
    def run(m):
        mask = splice.make_attn_mask(jnp.asarray(valid), jnp.ones(tokens.shape, jnp.int32))
        y, probs = m(m.embed_tokens(tokens), mask, **kw)
        return m.compute_logits(y), probs

    return jax.jit(lambda params: model.apply({"params": params}, method=run))(params)


@pytest.mark.parametrize("name", hf_decoders.CASES)
def test_logits_are_those_of_transformers(name):
    theirs, ours, params = hf_decoders.reference(name)
    assert {leaf.path for leaf in ours.leaves} == {*flatten_tree(params)}
    tokens, valid = texts(ours.vocab_size)
    got = np.asarray(forward(ours, params, tokens, valid)[0])
    for side in ("right", "left"):
        rolled, there = tokens, valid
        if side == "left":
            rolled = np.stack([np.roll(row, len(row) - n) for row, n in zip(tokens, LENGTHS, strict=True)])
            there = valid[:, ::-1]
        with torch.no_grad():
            want = theirs(torch.tensor(rolled, dtype=torch.long), attention_mask=torch.tensor(there.astype(int)))
        scale = float(want.logits.abs().max())
        assert 1 < scale < 10
        np.testing.assert_allclose(got[valid], want.logits.numpy()[there], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "name, samples", [("gemma3 window 5", 2), ("gemma3 window 32", 1), ("llama gqa", 2), ("bloom 6 heads", 2)]
)
def test_token_by_token_equals_the_whole_pass(name, samples):
    """Prompts of unlike lengths, continued to twice the shorter windows, two samples on one prompt's cache."""
    _, model, params = hf_decoders.reference(name)
    tokens, valid = texts(model.vocab_size)
    new = np.random.default_rng(1).integers(4, model.vocab_size, (len(LENGTHS) * samples, 11))

    def prefill(m):
        mask = splice.make_attn_mask(jnp.asarray(valid), jnp.ones(tokens.shape, jnp.int32))
        return m.prefill_cache(
            m.embed_tokens(tokens), jnp.asarray(valid), mask, cache_size=tokens.shape[1] + 11, num_samples=samples
        )

    logits, cache = jax.jit(lambda: model.apply({"params": params}, method=prefill, mutable=["cache"]))()
    steps = [np.repeat(logits, samples, axis=0)]
    extend = jax.jit(
        lambda cache, token: model.apply(
            {"params": params, **cache}, token, method=lambda m, t: m.extend_cache(m.embed_tokens(t)), mutable=["cache"]
        )
    )
    for i in range(new.shape[1]):
        logits, cache = extend(cache, new[:, i : i + 1])
        steps.append(logits)
    got = np.concatenate(steps, axis=1)
    for row in range(len(new)):
        prompt = tokens[row // samples, : LENGTHS[row // samples]]
        whole = np.concatenate([prompt, new[row]])[None].astype(np.int32)
        want = forward(model, params, whole, np.ones(whole.shape, bool))[0][0, len(prompt) - 1 :]
        # Other products, in another order: 17 units without fused multiply-add (SSE4.2).
        assert_close(got[row], want, units=64)


@pytest.mark.parametrize("name", ["gemma3 window 5", "llama gqa", "bloom 6 heads"])
def test_probabilities_can_be_captured_and_change_nothing(name):
    theirs, model, params = hf_decoders.reference(name)
    tokens, valid = texts(model.vocab_size)
    logits, probs = forward(model, params, tokens, valid, capture_attention=True)
    assert_close(logits[valid], forward(model, params, tokens, valid)[0][valid])
    with torch.no_grad():
        want = theirs(
            torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(valid.astype(int)),
            output_attentions=True,
        ).attentions
    assert len(want) == model.depth
    for ours, expected in zip(probs, want, strict=True):
        rows = np.broadcast_to(valid[:, None], ours.shape[:3])
        np.testing.assert_allclose(np.asarray(ours)[rows], expected.numpy()[rows], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma3 window 5", "llama gqa", "bloom 6 heads"])
def test_gradients_are_those_of_transformers(name):
    theirs, model, params = hf_decoders.reference(name)
    tokens, valid = texts(model.vocab_size)
    weights = np.random.default_rng(2).normal(size=(*tokens.shape, model.vocab_size)).astype(np.float32)
    weights *= valid[..., None]

    def loss(params):
        return jnp.sum(forward(model, params, tokens, valid)[0] * weights)

    got = flatten_tree(jax.grad(loss)(params))
    theirs.zero_grad()
    logits = theirs(torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(valid.astype(int))).logits
    torch.sum(logits * torch.tensor(weights)).backward()
    grads = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in theirs.named_parameters()}

    class WithGradients:
        def state_dict(self):
            return {"lm_head.weight": grads.get("lm_head.weight"), **grads} if not model.tie else grads

    want = flatten_tree(hf_decoders.to_tree(WithGradients(), name))
    assert {*got} == {*want}
    for path, x in want.items():
        scale = max(1.0, float(np.abs(x).max()))
        if path == "embedder/input_embedding":  # PyTorch has no gradient at the padding token's row
            got[path], x = (np.delete(y, [0, 3], axis=0) for y in (got[path], x))
        np.testing.assert_allclose(got[path], x, rtol=0, atol=3 * TOLERANCE * scale, err_msg=path)


# What the model pages and papers say: Gemma 3 without its tower, and with the converter's 64 further rows left out.
@pytest.mark.parametrize(
    "variant, count",
    [
        ("gemma3_4b", 3_880_099_328),
        ("gemma3_270m", 268_098_176),
        ("llama2_7b", 6_738_415_616),
        ("llama3_8b", 8_030_261_248),
        ("smollm2_135m", 134_515_008),
        ("bloom_7b1", 7_069_016_064),
    ],
)
def test_variants_have_the_published_size(variant, count):
    from tests.models.test_decoder import shapes_of

    assert sum(int(np.prod(s)) for s in shapes_of(decoder.Model(variant=variant)).values()) == count


@pytest.mark.parametrize("heads", [1, 2, 4, 6, 8, 12, 32, 112])
def test_slopes_are_those_of_transformers(heads):
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    want = build_alibi_tensor(torch.ones(1, 9, dtype=torch.long), heads, torch.float32)[:, 0].numpy()
    np.testing.assert_allclose(positions.alibi_slopes(heads)[:, None] * np.arange(9), want, rtol=1e-6)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(norm="batch"), "norm is 'batch'; expected one of"),
        (dict(act="relu"), "act is 'relu'; expected one of"),
        (dict(position="sine"), "position is 'sine'; expected one of"),
        (dict(fused=True), "fused kernels have as many key/value heads as heads, 4"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        decoder.Model(variant="gemma_mu", **kw)
