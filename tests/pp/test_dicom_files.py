"""DICOM files as archives and converters leave them: without meta header, without pixels, mislabelled, compressed."""

import io

import numpy as np
import PIL.Image
import pytest

pydicom = pytest.importorskip("pydicom")

from pydicom import uid  # noqa: E402
from pydicom.pixels import get_decoder  # noqa: E402

from paligemma_med.pp import dicom, dicom_stream, images  # noqa: E402
from tests.pp.dicom_files import grey, jpeg, make, without_meta  # noqa: E402

VALUES = np.array([[0, 100, 200, 400]], np.int16)
COLOURS = np.repeat(np.repeat(np.uint8([[[250, 20, 20], [20, 250, 20]], [[20, 20, 250], [90, 90, 90]]]), 16, 0), 16, 1)


def sentence(content):
    with pytest.raises(images.ImageError) as e:
        images.decode(content)
    assert "\n" not in str(e.value) and "object" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("syntax", [uid.ImplicitVRLittleEndian, uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian])
@pytest.mark.parametrize("preamble, meta", [(True, True), (False, True), (False, False)])
def test_every_encoding_with_and_without_what_stands_before_it(syntax, preamble, meta):
    content = make(VALUES, syntax=syntax, PixelPaddingValue=400, RescaleSlope=1, RescaleIntercept=-7)
    content = content if preamble else content[128:] if not meta else content[132:]
    content = content if meta else without_meta(make(VALUES, syntax=syntax, PixelPaddingValue=400))
    assert dicom.is_dicom(content) and grey(content) == [[0, 128, 255, 255]]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08\0",
        b"\x02\0\0\0",
        b"\x08\0\x01\0\xff\xff\xff\xff",
        b"II*\0\x08\0\0\0",
        b"\0\0\1\0\2\0\x10\x10",
        b"\x08" * 90,
    ],
)
def test_what_is_no_dicom_file(content):
    assert not dicom.is_dicom(content)


def pixelless(sop_class):
    meta = pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = uid.ExplicitVRLittleEndian, sop_class
    ds = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    if sop_class != uid.MediaStorageDirectoryStorage:
        ds.SOPClassUID = sop_class
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID = "1.2.3"
    out = io.BytesIO()
    ds.save_as(out, enforce_file_format=True)
    return out.getvalue()


@pytest.mark.parametrize(
    "sop_class, name",
    [
        (uid.BasicTextSRStorage, "Basic Text SR Storage"),
        (uid.RTPlanStorage, "RT Plan Storage"),
        (uid.MediaStorageDirectoryStorage, "Media Storage Directory Storage"),
        (uid.EncapsulatedPDFStorage, "Encapsulated PDF Storage"),
        ("1.2.3.4", "1.2.3.4"),
    ],
)
def test_files_without_pixels_say_what_they_are(sop_class, name):
    assert sentence(pixelless(sop_class)) == f"a DICOM file without pixels (kind: {name}); expected an image"


def test_an_image_without_its_size():
    content = make(VALUES)
    at = content.index(b"\x28\0\x10\0US")
    assert "without Rows" in sentence(content[:at] + content[at + 10 :])


@pytest.mark.parametrize("kind", ["u2", "i2"])
def test_values_in_the_upper_bits_are_moved_down(kind):
    """12 bits of 16, as older files have them. pydicom's own decoding cuts off the upper ones."""
    values = VALUES.astype(kind) - (0 if kind == "u2" else 200)
    window = dict(WindowCenter=float(values.min()) + 200.5, WindowWidth=401)
    plain = make(values, bits=12, **window)
    upper = make(values << 4, bits=12, HighBit=15, **window)
    assert grey(upper) == grey(plain) == [[0, 64, 128, 255]] and "upper bits" in dicom.decode(upper)[1][0]
    wrong = make(values + 1, bits=12, HighBit=15, **window)  # they stand in the lower ones after all
    assert np.abs(np.array(grey(wrong)) - grey(plain)).max() <= 1


