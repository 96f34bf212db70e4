"""Ops on keys and values of any kind."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.pp import get_preprocess_fn


@given(st.integers(0, 255), st.floats(-5, 5), st.floats(-5, 5))
def test_value_range_is_linear(value, vmin, vmax):
    image = np.full((2, 3, 3), value, np.uint8)
    out = get_preprocess_fn(f"value_range({vmin!r}, {vmax!r})")({"image": image})["image"]
    assert out.dtype == np.float32 and out.shape == image.shape
    np.testing.assert_allclose(out, vmin + value / 255 * (vmax - vmin), atol=1e-5)


def test_value_range_ends_exactly():
    image = np.array([[[0, 255, 51]]], np.uint8)
    out = get_preprocess_fn("value_range(-1, 1)")({"image": image})["image"]
    np.testing.assert_allclose(out, [[[-1, 1, -0.6]]], atol=1e-6)
    assert out.min() == -1 and out.max() == 1


def test_value_range_per_channel_and_clip():
    image = np.array([[[0.0, 5.0, 20.0]]], np.float32)
    pp = "value_range(0, 1, in_min=[0, 0, 10], in_max=[1, 10, 15], clip_values=True)"
    np.testing.assert_allclose(get_preprocess_fn(pp)({"image": image})["image"], [[[0, 0.5, 1]]])


def test_value_range_of_nothing():
    with pytest.raises(ValueError, match="must differ"):
        get_preprocess_fn("value_range(0, 1, in_min=3, in_max=3)")


def test_keep_holds_on_to_underscore_keys():
    data = {"a": 1, "b": 2, "_truncated": np.int32(3), "_mask": True}
    assert get_preprocess_fn("keep('a', 'nothing')")(data) == {
        "a": 1,
        "_truncated": np.int32(3),
        "_mask": True,
    }


def test_drop():
    assert get_preprocess_fn("drop('a', 'nothing')")({"a": 1, "b": 2}) == {"b": 2}


def test_copy_does_not_share_containers():
    data = {"a": {"x": [1, 2]}, "n": np.arange(2)}
    out = get_preprocess_fn("copy('a', 'b')|copy('n', 'm')")(data)
    out["b"]["x"].append(3)
    assert out["a"] == {"x": [1, 2]} and out["m"] is data["n"]


def test_copy_of_missing_key():
    with pytest.raises(ValueError, match="no key 'answer'"):
        get_preprocess_fn("copy('answer', 'suffix')")({"question": "q"})


@pytest.mark.parametrize(
    "found, expected",
    [
        ({}, "v"),
        ({"k": None}, "v"),
        ({"k": ""}, ""),
        ({"k": "x"}, "x"),
        ({"k": []}, ["v"]),
        ({"k": ["x"]}, ["x"]),
        ({"k": 0}, 0),
    ],
)
def test_setdefault(found, expected):
    assert get_preprocess_fn("setdefault('k', 'v')")(found)["k"] == expected


def test_setdefault_fills_empty_array():
    out = get_preprocess_fn("setdefault('k', 7)")({"k": np.zeros((0, 2), np.int32)})["k"]
    assert out.dtype == np.int32 and out.tolist() == [[7, 7]]


def test_choice_picks_the_same_entry_of_all_keys_and_reaches_all():
    fn = get_preprocess_fn("choice_no_replacement(inkey=['q', 'a'], outkey=['one_{key}', 'y'])")
    data = {"q": ["q0", "q1", "q2"], "a": np.array([0, 1, 2])}
    outs = [fn(data, np.random.default_rng(seed)) for seed in range(50)]
    assert all(out["one_q"] == f"q{out['y']}" for out in outs)
    assert {int(out["y"]) for out in outs} == {0, 1, 2}
    again = [fn(data, np.random.default_rng(seed)) for seed in range(50)]
    assert [o["one_q"] for o in outs] == [o["one_q"] for o in again]


@pytest.mark.parametrize(
    "data, message",
    [
        ({"a": "text"}, "holds one value"),
        ({"a": np.float32(1)}, "holds one value"),
        ({"a": []}, "non-zero length"),
    ],
)
def test_choice_of_nothing_to_choose_from(data, message):
    with pytest.raises(ValueError, match=message):
        get_preprocess_fn("choice_no_replacement('a')")(data, np.random.default_rng(0))


def test_choice_from_lists_of_different_length():
    fn = get_preprocess_fn("choice_no_replacement(['a', 'b'])")
    with pytest.raises(ValueError, match="one non-zero length.*'a': 1.*'b': 2"):
        fn({"a": [1], "b": [1, 2]}, np.random.default_rng(0))
    with pytest.raises(ValueError, match="equal length"):
        get_preprocess_fn("choice_no_replacement(inkey=['a', 'b'], outkey='c')")


def test_getidx():
    data = {"names": ["x", "y", "z"], "i": np.int32(1)}
    assert get_preprocess_fn("getidx('names', 'i', 'name')")(data)["name"] == "y"
    with pytest.raises(ValueError, match="'i' is 5, but 'names' has 3"):
        get_preprocess_fn("getidx('names', 'i')")({**data, "i": 5})
