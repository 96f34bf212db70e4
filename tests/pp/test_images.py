"""Image files that programs are given; what their content decodes to is tested in test_ops_image and test_dicom*."""

import numpy as np
import PIL.Image
import pytest

from paligemma_med.pp import images


def test_a_file_is_read_or_named_with_its_flag(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    PIL.Image.fromarray(pixels).save(tmp_path / "a, b ~.png")
    np.testing.assert_array_equal(images.read_file(tmp_path / "a, b ~.png", "--image"), pixels)
    (tmp_path / "notes.txt").write_text("no image")
    for name, message in (
        ("no.png", "No such file or directory."),
        ("", "Is a directory."),
        ("notes.txt", "not a readable image, found 8 bytes that start with b'no image': cannot identify image file"),
    ):
        with pytest.raises(images.ImageError) as e:
            images.read_file(tmp_path / name, "--image")
        assert str(e.value) == f"--image {tmp_path / name}: {message}"


def test_dicom_is_read_from_a_file(tmp_path):
    pytest.importorskip("pydicom")
    from tests.pp.dicom_files import make

    (tmp_path / "IM0001").write_bytes(make(np.array([[0, 50, 100]], np.uint16)))
    assert images.read_file(tmp_path / "IM0001", "--image")[0, :, 0].tolist() == [0, 128, 255]


def test_the_size_of_dicom_is_its_headers(monkeypatch):
    pytest.importorskip("pydicom")
    from tests.pp.dicom_files import make

    content = make(np.zeros((3, 5), np.uint16))
    with pytest.raises(images.ImageError):
        images.size(content[:140])
    monkeypatch.setattr(images, "decode", None)
    assert images.size(content) == (3, 5)
