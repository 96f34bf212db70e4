"""Images from strangers: no program is started, nothing too large is decoded, and whatever is wrong is one sentence."""

import io
import os
import re
import struct
import subprocess
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import pytest

from data_prep import files
from data_prep.files import DataError
from data_prep.images import convert
from paligemma_med.pp import get_preprocess_fn, images

RNG = np.random.default_rng(0)
PIXELS = (np.add.outer(np.arange(24), np.arange(20)) * 5)[..., None] * np.array([1, 2, 3]) % 256
PIXELS = PIXELS.astype(np.uint8)
READERS = {
    "decode": images.decode,
    "size": images.size,
    "training": lambda content: get_preprocess_fn("decode|resize(8)")({"image": content}),
    "build, first pass": lambda content: files.check_image_bytes(content, "x.png"),
    "build, second pass": convert.convert_checked,
    "convert": convert.convert,
}


def encode(pixels, form, **kw):
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, form, **kw)
    return out.getvalue()


def refused(read, content):
    """The sentence with which it is refused."""
    with pytest.raises((images.ImageError, DataError, ValueError)) as e:
        read(content)
    text = str(e.value)
    assert text.isprintable() and 0 < len(text) < 900 and "object at 0x" not in text, text
    return text


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width, height, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


@pytest.fixture
def ghostscript(tmp_path, monkeypatch):
    """A `gs` that leaves a mark when somebody starts it."""
    program, mark = tmp_path / "bin" / "gs", tmp_path / "started"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{mark}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return mark


@pytest.mark.parametrize("name", READERS)
def test_an_image_starts_no_program(name, ghostscript):
    text = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) run\n%%EOF\n"
    binary = struct.pack("<IIIIIIIH", 0xC6D3D0C5, 32, len(text), 0, 0, 0, 0, 0xFFFF)
    for content in (text, binary.ljust(32, b"\0") + text):
        with PIL.Image.open(io.BytesIO(content)) as image:  # as everybody else reads it
            assert image.format == "EPS"
        refused(READERS[name], content)
    assert not ghostscript.exists()


def test_the_trap_for_ghostscript_can_shut(ghostscript):
    subprocess.run(["gs"], check=True)
    assert ghostscript.exists()


@pytest.mark.parametrize(
    "form", ["AVIF", "BLP", "DDS", "EPS", "ICO", "ICNS", "IM", "MSP", "PCX", "PDF", "SGI", "SPIDER", "TGA", "XBM"]
)
def test_formats_off_the_list_are_refused_by_all_readers(form):
    try:
        mode = {"MSP": "1", "XBM": "1", "SPIDER": "F"}.get(form, "P" if form == "BLP" else "RGB")
        out = io.BytesIO()
        PIL.Image.fromarray(PIXELS).resize((16, 16)).convert(mode).save(out, form)
    except (OSError, KeyError, ValueError):
        pytest.skip(f"this PIL writes no {form}")
    for read in READERS.values():
        assert "not a readable image" in refused(read, out.getvalue())


# Decompression bombs


BOMBS = {
    "png": png(12000, 8000, chunk(b"IDAT", zlib.compress(bytes(99)))),
    "gif": b"GIF89a"
    + struct.pack("<HH", 60000, 60000)
    + bytes(3)
    + b","
    + struct.pack("<HHHHBB", 0, 0, 9, 9, 0, 2)
    + b"\0;",
    "bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 30000, 30000, 1, 24, 0, 0, 0, 0, 0, 0),
    "ppm": b"P5 99999 99999 255\n" + bytes(99),
    "tiff": b"II*\0\x08\0\0\0"
    + struct.pack("<H", 5)
    + b"".join(
        struct.pack("<HHII", *entry)
        for entry in [(256, 4, 1, 30000), (257, 4, 1, 30000), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8)]
    )
    + bytes(4),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("form", BOMBS)
def test_bombs_are_refused_by_their_header(form, reader, monkeypatch):
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    assert re.search("bomb|exceeds limit", refused(READERS[reader], BOMBS[form]))


