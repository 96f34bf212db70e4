"""Decoding against what it stands for: full forward passes, the distribution they give, and the
beam search of transformers."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from paligemma_med import decode
from paligemma_med.evaluation import options as options_lib
from paligemma_med.models import paligemma
from paligemma_med.parallel import sharding
from paligemma_med.pp.tokenizer import get_tokenizer
from tests import processes
from tests.models import hf

IMG = dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4))
LLM = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=31)
MODELS = {
    "mqa": {},
    "gqa": dict(num_kv_heads=2, depth=3),
    "mha": dict(num_kv_heads=4, scan=False),
    "gemma2": dict(
        num_kv_heads=2,
        post_norms=True,
        attn_logits_softcap=5.0,
        final_logits_softcap=3.0,
        query_pre_attn_norm="rsqrt_emb_per_head",
    ),
}
NO_EOS = -1  # no token is this one: every row runs to its end


@functools.cache
def make(name="mqa", dtype="float32", seed=0):
    model = paligemma.Model(img=IMG, llm={**LLM, **MODELS[name]}, dtype=dtype)
    return model, draw_params(model, seed)


def draw_params(model, seed=0):
    """Random numbers in all leaves: norms matter, logits are apart, and nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = paligemma.abstract_params(model, image_size=8)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


# Most tests take three prompts of at most five tokens, and two samples of four, so that they share
# few programs: compiling one takes seconds, running it milliseconds.


def make_batch(lengths, *, text_len=None, seed=0):
    """A ragged batch as eval pp gives it: prompts of these lengths, then pad 0, mask_ar 1."""
    rng = np.random.default_rng(seed)
    n, text_len = len(lengths), text_len or max(lengths)
    on = np.arange(text_len) < np.array(lengths)[:, None]
    return dict(
        image=rng.uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32),
        text=np.where(on, rng.integers(3, 31, (n, text_len)), 0).astype(np.int32),
        mask_ar=np.where(on, 0, 1).astype(np.int32),
        mask_input=on.astype(np.int32),
    )


def rows_of(batch, rows):
    return {k: v[np.array(rows)] for k, v in batch.items()}


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, image, text, mask_ar):
    return jax.nn.log_softmax(model.apply({"params": params}, image, text, mask_ar)[0])


def full_forward(model, params, batch, new):
    """Log-probabilities float[B, V] of the tokens after the prompts and `new` [B][n]: a forward
    pass over everything, without a cache. What stands right of a causal token changes nothing."""
    lengths = batch["mask_input"].sum(axis=1)
    text = np.pad(batch["text"], ((0, 0), (0, 8)))
    mask_ar = np.pad(batch["mask_ar"], ((0, 0), (0, 8)), constant_values=1)
    for row, tokens in enumerate(new):
        text[row, lengths[row] : lengths[row] + len(tokens)] = tokens
    logp = np.asarray(apply(model, params, batch["image"], text, mask_ar))
    return logp[np.arange(len(new)), lengths - 1 + np.array([len(t) for t in new])]


@pytest.mark.parametrize("name", [pytest.param(m, marks=[pytest.mark.slow] * (m in ("gqa", "mha"))) for m in MODELS])
def test_greedy_equals_step_by_step_full_forward_passes(name):
    model, params = make(name)
    batch = make_batch([1, 2, 3, 4, 5, 6], text_len=7)
    tokens, logprobs = decode.generate(model, params, batch, max_new_tokens=6, eos_token=NO_EOS)
    assert tokens.shape == logprobs.shape == (6, 1, 6)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    new = [[] for _ in range(6)]
    for step in range(6):
        expected = full_forward(model, params, batch, new)
        np.testing.assert_array_equal(tokens[:, 0, step], expected.argmax(axis=1))
        np.testing.assert_allclose(logprobs[:, 0, step], expected.max(axis=1), atol=1e-5)
        new = [[*own, best] for own, best in zip(new, expected.argmax(axis=1))]


