"""The library's reading of DICOM files agrees with that of the data sets' builders."""

import pathlib

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from data_prep.files import DataError  # noqa: E402
from data_prep.images import dicom as builders  # noqa: E402
from paligemma_med.pp import dicom  # noqa: E402
from tests.data_prep.images.test_dicom import CT, make  # noqa: E402

FILES = {
    "window": make(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400),
    "second window": make(CT, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, -600], WindowWidth=[400, 1500]),
    "sigmoid": make(CT, WindowCenter=1000, WindowWidth=800, VOILUTFunction="SIGMOID"),
    "no window": make(CT),
    "8 bits": make(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, bits=8),
    "inverted": make(CT, kind="MONOCHROME1", WindowCenter=900, WindowWidth=300),
    "frames": make(np.stack([CT, CT[:, ::-1]])),
    "flat": make(np.full((2, 3), 7, np.uint16)),
    "colours": make(np.arange(24, dtype=np.uint8).reshape(2, 4, 3), bits=8, kind="RGB"),
}


@pytest.mark.parametrize("name", FILES)
def test_as_the_builders_do(name):
    content = FILES[name]
    assert dicom.is_dicom(content)
    got, want = dicom.to_rgb(content), builders.to_rgb(content)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, want)


def test_on_pydicoms_own_files():
    folder = pathlib.Path(pydicom.__file__).parent / "data" / "test_files"
    compared = 0
    for path in sorted(folder.glob("*.dcm")):
        content = path.read_bytes()
        if not dicom.is_dicom(content):
            continue
        try:
            want = builders.to_rgb(content)
        except DataError:
            with pytest.raises(ValueError):
                dicom.to_rgb(content)
            continue
        got = dicom.to_rgb(content)
        assert got.shape == want.shape, path.name
        assert np.abs(got.astype(int) - want).max() <= 1, path.name
        compared += 1
    assert compared >= 20


def test_pydicom_logs_no_traceback_beside_the_sentence(caplog):
    path = pathlib.Path(pydicom.__file__).parent / "data" / "test_files" / "JPGExtended.dcm"
    with pytest.raises(ValueError, match="a DICOM file that can't be read"):
        dicom.to_rgb(path.read_bytes())
    assert not caplog.records


@pytest.mark.parametrize("content", [b"", b"\0" * 128 + b"DICM", FILES["window"][:300]])
def test_damaged(content):
    with pytest.raises(ValueError, match="a DICOM file that can't be read"):
        dicom.to_rgb(content)


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    with pytest.raises(ValueError, match="5 x 1 pixels; expected at most 4"):
        dicom.to_rgb(FILES["window"])


def test_pydicom_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pydicom", None)
    with pytest.raises(ValueError, match=r"pip install 'paligemma_med\[dicom\]'"):
        dicom.to_rgb(FILES["window"])
