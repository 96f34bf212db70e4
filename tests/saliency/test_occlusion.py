"""Occlusion: cells, fills, the score of other images, and maps whose truth is known."""

import jax
import numpy as np
import pytest

from paligemma_med.models import paligemma
from paligemma_med.saliency import occlusion, report, sequence
from tests import tiny
from tests.rounding import assert_close


def picture(height=32, width=32, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (height, width, 3)).astype(np.float32)


def test_cells_cover_each_pixel_of_a_patch_once():
    rows, columns = occlusion.bands((34, 48), (2, 3), 2)  # 34 px: two of them fill no patch
    assert rows.shape == (1, 34) and columns.shape == (2, 48)
    assert rows.all()
    assert columns.sum(1).tolist() == [32, 16]  # the last is cut
    rows, _ = occlusion.bands((35, 48), (2, 3))
    assert rows.sum(1).tolist() == [17, 17] and not rows[:, 34].any()


@pytest.mark.parametrize("cell", (0, 1.0, -1))
def test_cells_of_no_patches_are_refused(cell):
    with pytest.raises(ValueError, match="whole number"):
        occlusion.bands((32, 32), (2, 2), cell)


@pytest.mark.parametrize("fill", occlusion.FILLS)
def test_only_the_mask_is_replaced(fill):
    image, mask = picture(), np.zeros((32, 32), bool)
    mask[8:20, 4:9] = True
    out = occlusion.replace(image, mask, fill)
    np.testing.assert_array_equal(out[~mask], image[~mask])
    assert (out[mask] != image[mask]).any(-1).all()
    # Nothing brighter or darker than the image can arise.
    assert out.min() >= image.min() and out.max() <= image.max() or fill == "blank"
    with pytest.raises(ValueError, match="mask is"):
        occlusion.replace(image, mask[1:], fill)


def test_inpainting_is_harmonic_and_ignores_what_was_there():
    image, mask = picture(), np.zeros((32, 32), bool)
    mask[0:12, 20:32] = True  # a corner: two sides have no neighbours
    mask[20:25, 3:9] = True
    out = occlusion.replace(image, mask, "inpaint")
    y, x = 22, 5
    around = out[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1]]
    np.testing.assert_allclose(out[y, x], around.mean(0), atol=1e-5)
    np.testing.assert_allclose(out[0, 31], (out[1, 31] + out[0, 30]) / 2, atol=1e-5)
    other = np.where(mask[..., None], 5.0, image)
    np.testing.assert_allclose(occlusion.replace(other, mask, "inpaint"), out, atol=1e-5)
    # A slope is harmonic: it comes back exactly, away from the image's edge.
    slope = np.broadcast_to(np.linspace(-1, 1, 32)[:, None, None], (32, 32, 3)).astype(np.float32)
    inner = np.zeros((32, 32), bool)
    inner[5:20, 7:30] = True
    np.testing.assert_allclose(occlusion.replace(slope, inner, "inpaint"), slope, atol=1e-5)
    assert not occlusion.replace(image, np.ones((32, 32), bool), "inpaint").any()


def test_unknown_fills_are_refused():
    with pytest.raises(ValueError, match="fill is 'noise'"):
        occlusion.replace(picture(), np.ones((32, 32), bool), "noise")


@pytest.mark.parametrize("batch_size", (1, 5, 64))
def test_the_map_is_the_drop_cell_by_cell(batch_size):
    """A made-up model: token 0 needs brightness of one cell, token 1 fears that of another."""
    image = np.full((32, 48, 3), 1, np.float32)
    shapes = set()

    def score(images):
        shapes.add(images.shape)
        first, second = images[:, 16:, 32:].mean((1, 2, 3)), images[:, :16, :16].mean((1, 2, 3))
        return np.stack([3 * first, -second], axis=1).astype(np.float32)

    found = occlusion.occlusion(score, image, (2, 3), fill="blank", batch_size=batch_size)
    expected = np.zeros((2, 2, 3))
    expected[0, 1, 2], expected[1, 0, 0] = 3, -1
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert shapes == {(batch_size, 32, 48, 3)}
    coarse = occlusion.occlusion(score, image, (2, 3), cell=2, fill="blank")
    np.testing.assert_allclose(coarse, [[[0, 3]], [[-1, 0]]], atol=1e-6)
    mask = np.zeros((32, 48), bool)
    mask[16:, 32:] = mask[:16, :16] = True
    before, after = occlusion.region(score, image, mask, fill="blank")
    np.testing.assert_allclose(before - after, [3, -1], atol=1e-6)


def test_scores_are_those_of_the_whole_sequence():
    model = paligemma.Model(**tiny.MODEL)
    abstract = paligemma.abstract_params(model, image_size=32)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), abstract)
    batch = tiny.batch(rows=1)
    prompt = int((batch["mask_ar"][0] == 0).sum())
    text = batch["text"].copy()
    text[0, prompt : prompt + 3] = [7, 9, 11]  # an answer of three tokens
    prompt_ids, answer_ids = text[0, :prompt], text[0, prompt : prompt + 3]
    seq = sequence.make(model, prompt_ids, answer_ids, picture(seed=9), pad_to=text.shape[1])
    score = occlusion.scorer(model, params, seq)
    images = np.stack([picture(seed=i) for i in range(3)])
    found = score(images)
    logits, _ = jax.jit(model.apply)(
        {"params": params}, images, np.repeat(text, 3, 0), np.repeat(batch["mask_ar"], 3, 0)
    )
    logp = jax.nn.log_softmax(logits)
    for r, token in enumerate((7, 9, 11)):
        assert_close(found[:, r], logp[:, prompt + r - 1, token], units=32)
    assert found.shape == (3, 3)
    assert np.ptp(found, axis=0).min() > 0  # the images matter


def test_batches_tell_how_far_they_are():
    told = []
    images = [np.full((2, 2, 3), i, np.float32) for i in range(5)]
    got = occlusion.in_batches(lambda x: x[:, 0, 0], images, 2, 5, lambda *x: told.append(x))
    assert told == [(2, 5), (4, 5), (5, 5)] and got[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_a_cpu_with_large_weights_has_smaller_batches(monkeypatch):
    params = {"w": np.zeros(300, np.float32)}
    assert report.batch_size_for(params) == report.BATCH
    monkeypatch.setattr(report.lean, "LARGE", 1000)
    assert report.batch_size_for(params) == report.SLOW_BATCH
    monkeypatch.setattr(report.jax, "default_backend", lambda: "gpu")
    assert report.batch_size_for(params) == report.BATCH
