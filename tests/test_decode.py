"""Decoding against what it stands for: full forward passes, and the distribution they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from paligemma_med import decode, sharding
from paligemma_med.models import paligemma

IMG = dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4))
LLM = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=31)
MODELS = {
    "mqa": {},
    "gqa": dict(num_kv_heads=2, depth=3),
    "mha": dict(num_kv_heads=4, scan=False),
    "gemma2": dict(
        num_kv_heads=2, post_norms=True, attn_logits_softcap=5.0, final_logits_softcap=3.0,
        query_pre_attn_norm="rsqrt_emb_per_head",
    ),
}  # fmt: skip
NO_EOS = -1  # no token is this one: every row runs to its end


@functools.cache
def make(name="mqa", dtype="float32", seed=0):
    model = paligemma.Model(img=IMG, llm={**LLM, **MODELS[name]}, dtype=dtype)
    init = jax.jit(functools.partial(paligemma.init_params, model, image_size=8))
    params = init(jax.random.key(seed))
    # Norm scales start at 0 and logits near one another; a little noise makes both matter.
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return model, jax.tree.unflatten(tree, leaves)


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


@pytest.mark.parametrize("name", MODELS)
def test_greedy_equals_step_by_step_full_forward_passes(name):
    model, params = make(name)
    batch = make_batch([1, 2, 3, 4, 5, 6], text_len=7)
    tokens, logprobs = decode.generate(model, params, batch, max_new_tokens=4, eos_token=NO_EOS)
    assert tokens.shape == logprobs.shape == (6, 1, 4)
    assert tokens.dtype == jnp.int32 and logprobs.dtype == jnp.float32
    new = [[] for _ in range(6)]
    for step in range(4):
        expected = full_forward(model, params, batch, new)
        np.testing.assert_array_equal(tokens[:, 0, step], expected.argmax(axis=1))
        np.testing.assert_allclose(logprobs[:, 0, step], expected.max(axis=1), atol=1e-5)
        new = [[*own, best] for own, best in zip(new, expected.argmax(axis=1))]


@pytest.mark.parametrize("name", ["gqa", "gemma2"])
def test_sampled_logprobs_are_the_models_own(name):
    # At temperature 1 and without top_p, whatever the samples were drawn with.
    model, params = make(name)
    batch = make_batch([3, 5])
    tokens, logprobs = decode.generate(
        model, params, batch, max_new_tokens=3, num_samples=3, temperature=2.0, top_p=0.9,
        eos_token=NO_EOS,
    )  # fmt: skip
    assert len({tuple(s) for s in np.asarray(tokens).reshape(6, 3).tolist()}) > 2
    for sample, step in np.ndindex(3, 3):
        drawn = np.asarray(tokens[:, sample])
        expected = full_forward(model, params, batch, drawn[:, :step])[[0, 1], drawn[:, step]]
        np.testing.assert_allclose(logprobs[:, sample, step], expected, atol=1e-5)


def test_eos_is_kept_and_nothing_follows():
    model, params = make()
    batch = make_batch([2, 3, 4, 5, 6, 6], seed=3)
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
            model, params, arrays, jax.random.key(0), np.float32(0), np.float32(1),
            np.int32(eos_token), max_new_tokens=max_new_tokens, num_samples=1, greedy=True,
        )[2]
    )  # fmt: skip


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
        model, params, batch | {"_mask": np.array([True, False, True])}, max_new_tokens=3,
        num_samples=2, eos_token=NO_EOS,
    )  # fmt: skip
    full, _ = decode.generate(
        model, params, batch, max_new_tokens=3, num_samples=2, eos_token=NO_EOS
    )
    assert not tokens[1].any() and not logprobs[1].any()
    np.testing.assert_array_equal(tokens[::2], full[::2])


SAMPLING = dict(max_new_tokens=4, temperature=1.3, top_p=0.95, eos_token=NO_EOS)


def test_samples_do_not_depend_on_the_batch():
    model, params = make("gqa")
    batch = make_batch([1, 3, 5, 7, 6, 2]) | {"row_id": np.array([9, 4, 7, 1, 2, 0])}
    whole, logprobs = decode.generate(model, params, batch, num_samples=3, seed=5, **SAMPLING)
    for rows in ([5, 4, 3, 2, 1, 0], [2], [3, 0], [1, 1, 4]):
        part, part_logprobs = decode.generate(
            model, params, rows_of(batch, rows), num_samples=3, seed=5, **SAMPLING
        )
        np.testing.assert_array_equal(part, whole[np.array(rows)])
        np.testing.assert_allclose(part_logprobs, logprobs[np.array(rows)], atol=1e-5)
    # Padding and the other rows' texts change nothing either.
    wider = {
        k: np.pad(v, ((0, 0), (0, 3)), constant_values=int(k == "mask_ar")) if v.ndim == 2 else v
        for k, v in batch.items()
    }
    np.testing.assert_array_equal(
        decode.generate(model, params, wider, num_samples=3, seed=5, **SAMPLING)[0], whole
    )


def test_more_samples_begin_with_the_same_ones():
    model, params = make("gemma2")
    batch = make_batch([2, 5])
    three = decode.generate(model, params, batch, num_samples=3, seed=1, **SAMPLING)[0]
    one = decode.generate(model, params, batch, num_samples=1, seed=1, **SAMPLING)[0]
    np.testing.assert_array_equal(three[:, :1], one)
    assert np.any(three[:, 0] != three[:, 1]) and np.any(three[:, 1] != three[:, 2])


def test_same_seed_same_samples_other_seed_others():
    model, params = make()
    batch = make_batch([2, 5, 4])
    a, b, c = (
        decode.generate(model, params, batch, num_samples=2, seed=s, **SAMPLING)[0]
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
    # Equal prompts in one batch are different rows, and so differ unless row_id says otherwise.
    twins = rows_of(batch, [0, 0])
    free = decode.generate(model, params, twins, num_samples=4, **SAMPLING)[0]
    tied = decode.generate(
        model, params, twins | {"row_id": np.array([3, 3])}, num_samples=4, **SAMPLING
    )[0]
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
        model, params, batch, max_new_tokens=1, num_samples=4000, temperature=temperature,
        top_p=top_p, seed=11,
    )[0]  # fmt: skip
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
            model, params, make_batch([4]), max_new_tokens=2, num_samples=9610, temperature=1e4,
            eos_token=NO_EOS,
        )[0]
    )  # fmt: skip
    pairs = tokens[0, :, 0] * 31 + tokens[0, :, 1]
    assert p_value(pairs, np.full(31 * 31, 1.0)) > 0.01  # hot enough to be uniform


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
    batch = make_batch([3, 4])
    kw = dict(max_new_tokens=2, num_samples=2)
    decode.generate(model, params, batch, temperature=1.0, **kw)
    before = decode._generate._cache_size()
    decode.generate(model, params, batch, temperature=1, top_p=0.5, seed=3, eos_token=7, **kw)
    decode.generate(model, params, batch, temperature=0.2, top_p=1, **kw)
    decode.generate(model, params, batch | {"more": 1}, temperature=np.float64(0.7), **kw)
    assert decode._generate._cache_size() == before


def test_the_image_is_read():
    model, params = make()
    batch = make_batch([3, 4, 5])
    kw = dict(max_new_tokens=3, eos_token=NO_EOS)
    _, logprobs = decode.generate(model, params, batch, **kw)
    _, other = decode.generate(model, params, batch | {"image": -batch["image"]}, **kw)
    assert np.abs(logprobs - other).max(axis=(1, 2)).min() > 1e-3


def test_bfloat16_stays_near_float32():
    model, params = make()
    half_model, _ = make(dtype="bfloat16")
    half_params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    batch = make_batch([3, 4, 5])
    kw = dict(max_new_tokens=1, eos_token=NO_EOS)
    tokens, logprobs = decode.generate(half_model, half_params, batch, **kw)
    expected = full_forward(model, params, batch, [[]] * 3)[np.arange(3), tokens[:, 0, 0]]
    assert logprobs.dtype == jnp.float32
    np.testing.assert_allclose(logprobs[:, 0, 0], expected, atol=0.3)
    longer = decode.generate(
        half_model, half_params, batch, max_new_tokens=3, num_samples=2, temperature=1.0
    )[1]
    assert np.isfinite(longer).all()


@pytest.mark.parametrize("strategy", ["replicate", 'fsdp(axis="data", min_size_to_shard_mb=0)'])
def test_on_a_mesh(strategy):
    model, params = make()
    mesh = sharding.make_mesh()
    batch = make_batch([1, 2, 3, 4, 4, 3, 2, 1]) | {"_mask": np.arange(8) < 7}
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    where = sharding.infer_sharding(params, [(".*", strategy)], mesh)
    got = decode.generate(model, jax.device_put(params, where), placed, num_samples=2, **SAMPLING)
    want = decode.generate(model, params, batch, num_samples=2, **SAMPLING)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1], want[1], atol=1e-5)


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