@pytest.mark.parametrize("name", [pytest.param("gqa", marks=pytest.mark.slow), "gemma2"])
def test_sampled_logprobs_are_the_models_own(name):
    # At temperature 1 and without top_p, whatever the samples were drawn with.
    model, params = make(name)
    batch = make_batch([3, 5])
    tokens, logprobs = decode.generate(
        model,
        params,
        batch,
        max_new_tokens=3,
        num_samples=3,
        temperature=2.0,
        top_p=0.9,
        eos_token=NO_EOS,
    )
    assert len({tuple(s) for s in np.asarray(tokens).reshape(6, 3).tolist()}) > 2
    for sample, step in np.ndindex(3, 3):
        drawn = np.asarray(tokens[:, sample])
        expected = full_forward(model, params, batch, drawn[:, :step])[[0, 1], drawn[:, step]]
        np.testing.assert_allclose(logprobs[:, sample, step], expected, atol=1e-5)


def test_eos_is_kept_and_nothing_follows():
    model, params = make()
    batch = make_batch([2, 3, 4, 5, 6, 6], text_len=7, seed=3)
    free, free_logprobs = decode.generate(model, params, batch, max_new_tokens=6, eos_token=NO_EOS)
    eos = int(free[2, 0, 2])
    tokens, logprobs = decode.generate(model, params, batch, max_new_tokens=6, eos_token=eos)
    stopped = 0
    for row in range(6):
        own = free[row, 0].tolist()
        end = own.index(eos) + 1 if eos in own else 6
        stopped += end < 6
        assert tokens[row, 0].tolist() == own[:end] + [0] * (6 - end)
        np.testing.assert_array_equal(logprobs[row, 0, end:], 0.0)
        np.testing.assert_allclose(logprobs[row, 0, :end], free_logprobs[row, 0, :end], atol=1e-6)
    assert 0 < stopped < 6


def steps_taken(model, params, batch, eos_token, max_new_tokens):
    arrays = {k: batch[k] for k in ("image", "text", "mask_ar", "mask_input")}
    arrays |= dict(skip=~batch["_mask"], row_id=np.arange(len(batch["_mask"]), dtype=np.uint32))
    return int(
        decode._generate(
            model,
            params,
            arrays,
            jax.random.key(0),
            np.float32(0),
            np.float32(1),
            np.float32(1),
            np.int32(eos_token),
            max_new_tokens=max_new_tokens,
            num_samples=1,
            greedy=True,
            text_len=batch["text"].shape[1],
        )[2]
    )


def test_loop_ends_when_all_rows_have():
    model, params = make()
    batch = make_batch([4, 4]) | {"_mask": np.array([True, True])}
    free, _ = decode.generate(model, params, batch, max_new_tokens=8, eos_token=NO_EOS)
    assert steps_taken(model, params, batch, NO_EOS, 8) == 8
    first, second = free[:, 0].tolist()
    eos = first[1]
    one = batch | {"_mask": np.array([True, False])}
    assert steps_taken(model, params, one, eos, 8) == first.index(eos) + 1 < 8
    both = max(r.index(eos) + 1 if eos in r else 8 for r in (first, second))
    assert steps_taken(model, params, batch, eos, 8) == both
    none = batch | {"_mask": np.array([False, False])}
    assert steps_taken(model, params, none, eos, 8) == 1


def test_rows_that_fill_up_the_batch_stay_empty():
    model, params = make()
    batch = make_batch([3, 4, 5])
    tokens, logprobs = decode.generate(
        model,
        params,
        batch | {"_mask": np.array([True, False, True])},
        max_new_tokens=4,
        num_samples=2,
        eos_token=NO_EOS,
    )
    full, _ = decode.generate(model, params, batch, max_new_tokens=4, num_samples=2, eos_token=NO_EOS)
    assert not tokens[1].any() and not logprobs[1].any()
    np.testing.assert_array_equal(tokens[::2], full[::2])


SAMPLING = dict(max_new_tokens=4, temperature=1.3, top_p=0.95, eos_token=NO_EOS)


def test_samples_do_not_depend_on_the_batch():
    model, params = make()
    batch = make_batch([1, 5, 3]) | {"row_id": np.array([9, 4, 7])}
    whole, logprobs = decode.generate(model, params, batch, num_samples=2, seed=5, **SAMPLING)
    for rows in ([2, 1, 0], [1, 1, 2], [2]):
        part, part_logprobs = decode.generate(model, params, rows_of(batch, rows), num_samples=2, seed=5, **SAMPLING)
        np.testing.assert_array_equal(part, whole[np.array(rows)])
        np.testing.assert_allclose(part_logprobs, logprobs[np.array(rows)], atol=1e-5)
    # Padding and the other rows' texts change nothing either.
    wider = {
        k: np.pad(v, ((0, 0), (0, 3)), constant_values=int(k == "mask_ar")) if v.ndim == 2 else v
        for k, v in batch.items()
    }
    np.testing.assert_array_equal(decode.generate(model, params, wider, num_samples=2, seed=5, **SAMPLING)[0], whole)


