"""Where the parts of a question and its answer lie, and which position predicts what."""

import numpy as np
import pytest

from paligemma_med.models import paligemma
from paligemma_med.saliency import sequence

MODEL = paligemma.Model(img=dict(variant="mu/16"), llm=dict(variant="gemma_mu"))
IMAGE = np.zeros((32, 48, 3))


def test_parts_and_queries():
    seq = sequence.make(MODEL, [2, 7, 8], [30, 31, 1], IMAGE, pad_to=9)
    assert (seq.grid, seq.patches) == ((2, 3), 6)
    assert (seq.prompt, seq.response) == (slice(6, 9), slice(9, 12))
    np.testing.assert_array_equal(seq.queries, [8, 9, 10])  # the last of the prompt predicts 30
    np.testing.assert_array_equal(seq.tokens, [30, 31, 1])
    assert seq.batch["image"].shape == (1, 32, 48, 3)
    np.testing.assert_array_equal(seq.batch["text"][0], [2, 7, 8, 30, 31, 1, 0, 0, 0])
    np.testing.assert_array_equal(seq.batch["mask_ar"][0], [0, 0, 0, 1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(seq.batch["mask_input"][0], [1, 1, 1, 1, 1, 1, 0, 0, 0])
    # The token after each query is the one it predicts.
    following = seq.batch["text"][0, seq.queries - seq.patches + 1]
    np.testing.assert_array_equal(following, seq.tokens)


def test_an_answer_ends_with_its_first_stop_token():
    """Whatever follows is padding; 0 is a token like others ("!" for LLaMA 3)."""
    for tokens, stops, want in (
        ([30, 31, 1, 0, 0], (1,), [30, 31, 1]),
        ([30, 0, 7, 0, 0], (1, 7), [30, 0, 7]),
        ([1, 0, 0], (1, 7), [1]),
        ([30, 0], (1, 7), [30, 0]),
    ):
        assert sequence.ended(tokens, stops).tolist() == want
    assert sequence.make(MODEL, [2, 7], [30, 0], IMAGE).tokens.tolist() == [30, 0]


def test_without_a_prompt_the_image_predicts_the_answer():
    seq = sequence.make(MODEL, [], [30, 31], IMAGE)
    assert (seq.prompt, seq.response, seq.batch["image_at"].tolist()) == (slice(6, 6), slice(6, 8), [0])
    assert seq.queries.tolist() == [5, 6] and seq.places.tolist() == [-1, 0] and seq.tokens.tolist() == [30, 31]


def test_padding_by_default_is_to_sixteens():
    for answer, length in ((1, 16), (13, 16), (14, 32)):
        seq = sequence.make(MODEL, [2, 3, 4], [5] * answer, IMAGE)
        assert seq.batch["text"].shape == (1, length)


@pytest.mark.parametrize(
    "prompt,answer,image,pad_to,message",
    [
        ([3], [], IMAGE, None, "The answer has no tokens"),
        ([3], [3], IMAGE[None], None, r"image has shape \(1, 32, 48, 3\)"),
        ([3, 3], [3, 3], IMAGE, 3, "Prompt and answer are 4 tokens; pad_to=3 is less"),
    ],
)
def test_bad_arguments(prompt, answer, image, pad_to, message):
    with pytest.raises(ValueError, match=message):
        sequence.make(MODEL, prompt, answer, image, pad_to=pad_to)
