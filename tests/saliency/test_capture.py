"""Captured attention: as PyTorch's, as a prefix-LM must be, and the same whole and streamed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from paligemma_med import decode
from paligemma_med.saliency import capture, raw, relevancy, rollout, sequence
from tests.models import hf
from tests.rounding import assert_close
from tools.bench import saliency_memory

NAMES = ("gqa", "gemma2")
PROMPT, ANSWER = 5, 10


@functools.cache
def example(name, pad_to=17):
    """(model, params, sequence) of a reference case."""
    case, _, model, params, batch = hf.reference(name)
    tokens = np.random.default_rng(1).integers(1, case["llm"]["vocab_size"], PROMPT + ANSWER)
    image = batch["image"][0]
    return model, params, sequence.make(model, tokens[:PROMPT], tokens[PROMPT:], image, pad_to=pad_to)


@functools.cache
def whole(name):
    model, params, seq = example(name)
    return capture.attention(model, params, seq.batch)


@pytest.mark.parametrize("name", NAMES)
def test_both_towers_equal_hugging_face(name):
    case, theirs, _, _, _ = hf.reference(name)
    _, _, seq = example(name)
    batch = {**seq.batch, "valid": seq.batch["mask_input"] > 0}
    inputs = hf.torch_inputs(case, batch)
    with torch.no_grad():
        want = theirs(**inputs, output_attentions=True)
        tower = theirs.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    got, end = whole(name), seq.response.stop
    for ours, other in zip(got.llm, want.attentions, strict=True):
        np.testing.assert_allclose(ours[:, :, :end], other.numpy()[:, :, :end], rtol=0, atol=1e-5)
    for ours, other in zip(got.img, tower.attentions, strict=True):
        np.testing.assert_allclose(ours, other.numpy(), rtol=0, atol=1e-5)
    logp = torch.log_softmax(want.logits[0], -1).numpy()
    np.testing.assert_allclose(
        got.logprobs[0, PROMPT : PROMPT + ANSWER], logp[seq.queries, seq.tokens], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("name", NAMES)
def test_rows_sum_to_one_and_nobody_sees_what_comes_later(name):
    _, _, seq = example(name)
    got = whole(name)
    for probs in (got.llm, got.img):
        assert probs.dtype == np.float32
        assert_close(probs.sum(-1), 1)
    before = seq.response.start
    assert (got.llm[..., :before, before:] == 0).all()  # image and prompt never see the answer
    assert (got.llm[..., :before, :before] > 0).all()  # but each other, in both directions
    for at in range(before, seq.response.stop):
        assert (got.llm[..., at, at + 1 :] == 0).all()
        assert (got.llm[..., at, : at + 1] > 0).all()


SETTINGS = (dict(), dict(fuse="max", discard=0.4), dict(fuse="min", discard=0.9, start_layer=1))


@pytest.mark.parametrize("name,kw", [*(("gqa", kw) for kw in SETTINGS), ("gemma2", SETTINGS[0])])
def test_streamed_equals_whole(name, kw):
    """But for rounding: products are rounded otherwise inside the loop over layers than outside, and rows in
    another program (by some emitters of XLA; by others they are equal to the bit)."""
    model, params, seq = example(name)
    full, got = whole(name), capture.streamed(model, params, seq.batch, seq.queries, **kw)
    rows = full.llm[:, 0][:, :, seq.queries]
    assert_close(got.rows, rows)
    fixed = functools.partial(rollout.rollout, **kw)
    assert_close(got.rollout, jax.jit(fixed)(full.llm[:, 0])[seq.queries])
    img = functools.partial(rollout.rollout, **{**kw, "start_layer": 0})
    assert_close(got.img_rollout, jax.jit(img)(full.img[:, 0]))
    np.testing.assert_array_equal(got.mass, raw.mass(got.rows, seq.patches, seq.prompt))
    assert_close(got.mass.sum(-1), 1)
    assert_close(got.rollout.sum(-1), 1)
    assert (got.mass[:, :, 0, 2] == 0).all()  # the first query comes before the answer
    assert (got.mass[:, :, 1:, 2] > 0).all()
    at = seq.queries - seq.patches + 1
    assert_close(got.logprobs, full.logprobs[0, at])
    for x in got:
        assert isinstance(x, np.ndarray) and x.dtype == np.float32


def test_padding_changes_nothing():
    model, params, seq = example("gqa")
    _, _, longer = example("gqa", pad_to=24)
    kw = SETTINGS[1]
    want = capture.streamed(model, params, seq.batch, seq.queries, **kw)
    got = capture.streamed(model, params, longer.batch, longer.queries, **kw)
    length = want.rows.shape[-1]
    assert_close(got.rows[..., :length], want.rows)
    assert_close(got.rollout[:, :length], want.rollout)
    for x in (got.rows, got.rollout):
        assert (x[..., seq.response.stop :] == 0).all()
    assert_close(got.logprobs, want.logprobs)


def test_logprobs_are_those_of_decoding():
    model, params, seq = example("gemma2")
    got = capture.streamed(model, params, seq.batch, seq.queries).logprobs
    prompt = seq.batch["text"][:, :PROMPT]
    batch = dict(image=seq.batch["image"], text=prompt, mask_ar=0 * prompt, mask_input=np.ones_like(prompt))
    options = seq.tokens[None, None]
    want, _ = decode.score_options(model, params, batch, options, np.ones_like(options, bool))
    np.testing.assert_allclose(got.sum(), want[0, 0], atol=1e-4)


def test_a_later_token_changes_no_earlier_row():
    model, params, seq = example("gqa")
    want = capture.streamed(model, params, seq.batch, seq.queries)
    text = seq.batch["text"].copy()
    changed = 4
    at = PROMPT + changed
    text[0, at] = text[0, at] % 50 + 1
    got = capture.streamed(model, params, {**seq.batch, "text": text}, seq.queries)
    same = changed + 1  # the query of token `changed` comes before it
    assert_close(got.rows[:, :, :same], want.rows[:, :, :same])
    assert_close(got.rollout[:same], want.rollout[:same])
    assert np.abs(got.rows[:, :, same:] - want.rows[:, :, same:]).max() > 1e-3


def test_refusals():
    model, params, seq = example("gqa")
    fused = model.clone(attn_impl="cudnn", llm={**model.llm, "attn_impl": "cudnn", "scan": False})
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        capture.attention(fused, params, seq.batch)
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        capture.streamed(fused, params, seq.batch, seq.queries)
    plain = capture.capturable(fused)
    assert plain.attn_impl == "xla"
    assert plain.llm == {**model.llm, "scan": True} and plain.img == {**model.img, "scan": True}
    first, last = seq.patches, seq.patches + 17 - 2
    for queries in ([first - 1], [last + 1], []):
        with pytest.raises(ValueError, match=f"expected positions of the text.*{first} to {last}"):
            capture.streamed(model, params, seq.batch, queries)
    twice = {k: np.repeat(v, 2, 0) for k, v in seq.batch.items()}
    with pytest.raises(ValueError, match="batch has 2 rows; expected one"):
        capture.streamed(model, params, twice, seq.queries)
    with pytest.raises(ValueError, match="start_layer is 2; expected 0 to 1"):
        capture.streamed(model, params, seq.batch, seq.queries, start_layer=2)


def test_probabilities_are_float32_under_bfloat16():
    model, params, seq = example("gqa")
    want = capture.streamed(model, params, seq.batch, seq.queries)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), params)
    model = model.clone(dtype="bfloat16")
    got = capture.streamed(model, params, seq.batch, seq.queries)
    for x, exact in zip(got[:3], want, strict=False):
        assert x.dtype == np.float32
        assert_close(x.sum(-1), 1)
        np.testing.assert_allclose(x, exact, atol=0.05)


def test_streamed_never_holds_all_layers(optimised):
    """Of 18 layers' probabilities, not two more than the one that any pass holds."""
    shapes = 280, 96, 8, "mu/14", "gemma_2b"
    found = saliency_memory.run(*shapes, dtypes=("float32",), gradients=False)
    layer = 8 * 4 * (20 * 20 + 96) ** 2 / 2**20
    assert found["all probabilities"] > 18 * layer
    assert found["float32"]["added"] < 2 * layer
    assert found["float32"]["added_by_page"] < 2 * layer


@pytest.mark.slow
def test_medgemmas_tower_is_captured_within_one_layers_memory(optimised):
    """4096 patches, of which all layers' probabilities take 27 GiB."""
    found = saliency_memory.added(896, 64, 8, None, None, "float32", "medgemma_4b")
    layer = 16 * 4096**2 * 4 / 2**20
    assert found["added"] < 1.05 * layer
    assert found["added_by_page"] < layer + 6 * 4096**2 * 4 / 2**20  # and four rollouts with what they need
    model, params, batch, _ = saliency_memory._abstract(896, 64, 8, None, None, "float32", "medgemma_4b")
    assert all(x.shape[0] == 1 for x in batch.values()) and relevancy._together(model, batch) == 1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_megabytes_at_448_px_and_the_shapes_of_3b(dtype, optimised):
    kw = dict(discard=0.5)
    found = saliency_memory.added(448, 128, 64, "So400m/14", "gemma_2b", dtype, **kw)
    assert found["added"] < 200 and found["added_by_page"] < 200
