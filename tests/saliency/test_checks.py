"""Failure flags: each is raised by what it is for, at its threshold, and not by its opposite."""

import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.saliency import checks as flags


def disc(side=64, radius=20, centre=(32, 32)):
    """uint8[side, side, 3]: a grey disc on black, with a darker hole in it and a bright letter."""
    y, x = np.mgrid[:side, :side]
    distance = np.hypot(y - centre[0], x - centre[1])
    image = np.where(distance < radius, 120, 0)
    image[distance < 5] = 3
    image[2:6, 2:4] = 255
    return np.repeat(image[..., None], 3, axis=-1).astype(np.uint8)


# --- image_ignored ---


def test_an_answer_that_loses_less_than_a_bit_on_any_other_image_ignores_it():
    logprobs = np.log([0.9, 0.8])
    halved = logprobs - [0, 0.70]  # ln 2 is 0.693
    kept = logprobs - [0.68, 0.0]
    for controls in ({"blank": halved, "shuffled": kept}, {"blank": kept, "shuffled": halved}):
        flag = flags.image_ignored(logprobs, controls)
        assert not flag.raised and flag.value == pytest.approx(0.70) and flag.severity == 0
    flag = flags.image_ignored(logprobs, {"blank": kept, "shuffled": logprobs})
    assert flag.raised and flag.value == pytest.approx(0.68)
    for words in (
        "51% as probable with a blank image",
        "100% as probable with a shuffled",
        "hardly",
    ):
        assert words in flag.says
    likelier = flags.image_ignored(logprobs, {"blank": logprobs + 0.05})
    assert likelier.raised and likelier.severity == 1 and likelier.value < 0
    with pytest.raises(ValueError, match="another image"):
        flags.image_ignored(logprobs, {})


def test_control_images():
    image = np.random.default_rng(0).uniform(-1, 1, (6, 8, 3)).astype(np.float32)
    blank = decode.blank_image(image.shape)
    assert not blank.any() and blank.shape == image.shape

    def patches(x):
        return sorted(x[i : i + 2, j : j + 2].tolist() for i in (0, 2, 4) for j in (0, 2, 4, 6))

    mixed = flags.shuffled(image, 2)
    assert patches(mixed) == patches(image)  # each patch is whole, and there once
    assert not np.array_equal(mixed, image)
    np.testing.assert_array_equal(mixed, flags.shuffled(image, (2, 2)))
    assert not np.array_equal(mixed, flags.shuffled(image, 2, seed=1))
    with pytest.raises(ValueError, match=r"patches of 4×4 px don't tile an image of 6×8 px"):
        flags.shuffled(image, 4)


# --- low_image_mass ---


def test_image_mass_is_that_of_the_layer_that_looks_most():
    mass = np.zeros((3, 2, 4, 3))
    mass[..., 1] = 1
    mass[1, 0, :, 0] = 0.3  # one head of two, in one layer
    flag = flags.low_image_mass(mass)
    assert not flag.raised and flag.value == pytest.approx(0.15)
    assert "15%" in flag.says and "layer 2" in flag.says  # counted from 1
    mass[1, 0, :, 0] = 0.1
    flag = flags.low_image_mass(mass)
    assert flag.raised and flag.severity == pytest.approx(0.5)


# --- samples_disagree ---


@pytest.mark.parametrize(
    "samples, raised, value",
    [
        (["yes", " Yes.", "YES", "no", "no"], False, 0.6),
        (["yes", "Yes", "no", "no", "not at all"], True, 0.4),
        (["yes", "no"], True, 0.5),
        (["no"] * 5, True, 0.0),
        (["yes"] * 5, False, 1.0),
    ],
)
def test_samples(samples, raised, value):
    flag = flags.samples_disagree("Yes", samples)
    assert (flag.raised, flag.value) == (raised, value)
    assert flag.severity == pytest.approx(1 - value if raised else 0)
    assert flags.samples_disagree("右 肺", ["右 肺", "左 肺"]).value == 0.5


def test_no_samples_are_refused():
    with pytest.raises(ValueError, match="needs sampled answers"):
        flags.samples_disagree("Yes", [])


def test_a_prompt_that_was_cut():
    assert not flags.prompt_cut(0).raised
    flag = flags.prompt_cut(3)
    assert flag.raised and flag.severity == 1 and "last 3 tokens" in flag.says


# --- body, outside_body ---


@pytest.mark.parametrize("scale", [1.0, 1 / 127.5])
def test_body_is_the_largest_bright_thing_without_holes_or_letters(scale):
    image = disc() * scale - (scale < 1)  # uint8's range, and that of the model
    noisy = image + np.random.default_rng(0).normal(0, 2 * scale, image.shape)
    y, x = np.mgrid[:64, :64]
    distance = np.hypot(y - 32, x - 32)
    for found in (flags.body(image), flags.body(noisy), flags.body(image[..., 0])):
        assert found[distance < 18].all()  # with its hole
        assert not found[distance > 22].any()  # without the letter


def test_body_may_reach_the_edge_of_the_image_or_be_missing():
    film = np.full((64, 48), 200.0)
    film[:, :10] = film[:20, :] = 0
    assert np.sum(flags.body(film) != (film > 0)) <= 1  # opening rounds the corner
    assert flags.body(np.full((32, 32), 7)).sum() == 0
    assert flags.body(np.random.default_rng(0).uniform(100, 200, (64, 64)) + film.max()).mean() > 0.8


def test_a_map_beside_the_body_is_flagged_and_a_uniform_one_is_not():
    image = disc()
    outside = 1 - flags.body(image).reshape(8, 8, 8, 8).mean(axis=(1, 3))
    area = outside.mean()
    uniform = flags.outside_body(np.full((8, 8), 0.1), image)
    assert not uniform.raised and uniform.value == pytest.approx(area) == uniform.threshold
    corner = np.zeros((8, 8))
    corner[0, 0] = 1
    flag = flags.outside_body(corner, image)
    assert flag.raised and flag.value == 1 and flag.severity == 1
    middle = np.zeros((8, 8))
    middle[3:5, 3:5] = 1
    middle[0, 0] = -5  # occlusion's maps have negative values, which point at nothing
    flag = flags.outside_body(middle, image)
    assert not flag.raised and flag.value == 0
    assert flags.outside_body(outside, image).raised
    assert not flags.outside_body(1 - outside, image).raised


def test_without_an_outside_or_a_map_nothing_is_flagged():
    corner = np.zeros((8, 8))
    corner[0, 0] = 1
    full = np.random.default_rng(0).uniform(100, 255, (64, 64))
    full[0, 0] = 0
    assert not flags.outside_body(corner, full).raised
    assert not flags.outside_body(np.zeros((8, 8)), disc()).raised
    assert not flags.outside_body(corner, np.zeros((64, 64))).raised  # no body at all
    with pytest.raises(ValueError, match="a map of 7×8 doesn't divide an image of 64×64 px"):
        flags.outside_body(np.zeros((7, 8)), disc())


# --- worst_first ---


def test_worst_first():
    def flag(raised, severity):
        return flags.Flag("x", raised, 0.0, 0.0, severity, "")

    fine, slight, bad = flag(False, 0.0), flag(True, 0.1), flag(True, 0.9)
    answers = [[fine, fine], [bad, fine], [slight, slight], [fine, fine], [bad, slight], []]
    assert flags.worst_first(answers) == [4, 2, 1, 0, 3, 5]
    assert flags.worst_first([]) == []