def test_bits_that_are_not_stored_count_for_nothing():
    """Older files have overlays in them."""
    overlaid = VALUES.astype(np.uint16) | np.array([[0x8000, 0, 0xF000, 0]], np.uint16)
    assert grey(make(overlaid, bits=12)) == [[0, 64, 128, 255]]


def test_a_number_of_frames_that_is_none():
    content = make(VALUES, NumberOfFrames="11").replace(b"IS\x02\x0011", b"IS\x02\x001A")
    assert grey(content) == [[0, 64, 128, 255]]
    assert "number of frames" in dicom.decode(content)[1][0]


# Compressed files


def compressed(frame, kind="RGB", **kw):
    return make(COLOURS, bits=8, kind=kind, syntax=uid.JPEGBaseline8Bit, frame=frame, **kw)


def without_markers(stream):
    """A JPEG stream without JFIF's marker, which stands first."""
    assert stream[2:4] == b"\xff\xe0"
    return stream[:2] + stream[4 + int.from_bytes(stream[4:6], "big") :]


def close(content):
    return np.abs(dicom.to_rgb(content).astype(int) - COLOURS)[::31, ::31].max() < 8  # corners, away from edges


@pytest.mark.parametrize("subsampling, marker", [(0, True), (2, True), (2, False)])
def test_ycbcr_labelled_rgb_is_read_and_told(subsampling, marker):
    stream = jpeg(COLOURS, subsampling=subsampling)
    stream = stream if marker else without_markers(stream)
    assert dicom_stream.read(stream).colours == "YBR"
    content = compressed(stream)
    assert close(content) and "labelled RGB" in dicom.decode(content)[1][0]
    right = compressed(stream, kind="YBR_FULL")
    assert close(right) and not dicom.decode(right)[1]


def test_a_label_is_believed_if_the_stream_says_nothing():
    stream = without_markers(jpeg(COLOURS, subsampling=0))
    assert (
        dicom_stream.read(stream).colours == ""
        and not close(compressed(stream))
        and close(compressed(stream, "YBR_FULL"))
    )


def test_rgb_labelled_ycbcr_is_read_and_told():
    ours = PIL.Image.fromarray(COLOURS)
    out = io.BytesIO()
    ours.save(out, "JPEG", quality=95, subsampling=0, keep_rgb=True)
    stream = out.getvalue() + b"\0" * (out.tell() % 2)
    assert dicom_stream.read(stream).colours == "RGB"
    assert close(compressed(stream, "RGB")) and not dicom.decode(compressed(stream, "RGB"))[1]
    content = compressed(stream, "YBR_FULL")
    assert close(content) and "compressed as RGB" in dicom.decode(content)[1][0]


@pytest.mark.parametrize("cut", range(0, 700, 7))
def test_a_stream_that_is_cut_off_says_nothing_wrong(cut):
    found = dicom_stream.read(jpeg(COLOURS)[:cut])
    assert found.size in (None, (32, 32)) and found.colours in ("", "YBR")


def test_signed_values_under_an_unsigned_header():
    """As of a scanner of Toshiba: stored with sign, and the header doesn't say so."""
    values = np.array([[0, 1000, 2000, 3000]] * 4, np.uint16)  # PIL packs no negative ones
    out = io.BytesIO()
    PIL.Image.fromarray(values).save(out, "JPEG2000", irreversible=False, no_jp2=True, signed=True)
    frame = out.getvalue() + b"\0" * (out.tell() % 2)
    window = dict(WindowCenter=1500.5, WindowWidth=3001)
    contents = [
        make(values.astype(dtype), syntax=uid.JPEG2000Lossless, frame=frame, **window) for dtype in ("i2", "u2")
    ]
    assert grey(contents[0]) == grey(contents[1]) == [[0, 85, 170, 255]] * 4
    assert not dicom.decode(contents[0])[1] and "have a sign" in dicom.decode(contents[1])[1][0]


def encode_frame(side, form="JPEG"):
    out = io.BytesIO()
    PIL.Image.fromarray(np.zeros((side, side), np.uint8)).save(out, form)
    return out.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "JPEG2000"])
