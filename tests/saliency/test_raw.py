"""Raw attention: choosing and fusing, mass, and the directions a map is read in."""

import numpy as np
import pytest

from paligemma_med.saliency import raw


@pytest.fixture
def rows():
    """float32[3 layers, 4 heads, 2 tokens, 4 patches + 5 text], rows sum to 1."""
    x = np.random.default_rng(0).random((3, 4, 2, 9)).astype(np.float32)
    return x / x.sum(-1, keepdims=True)


def test_choosing_and_fusing(rows):
    np.testing.assert_allclose(raw.raw(rows), rows.mean((0, 1)), rtol=1e-6)
    np.testing.assert_array_equal(raw.raw(rows, layers=-1, heads=2), rows[2, 2])
    np.testing.assert_array_equal(raw.raw(rows, [0, 2], [1], "max"), rows[[0, 2], 1].max(0))
    np.testing.assert_array_equal(raw.raw(rows, 1, None, "min"), rows[1].min(0))
    np.testing.assert_allclose(raw.raw(rows).sum(-1), 1, rtol=1e-6)


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(layers=3), r"layers is \[3\]; expected some of 0 to 2"),
        (dict(heads=[0, -5]), r"heads is \[0, -5\]; expected some of 0 to 3"),
        (dict(layers=[]), r"layers is \[\]; expected some"),
        (dict(fuse="sum"), r"fuse is 'sum'; expected one of \['max', 'mean', 'min'\]"),
    ],
)
def test_bad_arguments(rows, kw, message):
    with pytest.raises(ValueError, match=message):
        raw.raw(rows, **kw)


def test_mass_is_where_it_lies(rows):
    got = raw.mass(rows, 4, slice(4, 7))
    np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-6)
    one = np.eye(9)[[0, 3, 4, 6, 7, 8]]
    np.testing.assert_array_equal(raw.mass(one, 4, slice(4, 7)).argmax(-1), [0, 0, 1, 1, 2, 2])


def test_directions(rows):
    found = raw.raw(rows)
    image = raw.response_to_image(found, (2, 2))
    assert image.shape == (2, 2, 2)
    assert image[1, 1, 0] == found[1, 2]  # row by row
    np.testing.assert_array_equal(raw.prompt_to_response(found, slice(4, 7)), found[:, 4:7])


def test_patches_shares_are_the_transpose_brought_to_one():
    map = np.array([[0.1, 0.2, 0.7], [0.3, 0.0, 0.7]])
    np.testing.assert_allclose(raw.image_to_response(map, [0]), [0.25, 0.75], rtol=1e-6)
    np.testing.assert_allclose(raw.image_to_response(map, [0, 1]), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(raw.image_to_response(map, np.array([[True], [True]])), [0.5, 0.5])
    np.testing.assert_allclose(raw.image_to_response(map, 1), [1, 0])
    assert (raw.image_to_response(np.zeros((2, 3)), [0]) == 0).all()
