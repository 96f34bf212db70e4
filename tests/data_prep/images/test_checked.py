"""A build started again doesn't decode again what it has decoded."""

import io
import os
import pathlib

import numpy as np
import PIL.Image
import pytest

from data_prep.files import DataError
from data_prep.images.checked import CheckedImages
from data_prep.images.store import open_store
from paligemma_med.pp.images import UNSTRETCHED


def _save(path, value):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((8, 8), value, np.uint8)).save(out, "PNG")
    path.write_bytes(out.getvalue())


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name, value in (("a.png", 1), ("b.png", 2), ("copy.png", 1)):
        _save(folder / name, value)
    (folder / "bad.png").write_bytes(b"no image")
    return folder


class Counting:
    def __init__(self, folder):
        self._store = open_store(folder)
        self.root, self.stamp, self.decoded = self._store.root, self._store.stamp, []

    def check(self, name):
        self.decoded.append(name)
        return self._store.check(name)


def _check_all(images, cache):
    store = Counting(images)
    checked = CheckedImages(store, cache)
    found = {}
    for name in ("a.png", "b.png", "copy.png", "bad.png", "a.png"):
        try:
            found[name] = checked.check(name)
        except DataError as e:
            found[name] = str(e)
    checked.close()
    return store.decoded, found


def test_each_image_is_decoded_once_over_all_builds(images, tmp_path):
    decoded, found = _check_all(images, tmp_path / "cache")
    assert decoded == ["a.png", "b.png", "copy.png", "bad.png"]
    assert found["a.png"] == found["copy.png"] != found["b.png"]
    assert "bad.png: not a readable image" in found["bad.png"]
    again, same = _check_all(images, tmp_path / "cache")
    assert again == [] and same == found
    _save(images / "b.png", 77)
    (images / "bad.png").unlink()
    _save(images / "bad.png", 5)
    again, other = _check_all(images, tmp_path / "cache")
    assert again == ["b.png", "bad.png"]
    assert other["b.png"] != found["b.png"] and isinstance(other["bad.png"], bytes)


def test_half_a_line_is_forgotten(images, tmp_path):
    _check_all(images, tmp_path / "cache")
    (path,) = pathlib.Path(tmp_path / "cache").iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:-5])
    decoded, _ = _check_all(images, tmp_path / "cache")
    assert decoded == ["b.png", "copy.png", "bad.png"]
    assert _check_all(images, tmp_path / "cache")[0] == []


def test_without_a_cache(images):
    assert len(_check_all(images, None)[0]) == 4


def test_what_is_odd_is_kept_for_the_next_build(tmp_path):
    """Beside names that hold what separates fields, and such as no encoding has."""
    folder = tmp_path / "images"
    folder.mkdir()
    names = ["dark.png", "a\tb.png", os.fsdecode(b"\xff.png")]
    for name in names:
        PIL.Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(folder / "x.png")
        (folder / "x.png").rename(folder / name)
    for decoded in (names, ["a\tb.png"]):
        store = Counting(folder)
        checked = CheckedImages(store, tmp_path / "cache")
        for name in names:
            checked.check(name)
            assert checked.notes(name) == (UNSTRETCHED,)
        checked.close()
        assert store.decoded == decoded
