"""DICOM: every step from stored values to the screen, by hand and against pydicom's own files."""

import io
import sys

import numpy as np
import PIL.Image
import pytest

pydicom = pytest.importorskip("pydicom")

from data_prep.files import DataError  # noqa: E402
from data_prep.images import convert  # noqa: E402
from paligemma_med.pp import dicom, get_preprocess_fn  # noqa: E402
from tests.pp.dicom_files import grey, make  # noqa: E402

CT = np.array([[0, 964, 1064, 1114, 4095]], np.int16)  # -1024, -60, 40, 90, 3071 HU


def test_rescale_then_window():
    content = make(CT, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    # ((x - 39.5) / 399 + 0.5) * 255, rounded
    assert grey(content) == [[0, 64, 128, 160, 255]]


def test_slope():
    content = make(np.array([[0, 10, 20]], np.uint16), bits=12, RescaleSlope=2, WindowCenter=20, WindowWidth=41)
    assert grey(content) == [[3, 131, 255]]  # values 0, 20, 40; ((x - 19.5) / 40 + 0.5) * 255


@pytest.mark.parametrize("kind", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("center, width", [(40, 400), (0.5, 1), (1, 1), (300.25, 33.5), (-700, 1500)])
def test_window_is_the_standards(kind, center, width):
    from pydicom.pixels import apply_windowing

    values = np.arange(-1024, 3072, dtype=np.int16)
    ds = pydicom.Dataset()
    ds.WindowCenter, ds.WindowWidth, ds.VOILUTFunction = center, width, kind
    ds.PhotometricInterpretation, ds.BitsStored, ds.PixelRepresentation = "MONOCHROME2", 16, 0
    wanted = apply_windowing(values, ds) / 65535  # pydicom scales to 0..2^BitsStored - 1
    np.testing.assert_allclose(dicom.window(values, center, width, kind), wanted, atol=1e-9)


@pytest.mark.parametrize(
    "center, width, kind, message",
    [
        (0, 0, "SIGMOID", "above 0"),
        (0, -3, "LINEAR", "above 0"),
        (float("nan"), 3, "LINEAR", "window centre nan"),
        (0, 3, "CUBIC", "'CUBIC'"),
    ],
)
def test_window_refused(center, width, kind, message):
    with pytest.raises(ValueError, match=message):
        dicom.window(np.zeros(3), center, width, kind)


def test_a_linear_window_below_1_is_exact():
    """The standard has none; PET and diffusion files with small slopes do."""
    np.testing.assert_allclose(dicom.window([0, 0.25, 0.5], 0.25, 0.5), [0, 0.5, 1])


def test_first_of_several_windows():
    one = make(CT, WindowCenter=500, WindowWidth=800)
    several = make(CT, WindowCenter=[500, 1000], WindowWidth=[800, 200])
    assert grey(several) == grey(one) != grey(make(CT, WindowCenter=1000, WindowWidth=200))


def test_monochrome1_is_turned_round_once():
    kw = dict(WindowCenter=500, WindowWidth=800)
    plain = np.array(grey(make(CT, **kw)))
    one = np.array(grey(make(CT, kind="MONOCHROME1", **kw)))
    assert np.abs(one + plain - 255).max() <= 1  # both round up at a half
    assert grey(make(CT, kind="MONOCHROME1", PresentationLUTShape="INVERSE", **kw)) == one.tolist()
    assert grey(make(CT, PresentationLUTShape="INVERSE", **kw)) == one.tolist()


def test_no_window_8_bits_are_kept_and_more_are_stretched():
    assert grey(make(np.array([[7, 100]], np.uint8), bits=8)) == [[7, 100]]
    rescaled = make(np.array([[0, 50, 100]], np.uint8), bits=8, RescaleSlope=2)
    assert grey(rescaled) == [[0, 128, 255]]  # not made for a screen
    assert grey(make(np.array([[100, 150, 200]], np.uint16), bits=12)) == [[0, 128, 255]]
    assert grey(make(np.array([[5, 5]], np.uint16), bits=12)) == [[0, 0]]


def test_padding_does_not_stretch():
    values = np.array([[-2000, 0, 50, 100]], np.int16)
    assert grey(make(values, PixelPaddingValue=-2000)) == [[0, 0, 128, 255]]
    assert grey(make(values, PixelPaddingValue=-2000, PixelPaddingRangeLimit=0)) == [[0, 0, 0, 255]]


def test_modality_and_voi_tables():
    table = pydicom.Dataset()
    table.add_new("LUTDescriptor", "US", [4, 0, 8])
    table.add_new("LUTData", "US", [0, 50, 200, 255])
    table.ModalityLUTType = "US"
    values = np.array([[0, 1, 2, 3, 9]], np.uint16)
    voi = make(values, VOILUTSequence=pydicom.Sequence([table]))
    assert grey(voi) == [[0, 50, 200, 255, 255]]
    modality = make(values, ModalityLUTSequence=pydicom.Sequence([table]), WindowCenter=128, WindowWidth=256)
    assert grey(modality) == [[0, 50, 200, 255, 255]]


@pytest.mark.parametrize("depth", [8, 16])
def test_palette(depth):
    kw = {}
    colours = {"Red": [0, 255, 10, 0], "Green": [0, 0, 20, 0], "Blue": [128, 0, 30, 0]}
    for name, values in colours.items():
        kw[f"{name}PaletteColorLookupTableDescriptor"] = [4, 0, depth]
        data = np.array(values, np.uint8) if depth == 8 else np.array(values, "<u2") * 257
        kw[f"{name}PaletteColorLookupTableData"] = data.tobytes()
    content = make(np.array([[0, 1, 2]], np.uint8), bits=8, kind="PALETTE COLOR", **kw)
    assert dicom.to_rgb(content).tolist() == [[[0, 0, 128], [255, 0, 0], [10, 20, 30]]]


def test_colours():
    rgb = np.array([[[255, 0, 0], [1, 2, 3]]], np.uint8)
    np.testing.assert_array_equal(dicom.to_rgb(make(rgb, bits=8, kind="RGB")), rgb)
    deep = make(rgb.astype(np.uint16) * 257, bits=16, kind="RGB")
    np.testing.assert_array_equal(dicom.to_rgb(deep), rgb)
    ybr = np.array([[[76, 85, 255], [128, 128, 128]]], np.uint8)  # red and grey
    found = dicom.to_rgb(make(ybr, bits=8, kind="YBR_FULL")).astype(int)
    assert np.abs(found - [[[254, 0, 0], [128, 128, 128]]]).max() <= 2


def test_first_frame():
    frames = np.array([[[1, 2]], [[200, 201]]], np.uint8)
    assert grey(make(frames, bits=8)) == [[1, 2]]


def test_without_preamble():
    content = make(np.array([[7, 100]], np.uint8), bits=8, preamble=False)
    assert content[128:132] != b"DICM" and dicom.is_dicom(content)
    assert grey(content) == [[7, 100]]


def test_convert_gives_a_png_without_the_patient():
    content = make(CT, WindowCenter=500, WindowWidth=800)
    assert b"Doe^Jane" in content
    kept = convert.convert(content, "x.dcm")
    image = PIL.Image.open(io.BytesIO(kept))
    assert image.format == "PNG" and image.mode == "L" and b"Doe" not in kept
    np.testing.assert_array_equal(np.asarray(image), convert.to_rgb(content)[..., 0])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c[:-4], "can't be decoded"),
        (lambda c: c[:200], "without pixels|can't be decoded"),
        (
            lambda c: c.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1),
            "deflated DICOM file that is damaged",
        ),
    ],
)
def test_damaged(change, message):
    with pytest.raises(DataError, match=message) as e:
        convert.to_rgb(change(make(CT)), "case/1.dcm")
    assert str(e.value).startswith("case/1.dcm: ")