def test_more_samples_begin_with_the_same_ones():
    model, params = make()
    batch = make_batch([2, 5, 4])
    three = decode.generate(model, params, batch, num_samples=3, seed=1, **SAMPLING)[0]
    two = decode.generate(model, params, batch, num_samples=2, seed=1, **SAMPLING)[0]
    np.testing.assert_array_equal(three[:, :2], two)
    assert np.any(three[:, 0] != three[:, 1]) and np.any(three[:, 1] != three[:, 2])


def test_same_seed_same_samples_other_seed_others():
    model, params = make()
    batch = make_batch([2, 5, 4])
    a, b, c = (decode.generate(model, params, batch, num_samples=2, seed=s, **SAMPLING)[0] for s in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
    # Equal prompts in one batch are different rows, and so differ unless row_id says otherwise.
    twins = rows_of(batch, [0, 0, 1])
    free = decode.generate(model, params, twins, num_samples=2, **SAMPLING)[0]
    tied = decode.generate(model, params, twins | {"row_id": np.array([3, 3, 1])}, num_samples=2, **SAMPLING)[0]
    assert np.any(free[0] != free[1])
    np.testing.assert_array_equal(tied[0], tied[1])


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45])
def test_a_temperature_near_zero_is_greedy(temperature):
    model, params = make()
    batch = make_batch([2, 5, 4])
    kw = dict(max_new_tokens=4, num_samples=2, eos_token=NO_EOS)
    cold, cold_logprobs = decode.generate(model, params, batch, temperature=temperature, **kw)
    greedy, logprobs = decode.generate(model, params, batch, temperature=0.0, **kw)
    np.testing.assert_array_equal(cold, greedy)
    np.testing.assert_allclose(cold_logprobs, logprobs, atol=1e-6)
    np.testing.assert_array_equal(greedy[:, 0], greedy[:, 1])


def test_a_tiny_top_p_is_greedy():
    model, params = make()
    batch = make_batch([2, 5, 4])
    kw = dict(max_new_tokens=4, num_samples=2, eos_token=NO_EOS)
    narrow = decode.generate(model, params, batch, temperature=1.0, top_p=1e-9, **kw)[0]
    np.testing.assert_array_equal(narrow, decode.generate(model, params, batch, **kw)[0])


def p_value(tokens, probs):
    """Chi-square of first tokens against float[V]; rare ones pooled, as the test asks for."""
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=len(probs))
    assert not counts[probs == 0].any()
    expected = probs / probs.sum() * counts.sum()
    common = expected >= 5
    counts = np.append(counts[common], counts[~common].sum())
    expected = np.append(expected[common], expected[~common].sum())
    keep = expected > 0
    return stats.chisquare(counts[keep], expected[keep]).pvalue


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.7), (1.5, 0.9)])
def test_sampling_frequencies_match_the_softmax(temperature, top_p):
    model, params = make()
    batch = make_batch([4])
    tokens = decode.generate(
        model,
        params,
        batch,
        max_new_tokens=1,
        num_samples=4000,
        temperature=temperature,
        top_p=top_p,
        seed=11,
    )[0]
    logp = full_forward(model, params, batch, [[]])[0].astype(np.float64)
    probs = np.exp(logp / temperature) / np.exp(logp / temperature).sum()
    order = np.argsort(-probs)
    inside = order[np.cumsum(probs[order]) - probs[order] < top_p]
    nucleus = np.zeros_like(probs)
    nucleus[inside] = probs[inside]
    assert top_p == 1 or 1 < len(inside) < len(probs)
    assert p_value(tokens, nucleus) > 0.01
    # The test can fail: the same counts don't fit a temperature a little off.
    wrong = np.where(nucleus > 0, np.exp(logp / (temperature * 1.3)), 0)
    assert p_value(tokens, wrong) < 0.01


