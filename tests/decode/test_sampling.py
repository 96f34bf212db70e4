"""Sampling: the distribution that is drawn from, and what the random numbers depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from paligemma_med import decode
from paligemma_med.decode.generate import _generate
from paligemma_med.models import lean
from tests.decode.tiny_models import NO_EOS, SAMPLING, full_forward, make, make_batch, rows_of
from tests.rounding import assert_close


def test_samples_do_not_depend_on_the_batch():
    model, params = make()
    batch = make_batch([1, 5, 3]) | {"row_id": np.array([9, 4, 7])}
    whole, logprobs = decode.generate(model, params, batch, num_samples=2, seed=5, **SAMPLING)
    for rows in ([2, 1, 0], [1, 1, 2], [2]):
        part, part_logprobs = decode.generate(model, params, rows_of(batch, rows), num_samples=2, seed=5, **SAMPLING)
        np.testing.assert_array_equal(part, whole[np.array(rows)])
        assert_close(part_logprobs, logprobs[np.array(rows)], units=32)
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
    assert_close(cold_logprobs, logprobs, units=32)
    np.testing.assert_array_equal(greedy[:, 0], greedy[:, 1])


def test_a_tiny_top_p_is_greedy():
    model, params = make()
    batch = make_batch([2, 5, 4])
    kw = dict(max_new_tokens=4, num_samples=2, eos_token=NO_EOS)
    narrow = decode.generate(model, params, batch, temperature=1.0, top_p=1e-9, **kw)[0]
    np.testing.assert_array_equal(narrow, decode.generate(model, params, batch, **kw)[0])


def test_other_temperature_top_p_seed_or_eos_compile_nothing():
    model, params = make()
    batch = make_batch([2, 5, 4])
    kw = dict(max_new_tokens=4, num_samples=2)
    decode.generate(model, params, batch, temperature=1.0, **kw)
    before = _generate._cache_size()
    decode.generate(model, params, batch, temperature=1, top_p=0.5, seed=3, eos_token=7, **kw)
    decode.generate(model, params, batch, temperature=0.2, top_p=1, top_k=9, **kw)
    decode.generate(model, params, batch | {"more": 1}, temperature=np.float64(0.7), **kw)
    assert _generate._cache_size() == before


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


@pytest.mark.parametrize("jit", [jax.jit, lean.jit], ids=["three digits a pass", "one, as on CPUs"])
def test_filters_equal_sorting(jit):
    most_probable, nucleus = jit(decode.most_probable), jit(decode.nucleus)
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 3, (40, 57)).astype(np.float32)
    logits[:10] = np.round(logits[:10])  # equals, zeros of both signs
    logits[10:20, ::3] = -np.inf
    logits[20:25] *= 1e30
    logits[25:27, 5:8] = np.array([-1, 1, 1], np.float32) * np.finfo(np.float32).max
    logits[27, 1:] = -np.inf
    ranked = np.sort(logits, axis=-1)[:, ::-1]
    for k in (1, 2, 9, 56):
        got = np.asarray(most_probable(logits, np.float32(k)))
        want = np.where(logits >= ranked[:, k - 1 : k], logits, -np.inf)
        np.testing.assert_array_equal(got, want)
    # A token stays if those above it hold less than top_p.
    weights = np.asarray(jax.nn.softmax(logits)).astype(np.float64)
    above = ((logits[:, None, :] > logits[:, :, None]) * weights[:, None]).sum(-1)
    for p in (1e-6, 0.3, 0.77):
        got = np.asarray(nucleus(logits, np.float32(p)))
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
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3], [0.25, 0.25, 0.25, 0.25]], jnp.float32))
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
