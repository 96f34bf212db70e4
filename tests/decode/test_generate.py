"""Answers, token by token, against full forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.decode.generate import _generate
from tests.decode.tiny_models import MODELS, NO_EOS, full_forward, make, make_batch
from tests.rounding import assert_close


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
        assert_close(logprobs[:, 0, step], expected.max(axis=1), units=32)
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
        assert_close(logprobs[:, sample, step], expected, units=32)


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
        assert_close(logprobs[row, 0, :end], free_logprobs[row, 0, :end], units=32)
    assert 0 < stopped < 6
    # Of several, whichever comes first; one that never comes changes nothing.
    np.testing.assert_array_equal(
        decode.generate(model, params, batch, max_new_tokens=6, eos_token=(NO_EOS, eos))[0], tokens
    )
    other = next(int(t) for t in free[:, 0, 1] if t != eos)
    both, _ = decode.generate(model, params, batch, max_new_tokens=6, eos_token=[eos, other])
    for row in range(6):
        own = free[row, 0].tolist()
        end = min((own.index(t) + 1 for t in (eos, other) if t in own), default=6)
        assert both[row, 0].tolist() == own[:end] + [0] * (6 - end)
    assert (both != tokens).any()


def steps_taken(model, params, batch, eos_token, max_new_tokens):
    arrays = {k: batch[k] for k in ("image", "text", "mask_ar", "mask_input")}
    arrays |= dict(skip=~batch["_mask"], row_id=np.arange(len(batch["_mask"]), dtype=np.uint32))
    return int(
        _generate(
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