def test_second_tokens_are_drawn_afresh():
    # Were the noise of step 2 that of step 1, frequencies of each step alone would still fit.
    model, params = make()
    tokens = np.asarray(
        decode.generate(
            model,
            params,
            make_batch([4]),
            max_new_tokens=2,
            num_samples=9610,
            temperature=1e4,
            eos_token=NO_EOS,
        )[0]
    )
    pairs = tokens[0, :, 0] * 31 + tokens[0, :, 1]
    assert p_value(pairs, np.full(31 * 31, 1.0)) > 0.01  # hot enough to be uniform


def test_top_k_then_top_p():
    model, params = make()
    tokens = decode.generate(
        model,
        params,
        make_batch([4]),
        max_new_tokens=1,
        num_samples=4000,
        temperature=2.0,
        top_k=6,
        top_p=0.8,
        seed=3,
    )[0]
    logp = full_forward(model, params, make_batch([4]), [[]])[0].astype(np.float64)
    probs = np.where(logp >= np.sort(logp)[-6], np.exp(logp / 2.0), 0)
    probs /= probs.sum()
    order = np.argsort(-probs)
    inside = order[np.cumsum(probs[order]) - probs[order] < 0.8]
    assert 1 < len(inside) < 6
    kept = np.zeros_like(probs)
    kept[inside] = probs[inside]
    assert p_value(tokens, kept) > 0.01
    kw = dict(max_new_tokens=4, num_samples=2)
    one = decode.generate(model, params, make_batch([2, 5, 4]), temperature=2.0, top_k=1, **kw)[0]
    greedy = decode.generate(model, params, make_batch([2, 5, 4]), **kw)[0]
    np.testing.assert_array_equal(one, greedy)


def test_filters_equal_sorting():
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 57)).astype(np.float32)
    logits[:10] = np.round(logits[:10])  # equals, zeros of both signs
    logits[10:20, ::3] = -np.inf
    logits[20:25] *= 1e30
    ranked = np.sort(logits, axis=-1)[:, ::-1]
    for k in (1, 2, 9, 56):
        got = np.asarray(decode.most_probable(logits, np.float32(k)))
        want = np.where(logits >= ranked[:, k - 1 : k], logits, -np.inf)
        np.testing.assert_array_equal(got, want)
    # A token stays if those above it hold less than top_p.
    weights = np.asarray(jax.nn.softmax(logits)).astype(np.float64)
    above = ((logits[:, None, :] > logits[:, :, None]) * weights[:, None]).sum(-1)
    for p in (1e-6, 0.3, 0.77):
        got = np.asarray(decode.nucleus(logits, np.float32(p)))
        np.testing.assert_array_equal(got, np.where(above < p, logits, -np.inf))


@pytest.mark.parametrize("vocab", [3, 30, 37])  # groups that fit, and that don't
def test_draws_in_two_steps_have_the_distribution(vocab):
    rng = np.random.default_rng(vocab)
    logits = rng.normal(0, 1.5, vocab).astype(np.float32)
    logits[1:20:2] = -np.inf
    keys = jax.random.split(jax.random.key(1), 4000)
    tokens = jax.vmap(decode.draw, (0, None))(keys, logits)
    assert p_value(tokens, np.exp(logits.astype(np.float64))) > 0.01


def test_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]]))
    kept = {p: np.isfinite(decode.nucleus(logits, p)) for p in (1e-9, 0.39, 0.41, 0.71, 0.95)}
    assert kept[1e-9][0].tolist() == [False, True, False, False]
    assert kept[0.39][0].tolist() == [False, True, False, False]
    assert kept[0.41][0].tolist() == [False, True, False, True]
    assert kept[0.71][0].tolist() == [False, True, True, True]
    assert kept[0.95][0].all()
    for p in kept:  # equals stay together
        assert kept[p][1].all()
    np.testing.assert_array_equal(
        np.where(kept[0.41], decode.nucleus(logits, 0.41), 0), np.where(kept[0.41], logits, 0)
    )


def test_other_temperature_top_p_seed_or_eos_compile_nothing():
    model, params = make()
    batch = make_batch([2, 5, 4])
    kw = dict(max_new_tokens=4, num_samples=2)
    decode.generate(model, params, batch, temperature=1.0, **kw)
    before = decode._generate._cache_size()
    decode.generate(model, params, batch, temperature=1, top_p=0.5, seed=3, eos_token=7, **kw)
    decode.generate(model, params, batch, temperature=0.2, top_p=1, top_k=9, **kw)
    decode.generate(model, params, batch | {"more": 1}, temperature=np.float64(0.7), **kw)
    assert decode._generate._cache_size() == before


