"""Decoding with the image at any place of the prompt, against full forward passes."""

import functools

import jax
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.models import vlm
from tests.rounding import assert_close

PROMPT, IMAGE_AT, NEW = np.array([5, 1, 3]), np.array([2, 1, 0]), 4
LLM = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=31)


@functools.cache
def setting(image_ar):
    """(model, params, batch of prompts of unlike lengths)."""
    img = dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4))
    model = vlm.Model(img=img, llm=LLM, image_ar=image_ar)
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_params(model, image_size=8)
    params = jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)
    on = np.arange(20) < PROMPT[:, None]  # longer than the bucket of 16
    batch = dict(
        image=rng.uniform(-1, 1, (3, 8, 8, 3)).astype(np.float32),
        text=np.where(on, rng.integers(3, 31, on.shape), 0),
        mask_ar=np.where(on, 0 if image_ar == "prefix" else 1, 1),
        mask_input=on.astype(int),
        image_at=IMAGE_AT,
    )
    return model, params, batch


@functools.partial(jax.jit, static_argnums=0)
def full_pass(model, params, text, batch):
    inputs = {k: batch[k] for k in ("image", "mask_ar", "image_at")}
    return jax.nn.log_softmax(model.apply({"params": params}, text=text, **inputs)[0])


@pytest.mark.parametrize("image_ar", ["prefix", "block", "causal"])
def test_greedy_equals_full_forward_passes(image_ar):
    model, params, batch = setting(image_ar)
    kw = dict(max_new_tokens=NEW, eos_token=-1)
    tokens, logprobs = decode.generate(model, params, batch, **kw)
    text, rows = batch["text"].copy(), np.arange(3)
    for step in range(NEW):
        logp = np.asarray(full_pass(model, params, text, batch))[rows, PROMPT + step - 1]
        np.testing.assert_array_equal(tokens[:, 0, step], logp.argmax(axis=1))
        assert_close(logprobs[:, 0, step], logp.max(axis=1), units=32)
        text[rows, PROMPT + step] = logp.argmax(axis=1)
    front = {k: v for k, v in batch.items() if k != "image_at"}
    other, _ = decode.generate(model, params, front, **kw)
    assert (other[:2] != tokens[:2]).any() and (other[2] == tokens[2]).all()


def test_encoded_images_beams_and_options_know_where_the_image_is():
    model, params, batch = setting("block")
    zimg = decode.encode_images(model, params, batch["image"])
    encoded = {k: v for k, v in batch.items() if k != "image"} | {"zimg": zimg}
    kw = dict(max_new_tokens=NEW, eos_token=-1)
    want, logprobs = decode.generate(model, params, batch, **kw)
    np.testing.assert_array_equal(decode.generate(model, params, encoded, **kw)[0], want)
    beams, scores = decode.beam_search(model, params, batch, beams=1, length_penalty=0.0, **kw)
    np.testing.assert_array_equal(beams, want)
    assert_close(scores, logprobs.sum(-1), units=32)
    sums, _ = decode.score_options(model, params, batch, want, np.ones(want.shape, bool))
    assert_close(sums, logprobs.sum(-1), units=32)


@pytest.mark.parametrize(
    "image_at, message",
    [
        ([0, 2, 0], "image_at of row 1 is 2; expected 0 to 1, the length of its prompt"),
        ([-1, 0, 0], "image_at of row 0 is -1; expected 0 to 5"),
        ([0, 0], r"image_at has shape \(2,\); expected \(3,\)"),
    ],
)
def test_places_that_can_t_be(image_at, message):
    model, params, batch = setting("block")
    with pytest.raises(ValueError, match=message):
        decode.generate(model, params, batch | {"image_at": np.array(image_at)}, max_new_tokens=NEW)


def test_rows_become_a_batch():
    _, _, batch = setting("block")
    rows = [{k: v[i] for k, v in batch.items()} | {"question": "?"} for i in range(3)]
    got = decode.batch_of(rows)
    assert got.keys() == batch.keys()
    for key in got:
        np.testing.assert_array_equal(got[key], batch[key])
    assert "image_at" not in decode.batch_of([{k: v for k, v in row.items() if k != "image_at"} for row in rows])
