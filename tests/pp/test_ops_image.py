"""Decoding of every kind of file, resizing against two independent references, augmentations."""

import io
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from paligemma_med.pp import get_preprocess_fn, images
from paligemma_med.pp.images import to_rgb
from paligemma_med.pp.ops_image import resize_image


def encode(image, fmt="PNG", **kwargs):
    out = io.BytesIO()
    image.save(out, fmt, **kwargs)
    return out.getvalue()


def picture(h=13, w=9, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), np.uint8)


def run(pp, image, seed=0, **row):
    return get_preprocess_fn(pp)({"image": image, **row}, np.random.default_rng(seed))["image"]


# decode


def test_rgb_png_is_exact():
    image = picture()
    out = run("decode", encode(Image.fromarray(image)))
    assert out.dtype == np.uint8
    np.testing.assert_array_equal(out, image)


def test_jpeg_equals_pil():
    data = encode(Image.fromarray(picture(40, 30)), "JPEG", quality=80)
    np.testing.assert_array_equal(run("decode", data), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "PA"])
def test_grey_picture_in_every_mode(mode):
    grey = np.repeat(np.array([[0, 255], [255, 0]], np.uint8), 4, axis=1)
    fmt = "TIFF" if mode == "PA" else "PNG"
    image = Image.fromarray(grey)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    try:
        data = encode(image, fmt)
    except OSError:
        pytest.skip(f"this PIL writes no {mode} {fmt}")
    np.testing.assert_array_equal(to_rgb(data), np.repeat(grey[:, :, None], 3, axis=2))