def test_the_image_is_read():
    model, params = make()
    batch = make_batch([3, 4, 5])
    kw = dict(max_new_tokens=4, eos_token=NO_EOS)
    _, logprobs = decode.generate(model, params, batch, **kw)
    _, other = decode.generate(model, params, batch | {"image": -batch["image"]}, **kw)
    assert np.abs(logprobs - other).max(axis=(1, 2)).min() > 1e-3


def test_bfloat16_stays_near_float32():
    model, params = make()
    half_model, _ = make(dtype="bfloat16")
    half_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = make_batch([3, 4, 5])
    tokens, logprobs = decode.generate(
        half_model,
        half_params,
        batch,
        max_new_tokens=3,
        num_samples=2,
        temperature=1.0,
        eos_token=NO_EOS,
    )
    expected = full_forward(model, params, batch, [[]] * 3)
    expected = np.take_along_axis(expected, np.asarray(tokens[:, :, 0]), axis=1)
    assert logprobs.dtype == jnp.float32 and np.isfinite(logprobs).all()
    np.testing.assert_allclose(logprobs[:, :, 0], expected, atol=0.3)


@pytest.mark.parametrize("calls", ["generate", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("replicate", marks=pytest.mark.slow),
        'fsdp(axis="data", min_size_to_shard_mb=0)',
    ],
)
def test_on_a_mesh(strategy, calls):
    model, params = make()
    mesh = sharding.make_mesh()
    batch = make_batch([1, 2, 3, 4, 4, 3, 2, 1]) | {"_mask": np.arange(8) < 7}
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    where = sharding.infer_sharding(params, [(".*", strategy)], mesh)
    got = decode.generate(model, jax.device_put(params, where), placed, num_samples=2, **SAMPLING)
    want = decode.generate(model, params, batch, num_samples=2, **SAMPLING)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    if calls == "generate":
        return

    kw = dict(beams=2, max_new_tokens=3, eos_token=NO_EOS)
    got = decode.beam_search(model, jax.device_put(params, where), placed, **kw)
    want = decode.beam_search(model, params, batch, **kw)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    options, on = np.asarray(want[0]), np.ones(want[0].shape, bool)
    sums = [decode.score_options(model, params, b, options, on)[0] for b in (placed, batch)]
    np.testing.assert_allclose(*sums, atol=1e-5)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(temperature=-0.1), "temperature is -0.1"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature=float("inf")), "temperature is inf"),
        (dict(top_p=0.0), "top_p is 0.0"),
        (dict(top_p=1.1), "top_p is 1.1"),
        (dict(top_p=float("nan")), "top_p is nan"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
        (dict(max_new_tokens=2.0), "max_new_tokens is 2.0"),
        (dict(num_samples=0), "num_samples is 0"),
        (dict(top_k=-1), "top_k is -1"),
        (dict(top_k=0.5), "top_k is 0.5"),
        (dict(seed=-1), "seed is -1"),
    ],
)
def test_bad_arguments(kw, message):
    model, params = make()
    with pytest.raises(ValueError, match=message):
        decode.generate(model, params, make_batch([3]), **{"max_new_tokens": 2, **kw})


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image=None), "the batch has no 'image'"),
        (dict(mask_input=None), "the batch has no 'mask_input'"),
        (
            dict(mask_ar=np.zeros((2, 9), np.int32)),
            r"mask_ar has shape \(2, 9\), but text \(2, 4\)",
        ),
        (dict(text=np.zeros(4, np.int32)), r"text has shape \(4,\)"),
        (dict(image=np.zeros((3, 8, 8, 3))), r"image \(3, 8, 8, 3\)"),
        (dict(zimg=np.zeros((2, 8, 8, 3))), r"zimg \(2, 8, 8, 3\); expected .* \[B, P, D\]"),
        (dict(_mask=np.ones(3, bool)), r"_mask has shape \(3,\)"),
        (dict(mask_input=np.array([[1, 1, 1, 1], [0, 1, 1, 1]])), "row 1 has a 1 after a 0"),
        (dict(text=np.full((2, 4), 31)), "token 31, but the model's vocabulary has 31"),
        (dict(text=np.full((2, 4), -1)), "token -1"),
    ],
)
def test_bad_batches(change, message):
    model, params = make()
    batch = {k: v for k, v in (make_batch([3, 4]) | change).items() if v is not None}
    with pytest.raises(ValueError, match=message):
        decode.generate(model, params, batch, max_new_tokens=2)