def test_too_many_pixels(monkeypatch):
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 4)
    with pytest.raises(DataError, match="5 x 1 pixels; expected at most 4"):
        convert.to_rgb(make(CT))


def test_pydicom_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.setitem(sys.modules, "pydicom.pixels", None)
    with pytest.raises(DataError, match=r"x.dcm: .*pip install 'paligemma_med\[dicom\]'"):
        convert.to_rgb(make(CT), "x.dcm")


# --- pydicom's own files, from real machines ---


def sample(name):
    path = pydicom.data.get_testdata_file(name, download=False)
    assert path, f"{name} is not part of this pydicom"
    with open(path, "rb") as f:
        return f.read()


def test_real_mr_with_two_windows():
    content = sample("examples_overlay.dcm")
    ds = pydicom.dcmread(io.BytesIO(content))
    assert list(ds.WindowCenter) == [450, 200]
    x = (ds.pixel_array.astype(float) - 449.5) / 789 + 0.5
    np.testing.assert_array_equal(grey(content), np.floor(np.clip(x, 0, 1) * 255 + 0.5))


def test_real_ct_without_window():
    content = sample("CT_small.dcm")
    x = pydicom.dcmread(io.BytesIO(content)).pixel_array.astype(float)
    x = (x - x.min()) / (x.max() - x.min())
    np.testing.assert_array_equal(grey(content), np.floor(x * 255 + 0.5))


