"""Augmentations that big_vision hasn't: a small rotation, and grey noise."""

import numpy as np
import pytest

from paligemma_med.pp import get_preprocess_fn


def run(pp, image, seed=0):
    return get_preprocess_fn(pp)({"image": image}, np.random.default_rng(seed))["image"]


def test_rotate_turns_a_little_either_way():
    """A dot above the middle goes left or right, by no more than the angle; the middle stays."""
    image = np.zeros((101, 101, 3), np.uint8)
    image[48:53, 48:53] = image[8:13, 48:53] = 255
    places = []
    for seed in range(30):
        out = run("rotate(10)", image, seed)
        assert out.shape == image.shape and out.dtype == np.uint8 and out[50, 50].min() > 200
        _, xs = np.nonzero(out[:30, :, 0] > 100)
        places.append(xs.mean() - 50)
    assert -8 < min(places) < -3 and 3 < max(places) < 8  # 40 px from the middle: 40 sin(10°) = 6.9
    np.testing.assert_array_equal(run("rotate(0)", image), image)
    data = dict(image=image, objects=dict(label=["x"], bbox=np.array([[0, 0, 1, 1]], np.float32)))
    with pytest.raises(ValueError, match="rotate doesn't move boxes"):
        get_preprocess_fn("rotate(5)")(data, np.random.default_rng(0))
    assert get_preprocess_fn("rotate(5)")(
        data | dict(objects=dict(label=[], bbox=np.zeros((0, 4)))), np.random.default_rng(0)
    )
    with pytest.raises(ValueError, match="rotate: expected uint8"):
        run("rotate(5)", image.astype(np.float32))


def test_noise_is_grey_and_of_a_random_strength():
    image = np.full((64, 64, 3), 128, np.uint8)
    deviations = []
    for seed in range(30):
        change = run("noise(0.1)", image, seed).astype(int) - 128
        assert (change == change[..., :1]).all() and abs(change.mean()) < 2
        deviations.append(change.std())
    assert min(deviations) < 5 and 18 < max(deviations) < 26.5
    np.testing.assert_array_equal(run("noise(0)", image), image)