# --- Prompts of different lengths, images of several questions ---


def test_buckets():
    assert [decode.bucket(n, 100) for n in (0, 1, 16, 17, 32, 33, 65, 100)] == [
        16,
        16,
        16,
        32,
        32,
        64,
        100,
        100,
    ]
    assert decode.bucket(5, 7) == 7


def test_padding_is_not_computed_and_few_programs_are_compiled(monkeypatch):
    model, params = make()
    seen = []
    read = decode._read_prompts
    monkeypatch.setattr(decode, "_read_prompts", lambda *a, **kw: seen.append(kw["text_len"]) or read(*a, **kw))
    kw = dict(max_new_tokens=2, num_samples=3, temperature=1.0, eos_token=NO_EOS)
    for longest in (1, 5, 9, 16, 17):
        wide = make_batch([1, longest], text_len=17, seed=longest)
        tight = {k: v[:, :longest] if v.ndim == 2 else v for k, v in wide.items()}
        traced = len(seen)
        got = decode.generate(model, params, wide, **kw)
        assert len(seen) - traced <= 1
        if longest in (1, 17):
            want = decode.generate(model, params, tight, **kw)
            np.testing.assert_array_equal(got[0], want[0])
            np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    assert sorted(seen) == [1, 16, 17]  # 1 is the tight one; no bucket is above the limit


def test_an_encoded_image_stands_for_the_image():
    model, params = make()
    batch = make_batch([3, 4, 5])
    kw = dict(max_new_tokens=4, num_samples=2, temperature=1.0, eos_token=NO_EOS)
    zimg = decode.encode_images(model, params, batch["image"])
    assert zimg.shape == (3, 4, 16)
    text = {k: v for k, v in batch.items() if k != "image"}
    got = decode.generate(model, params, text | {"zimg": zimg}, **kw)
    want = decode.generate(model, params, batch, **kw)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)
    other = decode.generate(model, params, text | {"zimg": zimg[::-1]}, **kw)
    assert np.abs(other[1] - want[1]).max() > 1e-3


# --- Options ---

OPTION_LENGTHS = np.array([[2, 4, 1], [4, 0, 3]])


def make_options():
    rng = np.random.default_rng(5)
    mask = np.arange(4) < OPTION_LENGTHS[..., None]
    return np.where(mask, rng.integers(3, 31, mask.shape), -7), mask


@pytest.mark.parametrize("name", [pytest.param("mqa", marks=pytest.mark.slow), "gemma2"])
def test_options_are_scored_as_by_full_forward_passes(name):
    model, params = make(name)
    batch = make_batch([3, 5], text_len=6)
    options, mask = make_options()
    sums, lengths = decode.score_options(model, params, batch, options, mask)
    assert sums.dtype == jnp.float32 and sums.shape == (2, 3)
    np.testing.assert_array_equal(lengths, OPTION_LENGTHS)
    for option in range(3):
        want = np.zeros(2)
        for step in range(4):
            new = np.where(mask, options, 0)[:, option, :step]
            logp = full_forward(model, params, batch, new)[[0, 1], options[:, option, step]]
            want += np.where(mask[:, option, step], logp, 0)
        np.testing.assert_allclose(sums[:, option], want, atol=2e-5)
    empty = decode.score_options(model, params, batch | {"_mask": np.array([True, False])}, options, mask)[0]
    np.testing.assert_array_equal(empty, np.array(sums) * [[1], [0]])


def test_options_are_scored_as_when_they_are_drawn():
    model, params = make("mha")
    batch = make_batch([3, 5, 1])
    tokens, logprobs = decode.generate(
        model, params, batch, max_new_tokens=3, num_samples=4, temperature=1.5, eos_token=NO_EOS
    )
    sums, _ = decode.score_options(model, params, batch, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(sums, logprobs.sum(axis=-1), atol=1e-5)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(options=np.ones((2, 3), int)),
            r"options has shape \(2, 3\); expected \[B = 2, C, M\]",
        ),
        (dict(options=np.ones((3, 3, 4), int)), r"options has shape \(3, 3, 4\)"),
        (dict(mask=np.ones((2, 3, 1), bool)), r"mask has shape \(2, 3, 1\)"),
        (dict(mask=np.arange(4) > np.zeros((2, 3, 1))), r"option \[0, 0\] has a True after"),
        (dict(options=np.full((2, 3, 4), 31)), "options holds token 31"),
    ],
)
def test_bad_options(change, message):
    model, params = make()
    given = dict(zip(("options", "mask"), make_options()))
    with pytest.raises(ValueError, match=message):
        decode.score_options(model, params, make_batch([3, 4]), **given | change)


