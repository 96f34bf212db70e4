"""The file of images' digests beside a built set."""

import pytest

from paligemma_med.pp import image_digests

A, B = image_digests.digest(b"a"), image_digests.digest(b"b")


def test_what_is_written_is_read(tmp_path):
    splits = {"train": {A: "one", B: "two\nlines\tand a tab"}, "test": {A: ""}}
    (tmp_path / image_digests.NAME).write_text(image_digests.to_text(splits))
    assert image_digests.read(tmp_path) == {"train": {A: "one", B: "two lines and a tab"}, "test": {A: ""}}


def test_none_without_the_file_and_one_sentence_for_a_damaged_one(tmp_path):
    assert image_digests.read(tmp_path) is None
    (tmp_path / image_digests.NAME).write_text(f"train\t{A}\tone\ntrain\tx\n")
    with pytest.raises(ValueError, match="image_digests.tsv line 2: found .*expected split, digest and image_id"):
        image_digests.read(tmp_path)


@pytest.mark.parametrize(
    "spec, wanted",
    [("train", "a"), ("train[:10]+test", "ab"), ("all", "ab"), ("none", ""), ("test[10%:]", "b")],
)
def test_splits_as_configs_name_them(spec, wanted):
    splits = {"train": {A: "a"}, "test": {B: "b"}}
    assert "".join(image_digests.of_split(splits, spec).values()) == wanted
