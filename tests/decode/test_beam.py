"""Beam search against that of transformers."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import decode
from tests.decode.tiny_models import NO_EOS, full_forward, make, make_batch, rows_of
from tests.models import hf
from tests.rounding import assert_close


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
    assert_close(scores, sums, units=32)
    assert (np.diff(scores[::2]) <= 0).all()
    assert len({tuple(t) for t in np.asarray(tokens[0]).tolist()}) == 4
    alone = decode.beam_search(model, params, rows_of(batch, [2, 2, 2]), **kw)
    np.testing.assert_array_equal(alone[0][1], tokens[2])
    # No continuation that isn't among them scores better than the worst: all second tokens.
    greedy = decode.generate(model, params, batch, max_new_tokens=4, eos_token=NO_EOS)
    one, score = decode.beam_search(model, params, batch, **kw | {"beams": 1})
    np.testing.assert_array_equal(one, greedy[0])
    assert_close(score[:, 0], greedy[1][:, 0].sum(axis=-1), units=32)
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
        assert_close(scores[row, :5], order, units=32)


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