def test_options_of_texts():
    tok = get_tokenizer("tiny")
    choices = [["Lung", "Left upper lobe of the lung"], ["no"]]
    tokens, mask = options_lib.encode(tok, choices, rows=3)
    assert tokens.shape[:2] == (3, 2) and tokens.shape[2] in (8, 16, 32)
    for row, texts in enumerate(choices):
        for i, text in enumerate(texts):
            assert tokens[row, i][mask[row, i]].tolist() == tok.to_int(text, eos=True)
    assert not mask[1, 1].any() and not mask[2].any() and not tokens[~mask].any()
    open_ended, shorter = options_lib.encode(tok, choices, eos=False)
    assert open_ended.shape[0] == 2 and shorter.sum() == mask.sum() - 3
    for wrong in ([["yes"], []], [["yes", ""]]):
        if wrong == [["yes", ""]]:
            with pytest.raises(ValueError, match="row 0 has the options"):
                options_lib.encode(tok, wrong, eos=False)
        else:
            with pytest.raises(ValueError, match=r"row 1 has the options \[\]"):
                options_lib.encode(tok, wrong)


def test_scores_of_texts():
    model = paligemma.Model(img=IMG, llm=dict(variant="gemma_mu", depth=1))
    params = draw_params(model)
    batch = make_batch([3, 4, 5]) | {"_mask": np.array([True, True, False])}
    choices, tok = [["yes", "no"], ["liver", "left lung", "no"]], get_tokenizer("tiny")
    logprobs, lengths = options_lib.score(model, params, batch, choices, tok)
    sums, _ = decode.score_options(model, params, batch, *options_lib.encode(tok, choices, rows=3))
    assert [len(x) for x in logprobs] == [2, 3] == [len(x) for x in lengths]
    np.testing.assert_array_equal(np.float32(logprobs[1]), sums[1])
    assert lengths[0] == [len(tok.to_int(t, eos=True)) for t in choices[0]]


# --- Beam search ---


@functools.cache
def beam_case(name):
    """(case, their model, ours, parameters, ragged batch, a token of the best beams as EOS)."""
    case, theirs, model, params, _ = hf.reference(name)
    batch = make_batch([3, 6, 4], text_len=7)
    rng = np.random.default_rng(0)
    side = case["image"]
    batch["image"] = rng.uniform(-1, 1, (3, side, side, 3)).astype(np.float32)
    free, _ = decode.beam_search(
        model, params, batch, beams=3, max_new_tokens=5, eos_token=NO_EOS, early_stopping=False
    )
    return case, theirs, model, params, batch, int(free[0, 0, 1])


def beams_of_transformers(case, theirs, batch, row, **kw):
    """(tokens with 0 after EOS, scores) of one prompt, by transformers."""
    import torch

    n = int(batch["mask_input"][row].sum())
    patches = (case["image"] // case["img"]["patch_size"]) ** 2
    ids = np.append(np.full(patches, case["llm"]["vocab_size"]), batch["text"][row, :n])[None]
    ids = torch.tensor(ids, dtype=torch.long)
    out = theirs.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        token_type_ids=torch.zeros_like(ids),
        pixel_values=torch.tensor(batch["image"][row][None].transpose(0, 3, 1, 2)),
        num_beams=3,
        num_return_sequences=3,
        max_new_tokens=5,
        pad_token_id=0,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
        **kw,
    )
    tokens = out.sequences[:, ids.shape[1] :].numpy()
    tokens = np.pad(tokens, ((0, 0), (0, 5 - tokens.shape[1])))
    # A pad token of 0 counts as none there, and EOS fills up instead.
    after = np.cumsum(tokens == kw["eos_token_id"], axis=1) - (tokens == kw["eos_token_id"]) > 0
    return np.where(after, 0, tokens), out.sequences_scores.numpy()


