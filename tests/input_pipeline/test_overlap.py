"""Images that are trained on and measured on are counted from the digests of built sets."""

import pytest

from paligemma_med.input_pipeline import overlap
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.pp import image_digests


def digest(i):
    return image_digests.digest(str(i).encode())


@pytest.fixture
def data(tmp_path):
    """Sets "a" (train 0–9, test 8–12) and "b" (train 11–20), and "old" without digests; sections by name and split."""
    images = {"a": {"train": range(10), "test": range(8, 13)}, "b": {"train": range(11, 21)}, "old": None}
    images["a/more"] = {"train": [112]}  # i12, stored anew
    for name, splits in images.items():
        folder = tmp_path / name / "1.0.0"
        folder.mkdir(parents=True)
        (folder / "dataset_info.json").write_text("{}")
        if splits:
            text = image_digests.to_text({s: {digest(i): f"i{i % 100}" for i in r} for s, r in splits.items()})
            (folder / image_digests.NAME).write_text(text)
    return lambda name, split="train": dict(name=name, split=split, data_dir=str(tmp_path))


def test_images_are_counted_once_over_all_sets(data):
    told = overlap.shared_images([data("a", "train[:5]"), data("b"), data("old")], data("a", "test[:50%]"))
    assert told == {
        "images": 4,
        "of": 5,
        "in": {"a train[:5]": {"images": 2, "first": ["i8", "i9"]}, "b train": {"images": 2, "first": ["i11", "i12"]}},
        "not_known": ["old train"],
    }
    said = overlap.line("val", told)
    assert said.startswith(
        "4 of 5 images of the evaluation val are in what is trained on (a train[:5], b train), such as i8"
    )


def test_nothing_is_said_of_nothing(data):
    assert overlap.line("val", overlap.shared_images([data("b")], data("a"))) == ""
    assert overlap.shared_images([], data("a"))["images"] == 0
    for unknown in (data("old"), data("none"), dict(name="table:q.csv"), {}):
        assert overlap.shared_images([data("a")], unknown) == {} and overlap.line("val", {}) == ""


def test_training_sections_of_one_set_and_of_a_mixture(data):
    one = data("a")
    assert overlap.trained_on(dict(data=one, pp="")) == [one]
    mixture = dict(data={"x": 1, "y": 2}, x=dict(data=one), y=dict(data=data("b"), pp=""))
    assert overlap.trained_on(mixture) == [one, data("b")]
    assert overlap.trained_on(None) == overlap.trained_on({}) == []


def test_damaged_digests_are_one_sentence(data, tmp_path):
    (tmp_path / "b" / "1.0.0" / image_digests.NAME).write_text("x\n")
    with pytest.raises(ValueError, match="image_digests.tsv line 1: found 'x'"):
        overlap.shared_images([data("b")], data("a"))


def test_held_out_images_end_a_run_before_it_begins(data):
    """By content: i11 and i12 of a test are in b, whatever they are called there; by image_id within a set."""
    held = data("a", "test[:1]")
    overlap.check_held_out(dict(data=data("b")))
    overlap.check_held_out(dict(data=data("a"), held_out=data("b")))
    with pytest.raises(InputError, match="input: b train has 2 images of input.held_out, a test.*such as i11, i12"):
        overlap.check_held_out(
            dict(data={"x": 1, "y": 2}, x=dict(data=data("b")), y=dict(data=data("b")), held_out=held)
        )
    with pytest.raises(InputError, match="a/more train has 1 images of input.held_out, a test.*such as i12"):
        overlap.check_held_out(dict(data=data("a/more"), held_out=held))
    with pytest.raises(InputError, match="whether old train has images of a test.* isn't known; expected a set built"):
        overlap.check_held_out(dict(data=data("old"), held_out=held))
    with pytest.raises(InputError, match="of old train no images are known"):
        overlap.check_held_out(dict(data=data("a"), held_out=data("old")))
