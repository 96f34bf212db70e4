"""Options scored by likelihood, against full forward passes."""

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.models import paligemma
from paligemma_med.pp.tokenizer import get_tokenizer
from tests.decode.tiny_models import IMG, NO_EOS, draw_params, full_forward, make, make_batch
from tests.rounding import assert_close

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
        assert_close(sums[:, option], want, units=32)
    empty = decode.score_options(model, params, batch | {"_mask": np.array([True, False])}, options, mask)[0]
    np.testing.assert_array_equal(empty, np.array(sums) * [[1], [0]])


def test_options_are_scored_as_when_they_are_drawn():
    model, params = make("mha")
    batch = make_batch([3, 5, 1])
    tokens, logprobs = decode.generate(
        model, params, batch, max_new_tokens=3, num_samples=4, temperature=1.5, eos_token=NO_EOS
    )
    sums, _ = decode.score_options(model, params, batch, tokens, np.ones(tokens.shape, bool))
    assert_close(sums, logprobs.sum(axis=-1), units=32)


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
    tokens, mask = decode.encode_options(tok, choices, rows=3)
    assert tokens.shape[:2] == (3, 2) and tokens.shape[2] in (8, 16, 32)
    for row, texts in enumerate(choices):
        for i, text in enumerate(texts):
            assert tokens[row, i][mask[row, i]].tolist() == tok.to_int(text, eos=True)
    assert not mask[1, 1].any() and not mask[2].any() and not tokens[~mask].any()
    open_ended, shorter = decode.encode_options(tok, choices, eos=False)
    assert open_ended.shape[0] == 2 and shorter.sum() == mask.sum() - 3
    for wrong in ([["yes"], []], [["yes", ""]]):
        if wrong == [["yes", ""]]:
            with pytest.raises(ValueError, match="row 0 has the options"):
                decode.encode_options(tok, wrong, eos=False)
        else:
            with pytest.raises(ValueError, match=r"row 1 has the options \[\]"):
                decode.encode_options(tok, wrong)


def test_scores_of_texts():
    model = paligemma.Model(img=IMG, llm=dict(variant="gemma_mu", depth=1))
    params = draw_params(model)
    batch = make_batch([3, 4, 5]) | {"_mask": np.array([True, True, False])}
    choices, tok = [["yes", "no"], ["liver", "left lung", "no"]], get_tokenizer("tiny")
    logprobs, lengths = decode.score_choices(model, params, batch, choices, tok)
    sums, _ = decode.score_options(model, params, batch, *decode.encode_options(tok, choices, rows=3))
    assert [len(x) for x in logprobs] == [2, 3] == [len(x) for x in lengths]
    np.testing.assert_array_equal(np.float32(logprobs[1]), sums[1])
    assert lengths[0] == [len(tok.to_int(t, eos=True)) for t in choices[0]]