def test_a_frame_of_another_size_than_the_headers(form):
    """Decoders allocate what the frame asks for, not what the header promises."""
    out = io.BytesIO()
    kw = dict(no_jp2=True) if form == "JPEG2000" else {}
    PIL.Image.fromarray(np.zeros((60, 50), np.uint8)).save(out, form, **kw)
    frame = out.getvalue() + b"\0" * (out.tell() % 2)
    assert dicom_stream.read(frame).size == (60, 50)
    syntax = uid.JPEG2000Lossless if form == "JPEG2000" else uid.JPEGBaseline8Bit
    small = make(np.zeros((6, 5), np.uint8), bits=8, syntax=syntax, frame=frame)
    assert sentence(small).endswith("frame has 50 x 60 pixels; its header says 5 x 6")


def test_a_streams_size_cannot_be_hidden():
    small, large = (dicom_stream.read(encode_frame(side)) for side in (6, 60))
    assert small.size == (6, 6) and large.size == (60, 60)
    for form in ("JPEG", "JPEG2000"):
        frame = encode_frame(60, form)
        # In front of the real stream: another's head, bytes that decoders skip, and filling.
        decoy = encode_frame(6, form)[:60] if form == "JPEG2000" else b"\xff\xd8\0\0\xff\xff\xff\xd0\xff\0"
        hidden = decoy + frame if form == "JPEG2000" else decoy + frame[2:]
        assert dicom_stream.read(hidden).size == (60, 60)


@pytest.mark.parametrize(
    "syntax, package",
    [
        (uid.JPEGLosslessSV1, "python-gdcm"),
        (uid.JPEGLSLossless, "python-gdcm"),
        (uid.JPEG2000Lossless, "python-gdcm"),
        (uid.JPEGExtended12Bit, "pylibjpeg pylibjpeg-libjpeg"),
        (uid.HTJ2KLossless, "pylibjpeg pylibjpeg-openjpeg"),
    ],
)
def test_a_missing_decoder_is_told_with_what_to_install(syntax, package, monkeypatch):
    content = make(VALUES, syntax=syntax, frame=b"\xff\xd8" + bytes(30))
    decoder = get_decoder(syntax)
    monkeypatch.setattr(decoder, "_available", {})
    monkeypatch.setattr(decoder, "_unavailable", {"pylibjpeg": ("pylibjpeg",)})
    told = sentence(content)
    assert told.endswith(f"no decoder is installed; pip install {package}")
    assert told.startswith(f"a DICOM file compressed as {syntax.name}, ")
    # One is installed, but doesn't read this file; another might.
    monkeypatch.setattr(decoder, "_available", {"pillow": lambda *args: 1 / 0})
    assert f"pip install {package}" in sentence(content)


def test_compressions_that_pydicom_does_not_know():
    content = make(VALUES, syntax=uid.MPEG2MPML, frame=bytes(30))
    assert "MPEG2 Main Profile" in sentence(content) and "doesn't read" in sentence(content)


def test_notes_reach_the_log_once(caplog):
    images.tell.cache_clear()
    content = make(VALUES, WindowCenter=0, WindowWidth=0)
    for _ in range(3):
        images.to_rgb(content)
    (record,) = caplog.records
    assert "window that no screen can show" in record.getMessage()


def test_dicom_files_in_folders_need_no_suffix(tmp_path):
    content = make(VALUES)
    for name in ("IM000001", "1.2.840.113619.2.5", "scan.ima", "a.DCM"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "raw").write_bytes(without_meta(content))
    (tmp_path / "film.PNG").write_bytes(b"not read here")
    found = {p.name for p in tmp_path.iterdir()}
    for name in (".hidden.png", "._film.png", "DICOMDIR"):
        (tmp_path / name).write_bytes(content)
    (tmp_path / "notes").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere")
    assert {p.name for p in tmp_path.rglob("*") if images.is_image_file(p)} == found