def test_texts_in_a_png_that_unfold_to_gigabytes():
    packed = zlib.compress(bytes(1 << 26), 9)
    for name in (b"zTXt", b"iCCP"):
        content = png(1, 1, chunk(name, b"x\0\0" + packed), chunk(b"IDAT", zlib.compress(bytes(2))))
        try:
            assert images.to_rgb(content).shape == (1, 1, 3)
        except images.ImageError as e:
            assert str(e).isprintable()


# Whatever a decoder raises


class Odd(Exception):
    """An error that says nothing."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("a\nb\x1b[31m"),
        NotImplementedError(),
        struct.error("x"),
        MemoryError(),
        RecursionError("deep"),
        Odd(),
    ]
    + [AttributeError("'X' object has no attribute"), SystemError("tile"), OverflowError("x"), ZeroDivisionError()],
    ids=lambda e: type(e).__name__,
)
def test_whatever_a_decoder_raises_is_one_sentence(error, reader, monkeypatch):
    def load(self):
        raise error

    content = encode(PIXELS, "WEBP")
    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", load)
    monkeypatch.setattr(PIL.WebPImagePlugin.WebPImageFile, "load", load)
    refused(READERS[reader], content)


FILES = {
    "jpeg": encode(PIXELS, "JPEG"),
    "progressive": encode(PIXELS, "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"),
    "png": encode(PIXELS, "PNG"),
    "png16": encode((PIXELS[..., 0].astype(np.uint16) * 257), "PNG"),
    "tiff": encode(PIXELS, "TIFF"),
    "tiff lzw": encode(PIXELS, "TIFF", compression="tiff_lzw"),
    "tiff16": encode((PIXELS[..., 0].astype(np.uint16) * 257), "TIFF"),
    "gif": encode(PIXELS, "GIF"),
    "webp": encode(PIXELS, "WEBP"),
    "bmp": encode(PIXELS, "BMP"),
    "ppm": encode(PIXELS, "PPM"),
    "jp2": encode(PIXELS, "JPEG2000"),
}


def mutations(content, count, rng):
    """Damaged copies: bytes changed near the head and anywhere, cut off, doubled, numbers at their limits."""
    limits = [b"\xff\xff\xff\xff", bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f", b"\0\0\0\1", b"%n\n\x1b"]
    for i in range(count):
        data = bytearray(content)
        at = int(rng.integers(len(data) if i % 2 else min(len(data), 120)))
        match i % 4:
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at : at + 4] = limits[int(rng.integers(len(limits)))]
            case 2:
                data[at : at + 30] = rng.bytes(30)
            case 3:
                data = data[:at] if i % 8 < 4 else data[:at] + data[at // 2 :]
        yield bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FILES)
def test_damage_is_an_image_or_a_sentence_the_same_for_all_readers(form, monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)  # a header can ask for as much as this
    assert images.decode(FILES[form]).rgb.shape == PIXELS.shape
    for content in mutations(FILES[form], 60, np.random.default_rng(1)):
        try:
            shape = images.decode(content).rgb.shape
        except images.ImageError:
            for name, read in READERS.items():
                if name != "size" and not (name == "build, second pass" and images.plain_by_header(content)):
                    refused(read, content)
        else:
            assert images.size(content) == shape[:2]
            assert len(files.check_image_bytes(content, "x").digest) == 64 and convert.convert(content)


# DICOM


def dicom_files():
    pytest.importorskip("pydicom")
    from pydicom import uid

    from tests.pp.dicom_files import item, jpeg, make, table, without_meta

    values = (PIXELS[..., 0].astype(np.int16) - 100) * 8
    group = item(FrameVOILUTSequence=item(WindowCenter=0, WindowWidth=900))
    plain = make(
        values, WindowCenter=[0, 1], WindowWidth=[900, 2], PixelPaddingValue=-800, VOILUTSequence=table([0, 9])
    )
    palette = {f"{c}PaletteColorLookupTableDescriptor": [256, 0, 8] for c in ("Red", "Green", "Blue")}
    palette |= {k.replace("Descriptor", "Data"): bytes(range(256)) for k in palette}
    return {
        "plain": plain,
        "without meta": without_meta(plain),
        "enhanced": make(np.stack([values] * 2), SharedFunctionalGroupsSequence=group),
        "palette": make(PIXELS[..., 0], bits=8, kind="PALETTE COLOR", **palette),
        "jpeg": make(PIXELS, bits=8, kind="RGB", syntax=uid.JPEGBaseline8Bit, frame=jpeg(PIXELS)),
        "big-endian": make(values, syntax=uid.ExplicitVRBigEndian, ModalityLUTSequence=table([5, 6, 7], 16)),
    }


@pytest.mark.parametrize("form", ["plain", "without meta", "enhanced", "palette", "jpeg", "big-endian"])
def test_damaged_dicom_is_an_image_or_a_sentence(form, monkeypatch):
    content = dicom_files()[form]
    assert images.decode(content).rgb.shape == PIXELS.shape
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 100_000)
    for damaged in mutations(content[100:] if form == "plain" else content, 120, np.random.default_rng(2)):
        damaged = bytes(100) + damaged if form == "plain" else damaged
        try:
            assert images.decode(damaged).rgb.dtype == np.uint8
        except images.ImageError:
            refused(images.to_rgb, damaged)


@pytest.mark.parametrize(
    "elements",
    [
        dict(Rows=65535, Columns=65535),
        dict(Rows=0),
        dict(BitsAllocated=7),
        dict(BitsStored=0),
        dict(BitsStored=99),
        dict(SamplesPerPixel=255),
        dict(NumberOfFrames=2**31 - 1),
        dict(NumberOfFrames=-1),
        dict(PhotometricInterpretation="\x1b[31mRED"),
        dict(PhotometricInterpretation=""),
        dict(RescaleSlope="1e308", RescaleIntercept="-1e308"),
        dict(RescaleSlope="1e999"),
        dict(WindowCenter="1e308", WindowWidth="1e-308"),
        dict(WindowCenter="nan", WindowWidth="inf"),
        dict(WindowCenter=["1"] * 1000, WindowWidth=["0"] * 1000),
        dict(VOILUTFunction="\x1b[31m" * 3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_headers_that_ask_for_too_much_or_nonsense(elements):
    pytest.importorskip("pydicom")
    import pydicom

    from tests.pp.dicom_files import make

    ds = pydicom.dcmread(io.BytesIO(make(PIXELS[..., 0].astype(np.int16))))
    with pydicom.config.disable_value_validation():
        for name, value in elements.items():
            setattr(ds, name, value)
        out = io.BytesIO()
        ds.save_as(out)
    try:
        rgb = images.decode(out.getvalue()).rgb
        assert rgb.dtype == np.uint8 and rgb.shape[2] == 3
    except images.ImageError:
        refused(images.to_rgb, out.getvalue())


def test_sequences_nested_without_end():
    from tests.pp.dicom_files import make

    content = make(PIXELS[..., 0])
    start = b"\x08\0\x40\x11SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff"
    for depth in (50, 20_000):
        nested = content[: content.index(b"\x08\0\x16\0UI")] + start * depth
        refused(images.to_rgb, nested + content[len(nested) :])


def test_a_deflated_file_is_not_unfolded():
    """Its header could be any length, and what follows unfolds a thousandfold."""
    content = bytes(128) + b"DICM\x02\0\x10\0UI\x17\x001.2.840.10008.1.2.1.99\0" + zlib.compress(bytes(1 << 26))[2:]
    assert "deflated" in refused(images.to_rgb, content)
    long = b"\x02\0\x02\x01OB\0\0" + struct.pack("<I", 1 << 17) + bytes(1 << 17)
    assert "deflated" in refused(images.to_rgb, content[:132] + long + content[132:])


def test_what_a_file_says_of_itself_reaches_no_terminal_as_it_is():
    from tests.pp.dicom_files import make

    content = make(PIXELS[..., 0], Modality="MR").replace(
        b"1.2.840.10008.5.1.4.1.1.7\0", b"1.2\x1b[31m\x1b]0;x\x07      \r\n  ", 2
    )
    without = content[: content.index(b"\xe0\x7f\x10\x00")]
    assert "without pixels" in refused(images.to_rgb, without)
