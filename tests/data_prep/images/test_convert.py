"""Odd image files become the 8-bit pixels that they stand for; plain ones keep their bytes."""

import io

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.files import DataError
from data_prep.images import convert as images
from tests.data_prep.test_files import POINTER

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 7, 3), np.uint8)
GREY = COLOUR[..., 0]
DEEP = RNG.integers(0, 65536, (9, 7)).astype(np.uint16)


def encode(image, kind, **kw):
    image = image if isinstance(image, PIL.Image.Image) else PIL.Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, kind, **kw)
    return out.getvalue()


def with_alpha(alpha):
    return np.dstack([COLOUR, np.broadcast_to(np.uint8(alpha), GREY.shape)])


def stored(content):
    """What `convert` keeps, decoded by PIL alone; it must be what `to_rgb` says."""
    kept = images.convert(content)
    rgb = np.asarray(PIL.Image.open(io.BytesIO(kept)).convert("RGB"))
    np.testing.assert_array_equal(rgb, images.to_rgb(content))
    assert images.convert_checked(content) == kept
    return kept, rgb


@pytest.mark.parametrize(
    "content",
    [
        encode(COLOUR, "PNG"),
        encode(GREY, "PNG"),
        encode(GREY > 127, "PNG"),
        encode(COLOUR, "JPEG"),
        encode(GREY, "JPEG", progressive=True),
        encode(with_alpha(255), "PNG"),  # as 288 images of MedPix 2.0
        encode(np.dstack([GREY, np.full_like(GREY, 255)]), "PNG"),
    ],
    ids=["rgb", "grey", "bits", "jpeg", "grey jpeg", "opaque rgba", "opaque la"],
)
def test_plain_files_keep_their_bytes(content):
    kept, rgb = stored(content)
    assert kept == content
    np.testing.assert_array_equal(rgb, np.asarray(PIL.Image.open(io.BytesIO(content)).convert("RGB")))


def is_plain_png(content):
    image = PIL.Image.open(io.BytesIO(content))
    return image.format == "PNG" and image.mode in ("L", "RGB") and content[24] == 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG2000"])
def test_16_bit_grey_is_scaled_and_not_cut(kind):
    kept, rgb = stored(encode(DEEP, kind))
    assert is_plain_png(kept)
    wanted = np.floor(DEEP / 65535 * 255 + 0.5)
    np.testing.assert_array_equal(rgb, np.repeat(wanted[:, :, None], 3, axis=2))


def test_16_bit_tiff_with_white_as_zero():
    tags = PIL.TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    content = encode(DEEP, "TIFF", tiffinfo=tags)
    assert PIL.Image.open(io.BytesIO(content)).tag_v2[262] == 0
    _, rgb = stored(content)
    np.testing.assert_array_equal(rgb[..., 0], np.floor((65535 - DEEP) / 65535 * 255 + 0.5))


def test_16_bit_colour_png():
    # Written by hand: PIL has no such mode.
    import struct
    import zlib

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    pixels = RNG.integers(0, 65536, (4, 5, 3)).astype(">u2")
    lines = b"".join(b"\0" + row.tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0))
    content += chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    kept, rgb = stored(content)
    assert is_plain_png(kept)
    assert np.abs(rgb.astype(int) - pixels / 257).max() <= 1


def test_cmyk_jpeg_is_not_inverted():
    red = PIL.Image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK")
    kept, rgb = stored(encode(red, "JPEG", quality=100))
    assert is_plain_png(kept)
    assert np.abs(rgb.astype(int) - [255, 0, 0]).max() < 12


def test_transparency_goes_on_black():
    alpha = RNG.integers(0, 256, GREY.shape).astype(np.uint8)
    kept, rgb = stored(encode(with_alpha(alpha), "PNG"))
    assert is_plain_png(kept)
    wanted = COLOUR.astype(float) * alpha[:, :, None] / 255
    assert np.abs(rgb - wanted).max() <= 0.5 + 1e-6


def test_palette_and_its_transparent_entry():
    image = PIL.Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    wanted = np.array([[[10, 20, 30], [200, 100, 50]], [[1, 2, 3], [200, 100, 50]]])
    kept, rgb = stored(encode(image, "PNG"))
    assert is_plain_png(kept)
    np.testing.assert_array_equal(rgb, wanted)
    _, rgb = stored(encode(image, "PNG", transparency=1))
    wanted[:, 1] = 0
    np.testing.assert_array_equal(rgb, wanted)


@pytest.mark.parametrize("kind", ["TIFF", "BMP", "GIF", "WEBP", "PPM"])
def test_other_formats_become_png(kind):
    content = encode(COLOUR, kind, **({"lossless": True} if kind == "WEBP" else {}))
    kept, rgb = stored(content)
    assert is_plain_png(kept)
    if kind != "GIF":  # 63 colours fit, but PIL may dither
        np.testing.assert_array_equal(rgb, COLOUR)


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "PNG"])
def test_first_of_several_frames(kind):
    frames = [PIL.Image.fromarray(np.full((4, 4), v, np.uint8)) for v in (40, 200)]
    content = encode(frames[0], kind, save_all=True, append_images=frames[1:])
    kept, rgb = stored(content)
    assert kept != content and is_plain_png(kept) and (rgb == 40).all()


def test_grey_is_stored_as_grey():
    kept = images.convert(encode(GREY, "BMP"))
    assert PIL.Image.open(io.BytesIO(kept)).mode == "L"


def bad_files():
    png, jpeg = encode(COLOUR, "PNG"), encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 1
    return {
        "nothing": b"",
        "html": b"<!DOCTYPE html><html>not found</html>",
        "pointer": POINTER,
        "half a png": png[: len(png) // 2],
        "png without its end": png[:-12],
        "half a jpeg": jpeg[: len(jpeg) // 2],
        "flipped bit": bytes(flipped),
        "floats": encode(np.zeros((3, 3), np.float32), "TIFF"),
        "too deep": encode(np.full((3, 3), 65536, np.int32), "TIFF"),
        "negative": encode(np.full((3, 3), -5, np.int32), "TIFF"),
        "half a dicom": b"\0" * 128 + b"DICM" + b"\x02\x00\x00\x00UL\x04",
        "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1 1\n",
    }


@pytest.mark.parametrize("kind", list(bad_files()))
@pytest.mark.parametrize("function", [images.to_rgb, images.convert])
def test_bad_files_are_one_sentence_with_the_name(kind, function):
    with pytest.raises(DataError) as e:
        function(bad_files()[kind], "imgs/x17.png")
    assert str(e.value).startswith("imgs/x17.png: ") and "\n" not in str(e.value)
    assert "0x" not in str(e.value)
    if kind == "pointer":
        assert "git-LFS pointer" in str(e.value)


@pytest.mark.filterwarnings("ignore:Image size")
def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match="7 x 9 pixels; expected at most 50"):
        images.to_rgb(encode(COLOUR, "PNG"))


HEADS = [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"II*\0", b"\0" * 128 + b"DICM", b"\x08\x00"]


@pytest.mark.filterwarnings("ignore")
@given(st.binary(max_size=300), st.sampled_from(HEADS))
def test_any_bytes_give_an_image_or_a_data_error(content, head):
    try:
        assert images.to_rgb(head + content).dtype == np.uint8
    except DataError:
        pass
