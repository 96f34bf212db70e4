"""Files from elsewhere: each kind of bad one gives one sentence that names it."""

import io
import pathlib
import string

import numpy as np
import PIL.Image
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import files

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


def _image_bytes(kind: str) -> bytes:
    out = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    PIL.Image.fromarray(noise).save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("name", ["a.jpg", "xmlab1/source.jpg", "xmlab1\\source.jpg", "a/./b..c/d"])
def test_path_inside_accepts_relative_paths(name):
    path = files.path_inside("/data/imgs", name)
    assert path.is_relative_to("/data/imgs")
    assert path.name in ("a.jpg", "source.jpg", "d")


@pytest.mark.parametrize(
    "name",
    [
        "../x.jpg",
        "a/../../x",
        "..\\x",
        "/etc/passwd",
        "\\etc\\passwd",
        "C:\\x.jpg",
        "c:x",
        "a\0b",
        "",
        "  ",
        None,
        3,
        ["a"],
    ],
)
def test_path_inside_refuses(name):
    with pytest.raises(files.DataError, match="expected a relative path inside"):
        files.path_inside("/data/imgs", name)


@given(st.text(alphabet="./\\:aC\0 ", max_size=12) | st.text(string.printable, max_size=8))
def test_path_inside_never_leaves(name):
    root = pathlib.PurePosixPath("/data/imgs")
    try:
        path = files.path_inside(root, name)
    except files.DataError:
        return
    assert path.is_relative_to(root)
    assert ".." not in path.parts


@pytest.mark.parametrize(
    "content, message",
    [
        (b'[{"a": 1}', r"not valid JSON at line 1 column 10"),
        (b"[1, 2\n 3]", r"not valid JSON at line 2"),
        (b"", "not valid JSON"),
        (b'["\xff"]', "not UTF-8 text at byte 2"),
        (POINTER, "git-LFS pointer"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_read_json_names_the_file_and_the_fault(tmp_path, content, message):
    path = tmp_path / "train.json"
    path.write_bytes(content)
    with pytest.raises(files.DataError, match=message) as e:
        files.read_json(path)
    assert str(path) in str(e.value)


def test_read_json_missing_and_byte_order_mark(tmp_path):
    with pytest.raises(files.DataError, match="missing"):
        files.read_json(tmp_path / "no.json")
    (tmp_path / "bom.json").write_bytes(b'\xef\xbb\xbf["\xe5\x9b\xbe"]')
    assert files.read_json(tmp_path / "bom.json") == ["图"]


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_check_image_accepts_whole_files_only(tmp_path, kind):
    content = _image_bytes(kind)
    path = tmp_path / "source.jpg"
    path.write_bytes(content)
    assert len(files.check_image(path).digest) == 64
    path.write_bytes(content[: len(content) // 2])  # the same path again: the result isn't stale
    with pytest.raises(files.DataError, match="not a readable image") as e:
        files.check_image(path)
    assert str(path) in str(e.value) and "0x" not in str(e.value)


@pytest.mark.parametrize(
    "content, message",
    [(POINTER, "git-LFS pointer"), (b"", "not a readable image"), (b"<html>", "not a readable")],
)
def test_check_image_refuses(tmp_path, content, message):
    path = tmp_path / "source.jpg"
    path.write_bytes(content)
    with pytest.raises(files.DataError, match=message):
        files.check_image(path)


def test_check_image_finds_a_flipped_bit_in_png(tmp_path):
    content = bytearray(_image_bytes("PNG"))
    content[len(content) // 2] ^= 1  # decodes or not, the checksum is wrong
    path = tmp_path / "source.png"
    path.write_bytes(content)
    with pytest.raises(files.DataError, match="not a readable image"):
        files.check_image(path)


def test_check_image_missing_or_folder(tmp_path):
    with pytest.raises(files.DataError, match="image is missing"):
        files.check_image(tmp_path / "no.jpg")
    with pytest.raises(files.DataError, match="found a folder"):
        files.check_image(tmp_path)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    with files.whole_file(tmp_path / "new" / "x") as f:
        f.write(b"old")
        assert not (tmp_path / "new" / "x").exists()
    with pytest.raises(KeyboardInterrupt), files.whole_file(tmp_path / "new" / "x") as f:
        f.write(b"new")
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"]
    assert (tmp_path / "new" / "x").read_bytes() == b"old"
