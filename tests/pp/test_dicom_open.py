"""Files that are packed: compressed frames, which GDCM reads, and deflated data sets, of which a few bytes may hold
gigabytes."""

import io
import os
import subprocess
import sys
import zlib

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402

from paligemma_med.pp import dicom, dicom_open  # noqa: E402
from tests.pp.dicom_files import grey, make  # noqa: E402

VALUES = np.arange(12, dtype=np.uint16).reshape(3, 4) * 300


def deflated(change=lambda packed: packed):
    """`make(VALUES)` with everything after its meta header deflated."""
    content = make(VALUES, bits=12, syntax=uid.ExplicitVRLittleEndian)
    length = int.from_bytes(content[140:144], "little")
    ds = pydicom.dcmread(io.BytesIO(content))
    ds.file_meta.TransferSyntaxUID = uid.DeflatedExplicitVRLittleEndian
    head = io.BytesIO()
    pydicom.filewriter.write_file_meta_info(head, ds.file_meta)
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    packed = packer.compress(content[144 + length :]) + packer.flush()
    return b"\0" * 128 + b"DICM" + head.getvalue() + change(packed)


def test_a_deflated_file_is_the_plain_one():
    assert grey(deflated()) == grey(make(VALUES, bits=12))
    assert dicom_open.header(deflated(), ("Rows", "SeriesInstanceUID")).Rows == 3


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda packed: packed[:-9], "is cut off"),
        (lambda packed: b"\xff" * 30, "is damaged"),
        (lambda packed: zlib.compress(bytes(2**21), 9, -15), "more than 1 MiB"),
    ],
)
def test_a_deflated_file_that_is_none(change, message, monkeypatch):
    monkeypatch.setattr(dicom_open, "MAX_INFLATED", 2**20)
    for read in (dicom.to_rgb, lambda content: dicom_open.header(content, ("Rows",))):
        with pytest.raises(dicom.DicomError, match=f"a deflated DICOM file .*{message}"):
            read(deflated(change))


@pytest.mark.parametrize("count", [132, 140, 300, 2000])
def test_of_a_file_as_much_is_read_as_its_header_takes(tmp_path, monkeypatch, count):
    """Wherever the first bytes end: in front of the elements, within one, behind the pixels."""
    path = tmp_path / "x"
    path.write_bytes(make(VALUES, SeriesInstanceUID="1.2.3", InstanceNumber=7, ImageComments="x" * 900))
    monkeypatch.setattr(dicom_open, "_HEADER", count)
    ds = dicom_open.header_of(path, ("SeriesInstanceUID", "InstanceNumber"))
    assert (ds.SeriesInstanceUID, ds.InstanceNumber) == ("1.2.3", 7) and "Rows" not in ds
    path.write_bytes(deflated())
    assert dicom_open.header_of(path, ("Rows",)).Rows == 3
    path.write_bytes(deflated(lambda packed: packed[:-9]))
    with pytest.raises(dicom.DicomError, match="cut off"):
        dicom_open.header_of(path, ("Rows",))
    path.write_bytes(b"no DICOM")
    assert dicom_open.header_of(path, ("Rows",)) is None


def test_the_word_deflated_is_found_wherever_a_reader_would_look():
    content = make(VALUES, bits=12)
    with pytest.raises(dicom.DicomError, match="deflated DICOM file without the length"):
        dicom_open.header(content + uid.DeflatedExplicitVRLittleEndian.encode(), ("Rows",))


# --- Compressed by GDCM, which the extra brings ---


def jpeg_lossless(values):
    """A JPEG stream without loss (ITU-T T.81 Annex H) of 16-bit values: each is predicted by its left neighbour, and
    the difference is its number of bits, in a code of five, and then these."""
    height, width = values.shape
    left = np.pad(values.astype(int), ((0, 0), (1, 0)))[:, :-1]
    left[1:, 0], left[0, 0] = values[:-1, 0], 2**15
    bits = ""
    for difference in ((values - left + 2**15) % 2**16 - 2**15).ravel().tolist():
        count = abs(difference).bit_length()
        bits += f"{count:05b}"
        if count < 16:  # the only one of 16 bits is -32768
            bits += f"{difference if difference > 0 else difference + 2**count - 1:0{count}b}"[:count]
    bits += "1" * (-len(bits) % 8)
    data = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    table = b"\0" + bytes([0, 0, 0, 0, 17, *[0] * 11]) + bytes(range(17))
    frame = b"\x10" + height.to_bytes(2, "big") + width.to_bytes(2, "big") + b"\x01\x01\x11\0"
    segments = {0xC3: frame, 0xC4: table, 0xDA: b"\x01\x01\0\x01\0\0"}
    out = b"\xff\xd8" + b"".join(
        bytes([0xFF, marker]) + (len(x) + 2).to_bytes(2, "big") + x for marker, x in segments.items()
    )
    out += data + b"\xff\xd9"
    return out + b"\0" * (len(out) % 2)


def test_jpeg_lossless_of_several_frames():
    pytest.importorskip("gdcm")
    frames = np.random.default_rng(0).integers(0, 2**16, (2, 5, 7), dtype=np.uint16)
    content = make(frames, syntax=uid.JPEGLosslessSV1, frame=[jpeg_lossless(x) for x in frames])
    for i, frame in enumerate(frames):
        assert dicom.decode(content, frame=i)[0][..., 0].tolist() == grey(make(frame))


@pytest.mark.parametrize("name", ["MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"])
def test_compressed_without_loss_is_the_plain_picture(name):
    pytest.importorskip("gdcm")

    def sample(name):
        with open(pydicom.data.get_testdata_file(f"{name}.dcm", download=False), "rb") as f:
            return f.read()

    assert grey(sample(name)) == grey(sample("MR_small"))


def test_a_folder_called_dl_is_no_module_of_python_2(tmp_path, repo_root):
    pytest.importorskip("gdcm")
    (tmp_path / "dl").mkdir()
    (tmp_path / "x.dcm").write_bytes(make(VALUES))
    code = "from paligemma_med.pp import dicom; print(dicom.to_rgb(open('x.dcm', 'rb').read()).shape)"
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.stdout == "(3, 4, 3)\n", done.stderr


def test_what_no_decoder_reads_is_told_with_its_cure(monkeypatch):
    content = make(VALUES, syntax=uid.JPEGLSLossless, frame=b"\xff\xd8" + bytes(30))
    from pydicom.pixels import get_decoder

    monkeypatch.setattr(get_decoder(uid.JPEGLSLossless), "_available", {})
    with pytest.raises(dicom.DicomError, match="compressed as JPEG-LS .*; pip install python-gdcm$"):
        dicom.to_rgb(content)
