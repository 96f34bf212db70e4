"""Prompts: bad ones, different lengths, and images of several questions."""

import importlib

import numpy as np
import pytest

from paligemma_med import decode
from tests.decode.tiny_models import NO_EOS, make, make_batch
from tests.rounding import assert_close


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
        (dict(zimg=np.zeros((2, 8, 8, 3))), r"zimg \(2, 8, 8, 3\); expected .* \[B, Q, D\]"),
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


def test_no_rows_are_no_batch():
    with pytest.raises(ValueError, match="no rows to make a batch of"):
        decode.batch_of([])


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
    generate = importlib.import_module("paligemma_med.decode.generate")  # not the function of that name
    read = generate.read_prompts
    monkeypatch.setattr(generate, "read_prompts", lambda *a, **kw: seen.append(kw["text_len"]) or read(*a, **kw))
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
            assert_close(got[1], want[1], units=32)
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
    assert_close(got[1], want[1], units=32)
    other = decode.generate(model, params, text | {"zimg": zimg[::-1]}, **kw)
    assert np.abs(other[1] - want[1]).max() > 1e-3