def test_real_palette_against_its_rgb_twin():
    palette, rgb = (dicom.to_rgb(sample(f"examples_{n}.dcm")) for n in ("palette", "rgb_color"))
    assert palette.shape == (350, 800, 3) and rgb.shape == (240, 320, 3)
    lookup = pydicom.dcmread(io.BytesIO(sample("examples_palette.dcm")))
    wanted = pydicom.pixels.apply_color_lut(lookup.pixel_array, lookup) / 65535 * 255
    assert np.abs(palette - wanted).max() <= 0.5 + 1e-6


def test_same_picture_in_every_encoding():
    names = ["MR_small", "MR_small_RLE", "MR_small_bigendian", "MR_small_implicit"]
    first, *rest = (grey(sample(f"{name}.dcm")) for name in names)
    assert all(other == first for other in rest) and max(map(max, first)) == 255


def test_every_sample_is_an_image_or_a_data_error():
    """Of the 80 files in pydicom some are no images, some damaged, some need other decoders."""
    import pathlib

    folder = pathlib.Path(pydicom.data.__file__).parent / "test_files"
    good = 0
    for path in sorted(folder.glob("*.dcm")):
        try:
            rgb = convert.to_rgb(path.read_bytes(), path.name)
        except DataError as e:
            assert str(e).startswith(path.name) and "\n" not in str(e)
        else:
            good += 1
            assert rgb.dtype == np.uint8 and rgb.ndim == 3 and rgb.shape[2] == 3
    assert good >= 45
    for name in ("MR_truncated.dcm", "rtplan.dcm"):
        with pytest.raises(DataError):
            convert.to_rgb(sample(name))


# --- The same picture everywhere ---


@pytest.mark.parametrize("preamble", [True, False])
def test_predict_reads_what_data_sets_store(preamble):
    padded = make(np.array([[0, 100, 200, 4000]]), PixelPaddingValue=4000, preamble=preamble)
    stored = convert.convert(padded, "x.dcm")
    decode = get_preprocess_fn("decode")
    np.testing.assert_array_equal(decode({"image": padded})["image"], decode({"image": stored})["image"])
    assert decode({"image": padded})["image"][0, :, 0].tolist() == [0, 128, 255, 255]


def test_pydicom_logs_no_traceback_beside_the_sentence(caplog):
    with pytest.raises(ValueError, match="no installed decoder reads|for which no decoder"):
        dicom.to_rgb(sample("JPGExtended.dcm"))
    assert not caplog.records