@pytest.mark.parametrize("fmt", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_uses_its_whole_range(fmt):
    values = np.array([[0, 1, 128, 129, 257, 32767, 32768, 65407, 65535]], np.uint16)
    out = to_rgb(encode(Image.fromarray(values), fmt))
    expected = np.rint(values / 65535 * 255)  # 0 0 0 1 1 127 128 255 255: neither wraps nor clips
    np.testing.assert_array_equal(out, np.repeat(expected[:, :, None], 3, axis=2))


def test_16_bit_big_endian_tiff():
    values = np.array([[0, 0x1234, 0xFFFF]], np.uint16)
    image = Image.frombytes("I;16B", (3, 1), values.astype(">u2").tobytes())
    np.testing.assert_array_equal(to_rgb(encode(image, "TIFF"))[0, :, 0], np.rint(values[0] / 257))


def test_16_bit_tiff_whose_white_is_zero_is_turned_round():
    values = np.array([[0, 1000, 65535]], np.uint16)
    content = encode(Image.fromarray(values), "TIFF", tiffinfo={262: 0})
    assert Image.open(io.BytesIO(content)).tag_v2[262] == 0
    np.testing.assert_array_equal(to_rgb(content)[0, :, 0], 255 - np.rint(values[0] / 257))


def test_12_bit_tiff_uses_its_own_range():
    values = np.array([[0, 0x123, 0x800, 0xFFF]], np.uint16)
    packed = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in values.reshape(-1, 2).tolist())
    entries = [(256, 4, 4), (257, 4, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (278, 4, 1), (279, 4, 6)]
    table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
    data = struct.pack("<2sHI", b"II", 42, 14) + packed + struct.pack("<H", 8) + table + bytes(4)
    assert Image.open(io.BytesIO(data)).tag_v2[258] == (12,)
    found = images.decode(data)
    np.testing.assert_array_equal(found.rgb[0, :, 0], np.rint(values[0] / 4095 * 255))
    assert not found.notes


@pytest.mark.parametrize("fmt", ["PNG", "TIFF"])
def test_12_bits_in_16_are_told(fmt, caplog):
    images.tell.cache_clear()
    dark = encode(Image.fromarray(np.array([[0, 4095]], np.uint16)), fmt)
    light = encode(Image.fromarray(np.array([[0, 4096]], np.uint16)), fmt)
    assert images.decode(dark).notes == (images.UNSTRETCHED,) and not images.decode(light).notes
    for _ in range(3):
        np.testing.assert_array_equal(to_rgb(dark)[0, :, 0], [0, 16])
    (record,) = caplog.records  # once a process, not for each of 100,000 images
    assert "below 4096" in record.getMessage()


def test_32_bit_grey_outside_of_16_bits_is_refused():
    inside = Image.fromarray(np.array([[0, 65535]], np.int32))
    np.testing.assert_array_equal(to_rgb(encode(inside, "TIFF"))[0, :, 0], [0, 255])
    for values in ([[0, 65536]], [[-1, 5]]):
        with pytest.raises(ValueError, match="expected 0..65535"):
            to_rgb(encode(Image.fromarray(np.array(values, np.int32)), "TIFF"))


def test_float_image_is_refused():
    with pytest.raises(ValueError, match="floats"):
        to_rgb(encode(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_cmyk_jpeg_keeps_its_colours():
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, :32, 0], image[:, 32:64, 1], image[:, 64:] = 255, 255, 255  # red, green, white
    data = encode(Image.fromarray(image).convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data and Image.open(io.BytesIO(data)).mode == "CMYK"
    # Read without undoing Adobe's inversion, white would come out black.
    assert np.abs(to_rgb(data).astype(int) - image).max() < 12


def test_alpha_is_put_on_black_and_opaque_is_unchanged():
    image = picture()
    opaque = np.dstack([image, np.full(image.shape[:2], 255, np.uint8)])
    np.testing.assert_array_equal(to_rgb(encode(Image.fromarray(opaque))), image)
    hidden = np.dstack([image, np.zeros(image.shape[:2], np.uint8)])
    assert to_rgb(encode(Image.fromarray(hidden))).max() == 0
    half = np.dstack([image, np.full(image.shape[:2], 128, np.uint8)])
    np.testing.assert_allclose(to_rgb(encode(Image.fromarray(half))), image * (128 / 255), atol=1)


def test_palette_colours_and_transparency():
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 10, 20, 30])
    image.putdata([0, 1, 2])
    assert to_rgb(encode(image)).tolist() == [[[255, 0, 0], [0, 255, 0], [10, 20, 30]]]
    out = to_rgb(encode(image, transparency=1))
    assert out.tolist() == [[[255, 0, 0], [0, 0, 0], [10, 20, 30]]]


def test_grey_png_with_a_transparent_value():
    image = Image.fromarray(np.array([[7, 200]], np.uint8))
    assert to_rgb(encode(image, transparency=200)).tolist() == [[[7, 7, 7], [0, 0, 0]]]


def test_first_frame_of_several():
    frames = [Image.new("RGB", (4, 4), c) for c in ((255, 0, 0), (0, 255, 0))]
    for fmt in ("GIF", "TIFF"):
        data = encode(frames[0], fmt, save_all=True, append_images=frames[1:])
        assert to_rgb(data).tolist() == [[[255, 0, 0]] * 4] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_obeyed(fmt, orientation):
    """As PIL, and with it Hugging Face, turns a picture; in each format alike."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    kw = dict(exif=exif, **({"lossless": True} if fmt == "WEBP" else {}))
    data = encode(Image.fromarray(picture(16, 8)), fmt, **kw)
    wanted = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert wanted.shape == ((16, 8, 3) if orientation < 5 else (8, 16, 3))
    np.testing.assert_array_equal(to_rgb(data), wanted)
    assert images.size(data) == wanted.shape[:2]
    # A data set keeps only what every reader shows upright.
    plain = fmt in ("JPEG", "PNG") and orientation == 1
    assert images.decode(data).plain == plain >= images.plain_by_header(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_is_passed_over():
    data = encode(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert to_rgb(data).shape == (13, 9, 3)


def test_arrays_pass():
    image = picture()
    np.testing.assert_array_equal(run("decode", image), image)
    assert run("decode", image[:, :, 0]).shape == run("decode", image[:, :, :1]).shape == image.shape
    assert run("decode", np.full((2, 2), 65535, np.uint16)).tolist() == [[[255] * 3] * 2] * 2
    data = np.array(encode(Image.fromarray(image)), object)  # how some sources wrap bytes
    np.testing.assert_array_equal(run("decode", data), image)


JPEG = encode(Image.fromarray(picture(64, 64)), "JPEG")
PNG = encode(Image.fromarray(picture(64, 64)))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "found 0 bytes"),
        (b"hello, not an image", "19 bytes that start with b'hello, not a'"),
        (JPEG[: len(JPEG) // 2], "damaged or cut-off JPEG"),
        (JPEG[:3], "damaged or cut-off JPEG"),
        (PNG[: len(PNG) // 2], "damaged or cut-off PNG"),
        (PNG[:40] + b"\xff" * 60 + PNG[100:], "damaged or cut-off PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git-LFS pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"\0" * 128 + b"DICM" + b"\0" * 50, "DICOM"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "that start with"),
        ("xmlab1/source.jpg", "expected encoded bytes or a uint8 array, found str"),
        (None, "found NoneType"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((4, 4, 2), np.uint8), r"\[4, 4, 2\]"),
    ],
)
def test_bad_images_name_what_was_found_and_the_row(data, message):
    with pytest.raises(ValueError, match=message) as e:
        run("decode", data, image_id="xmlab7", question_id="42")
    assert "image_id 'xmlab7'" in str(e.value) and "question_id '42'" in str(e.value)


def test_every_truncation_is_an_error():
    for data in (JPEG, PNG):
        for cut in range(0, len(data) - 20, 97):
            with pytest.raises(ValueError, match="not a readable image"):
                to_rgb(data[:cut])


@settings(max_examples=200)
@given(st.integers(0, len(PNG) - 1), st.binary(min_size=1, max_size=30), st.booleans())
def test_damage_is_either_harmless_or_a_value_error(at, noise, png):
    data = bytearray(PNG if png else JPEG)
    data[at : at + len(noise)] = noise
    try:
        assert to_rgb(bytes(data)).ndim == 3
    except ValueError:
        pass


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bomb(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 63 * 64)
    with pytest.raises(ValueError, match="bomb: 64 x 64 pixels; expected at most 4032"):
        to_rgb(PNG)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64)
    assert to_rgb(PNG).shape == (64, 64, 3)


@pytest.mark.parametrize("fmt", ["PCX", "TGA", "EPS"])
def test_formats_off_the_list_are_refused(fmt):
    data = encode(Image.fromarray(picture()), fmt)
    with pytest.raises(ValueError, match="not a readable image, found [0-9]+ bytes that start"):
        to_rgb(data)


def test_decode_arguments():
    with pytest.raises(ValueError, match="channels=3"):
        get_preprocess_fn("decode(channels=1)")
    assert run("decode(precise=False)", PNG).shape == (64, 64, 3)


# resize


def cubic(x):
    """R. Keys, IEEE TASSP 29 (1981), with a = -1/2."""
    return (1.5 * x - 2.5) * x * x + 1 if x < 1 else ((-0.5 * x + 2.5) * x - 4) * x + 2 if x < 2 else 0.0


def reference(image, height, width, antialias, kernel):
    """The definition, pixel by pixel: a weighted mean under a kernel around each centre."""

    def weight(i, out, size_in, size_out):
        scale = size_in / size_out
        radius = max(1.0, scale) if antialias else 1.0
        return kernel(abs((i + 0.5) - (out + 0.5) * scale) / radius)

    h, w, c = image.shape
    result = np.zeros((height, width, c))
    for y in range(height):
        for x in range(width):
            total = 0.0
            for j in range(h):
                wy = weight(j, y, h, height)
                for i in range(w) if wy else ():
                    both = wy * weight(i, x, w, width)
                    result[y, x] += both * image[j, i]
                    total += both
            result[y, x] /= total
    return result


sides = st.integers(1, 9)


@settings(max_examples=60, deadline=None)
@given(sides, sides, sides, sides, st.booleans(), st.booleans(), st.integers(0, 9))
def test_resize_follows_the_definition(h, w, height, width, antialias, smooth, seed):
    image, method = picture(h, w, seed), "bicubic" if smooth else "bilinear"
    exact = reference(image.astype(float), height, width, antialias, cubic if smooth else lambda x: max(0.0, 1 - x))
    out = resize_image(image.astype(np.float32), height, width, antialias=antialias, method=method)
    np.testing.assert_allclose(out, exact, atol=1e-3)
    cut = resize_image(image, height, width, antialias=antialias, method=method)
    assert cut.dtype == np.uint8
    if smooth:  # it overshoots, and PIL cuts that off after each axis
        pass
    elif antialias:  # PIL's, which rounds after each axis
        assert np.abs(cut - exact).max() <= 1.01
        assert np.abs(cut - np.floor(exact + 1e-3)).max() <= 2
    else:  # the fraction is cut off
        assert np.all(cut <= exact + 2e-3) and np.all(cut > exact - 1 - 1e-3)


@pytest.mark.parametrize(
    "size_in, size_out",
    [
        ((448, 400), (224, 224)),
        ((97, 301), (64, 128)),
        ((50, 60), (128, 96)),
        ((300, 20), (75, 80)),
    ],
)
def test_resize_equals_torch(size_in, size_out):
    torch = pytest.importorskip("torch")
    image = picture(*size_in).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None],
        size=size_out,
        mode="bilinear",
        antialias=True,
        align_corners=False,
    )[0].permute(1, 2, 0)
    out = run(f"resize({size_out}, antialias=True)", image)
    np.testing.assert_allclose(out, expected.numpy(), atol=0.02)


def test_resize_without_antialias_equals_torch():
    torch = pytest.importorskip("torch")
    image = picture(97, 61).astype(np.float32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(image).permute(2, 0, 1)[None], size=(32, 32), mode="bilinear"
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(run("resize(32)", image), expected.numpy(), atol=0.02)


@settings(deadline=None)
@given(st.integers(0, 255), st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_constant_image_stays_constant(value, h, w, size):
    out = run(f"resize({size}, antialias=True)", np.full((h, w, 3), value, np.uint8))
    assert out.shape == (size, size, 3) and np.all(out == value)


def test_resize_is_symmetric():
    image = picture(31, 50)
    out = run("resize((16, 20), antialias=True)", image)
    np.testing.assert_array_equal(run("resize((16, 20), antialias=True)", image[::-1])[::-1], out)
    np.testing.assert_array_equal(run("resize((16, 20), antialias=True)", image[:, ::-1])[:, ::-1], out)


def test_resize_dtypes_and_shapes():
    image = picture(8, 6)
    assert run("resize(4)", image.astype(np.float32)).dtype == np.float32
    assert run("resize([4, 5])", image).shape == (4, 5, 3)
    assert run("resize(4)", image[:, :, :1]).shape == (4, 4, 1)
    np.testing.assert_array_equal(run("resize((8, 6))", image), image)


@pytest.mark.parametrize("args", ["0", "-3", "(4,)", "(4, 5, 6)", "'big'", "2.5", "4, 'cubic'"])
def test_resize_bad_arguments(args):
    with pytest.raises(ValueError, match=r"resize\("):
        get_preprocess_fn(f"resize({args})")


def test_resize_before_decode():
    with pytest.raises(ValueError, match="decode comes first"):
        run("resize(4)", np.array(PNG))


# augmentations


@settings(max_examples=40, deadline=None)
@given(
    hnp.array_shapes(min_dims=2, max_dims=2, min_side=8, max_side=60),
    st.integers(20, 100),
    st.integers(0, 99),
)
def test_inception_crop_is_a_part_of_the_image(shape, area_min, seed):
    h, w = shape
    image = np.arange(h * w, dtype=np.float32).reshape(h, w, 1)
    out = run(f"inception_crop(area_min={area_min})", image, seed)
    y, x = divmod(int(out[0, 0, 0]), w)
    np.testing.assert_array_equal(out, image[y : y + out.shape[0], x : x + out.shape[1]])
    # Sides are rounded to whole pixels, which costs up to half of one each.
    assert (out.shape[0] + 0.51) * (out.shape[1] + 0.51) >= h * w * area_min / 100


def test_inception_crop_covers_its_aspects_and_places():
    image = np.arange(100 * 100, dtype=np.float32).reshape(100, 100, 1)
    outs = [run("inception_crop(None, 20, 30, 0.5, 2)", image, seed) for seed in range(200)]
    aspects = np.array([out.shape[1] / out.shape[0] for out in outs])
    assert 0.48 < aspects.min() < 0.6 and 1.7 < aspects.max() < 2.1
    assert 0.9 < np.exp(np.log(aspects).mean()) < 1.1  # no more often wide than tall
    corners = np.array([out[0, 0, 0] for out in outs])
    assert (corners // 100).min() < 5 and (corners % 100).min() < 5
    ends = np.array([out[-1, -1, 0] for out in outs])
    assert (ends // 100).max() > 94 and (ends % 100).max() > 94


def test_inception_crop_varies_and_repeats_with_the_seed():
    image = picture(50, 50)
    outs = [run("inception_crop(16, 30, 90, antialias=True)", image, seed) for seed in range(20)]
    assert {out.shape for out in outs} == {(16, 16, 3)}
    assert len({out.tobytes() for out in outs}) == 20
    np.testing.assert_array_equal(run("inception_crop(16, 30, 90, antialias=True)", image, 3), outs[3])


def test_inception_crop_of_the_whole():
    image = picture(20, 20)
    pp = "inception_crop(area_min=100, aspect_min=1, aspect_max=1)"
    np.testing.assert_array_equal(run(pp, image), image)


def test_inception_crop_that_never_fits_gives_the_image():
    image = picture(10, 100)
    np.testing.assert_array_equal(run("inception_crop(area_min=100)", image), image)


@pytest.mark.parametrize(
    "pp",
    [
        "inception_crop(4, 0)",
        "inception_crop(4, 50, 20)",
        "inception_crop(4, 50, 200)",
        "inception_crop(4, aspect_min=2, aspect_max=1)",
        "brightness(-0.1)",
        "brightness(20)",
        "contrast(1.2, 0.8)",
        "contrast(-1, 1)",
        "rotate(90)",
        "rotate(-1)",
        "noise(2)",
    ],
)
def test_augmentation_bad_arguments(pp):
    with pytest.raises(ValueError, match="expected|share of the full range"):
        get_preprocess_fn(pp)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_brightness_adds_one_number(dtype):
    image = np.clip(picture(), 60, 190).astype(dtype)
    deltas = set()
    for seed in range(30):
        out = run("brightness(0.2)", image, seed)
        assert out.dtype == dtype
        difference = out.astype(float) - image
        assert np.ptp(difference) < 1e-3 and abs(difference.mean()) <= 51.5
        deltas.add(round(difference.mean()))
    assert min(deltas) < -25 and max(deltas) > 25
    np.testing.assert_array_equal(run("brightness(0)", image), image)


def test_brightness_clips():
    image = np.array([[[0, 128, 255]]], np.uint8)
    outs = [run("brightness(1)", image, seed) for seed in range(20)]
    assert any(out.tolist()[0][0][0] == 0 and out[0, 0, 1] < 128 for out in outs)
    assert any(out[0, 0, 2] == 255 and out[0, 0, 1] > 128 for out in outs)  # and none wraps round
    assert all(out[0, 0, 0] <= out[0, 0, 1] <= out[0, 0, 2] for out in outs)


def test_contrast_scales_around_the_mean():
    image = np.clip(picture(), 90, 160).astype(np.float32)
    mean = image.mean((0, 1))
    for seed in range(10):
        out = run("contrast(0.5, 1.5)", image, seed)
        factor = (out - mean)[3, 4, 1] / (image - mean)[3, 4, 1]
        assert 0.49 < factor < 1.51
        np.testing.assert_allclose(out - mean, (image - mean) * factor, atol=1e-2)
    np.testing.assert_allclose(run("contrast(1, 1)", image), image, atol=1e-3)
    assert run("contrast(0.5, 1.5)", picture()).dtype == np.uint8


@pytest.mark.parametrize("op", ["brightness(0.1)", "contrast(0.5, 1.5)", "noise(0.1)"])
def test_augmentation_after_value_range_is_an_error(op):
    with pytest.raises(ValueError, match="before value_range"):
        run(f"value_range(-1, 1)|{op}", picture())


@pytest.mark.real_data
def test_slake_images_decode_and_resize(real_data):
    files = sorted((real_data / "slake" / "imgs").glob("*/source.jpg"))[::40]
    assert files
    for file in files:
        out = run("decode|resize(224, antialias=True)|value_range(-1, 1)", file.read_bytes())
        assert out.shape == (224, 224, 3) and out.dtype == np.float32
        assert -1 <= out.min() < out.max() <= 1