@pytest.mark.parametrize("name", ["mqa", pytest.param("gemma2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "length_penalty, early_stopping",
    [
        (1.0, False),
        (-1.0, False),
        pytest.param(2.0, "never", marks=pytest.mark.slow),
        (0.0, True),
    ],
)
def test_beam_search_equals_that_of_transformers(name, length_penalty, early_stopping):
    case, theirs, model, params, batch, eos = beam_case(name)
    kw = dict(length_penalty=length_penalty, early_stopping=early_stopping)
    tokens, scores = decode.beam_search(model, params, batch, beams=3, max_new_tokens=5, eos_token=eos, **kw)
    assert tokens.dtype == jnp.int32 and scores.dtype == jnp.float32
    ended = 0
    for row in range(3):
        want, want_scores = beams_of_transformers(case, theirs, batch, row, eos_token_id=eos, **kw)
        np.testing.assert_array_equal(tokens[row], want)
        np.testing.assert_allclose(scores[row], want_scores, rtol=1e-5, atol=1e-5)
        ended += (want == eos).any(axis=1).sum()
    assert ended


def test_beams_score_what_they_say():
    # Their scores are those of their tokens, read again; each prompt's own, whatever the batch.
    model, params = make()
    batch = make_batch([2, 5, 4]) | {"_mask": np.array([True, False, True])}
    kw = dict(beams=4, max_new_tokens=4, length_penalty=0.0, eos_token=NO_EOS)
    tokens, scores = decode.beam_search(model, params, batch, **kw)
    assert not tokens[1].any() and not scores[1].any()
    sums, _ = decode.score_options(model, params, batch, tokens, np.ones(tokens.shape, bool))
    np.testing.assert_allclose(scores, sums, atol=1e-5)
    assert (np.diff(scores[::2]) <= 0).all()
    assert len({tuple(t) for t in np.asarray(tokens[0]).tolist()}) == 4
    alone = decode.beam_search(model, params, rows_of(batch, [2, 2, 2]), **kw)
    np.testing.assert_array_equal(alone[0][1], tokens[2])
    # No continuation that isn't among them scores better than the worst: all second tokens.
    greedy = decode.generate(model, params, batch, max_new_tokens=4, eos_token=NO_EOS)
    one, score = decode.beam_search(model, params, batch, **kw | {"beams": 1})
    np.testing.assert_array_equal(one, greedy[0])
    np.testing.assert_allclose(score[:, 0], greedy[1][:, 0].sum(axis=-1), atol=1e-5)
    assert (scores[::2, 0] >= score[::2, 0] - 1e-5).all()


def test_a_beam_as_wide_as_all_finds_the_best():
    # Of 31 first tokens 15 are kept: exhaustive for two tokens if the best begins with one of them.
    model, params = make()
    batch = make_batch([3, 5])
    tokens, scores = decode.beam_search(
        model, params, batch, beams=15, max_new_tokens=2, length_penalty=0.0, eos_token=NO_EOS
    )
    first = full_forward(model, params, batch, [[], []])
    total = np.stack(
        [first[:, [t]] + full_forward(model, params, batch, [[t], [t]]) for t in range(31)],
        axis=1,
    )
    for row in range(2):
        order = np.sort(total[row].ravel())[::-1][:5]
        np.testing.assert_allclose(scores[row, :5], order, atol=1e-5)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(beams=0), "beams is 0"),
        (dict(beams=16), "beams is 16, but the vocabulary has 31 tokens"),
        (dict(length_penalty=float("nan")), "length_penalty is nan"),
        (dict(early_stopping="yes"), "early_stopping is 'yes'"),
        (dict(max_new_tokens=0), "max_new_tokens is 0"),
    ],
)
def test_bad_beams(kw, message):
    model, params = make()
    with pytest.raises(ValueError, match=message):
        decode.beam_search(model, params, make_batch([3]), **{"beams": 2, "max_new_tokens": 2, **kw})


@pytest.mark.slow
def test_two_processes_decode_as_one(tmp_path):
    for num in (1, 2):
        processes.run("tests.decode_processes", [tmp_path], num=num)
    alone, *each = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("alone", 0, 1))
    assert len(alone) == 8
    for found in each:
        for a, b in zip(alone, found, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
