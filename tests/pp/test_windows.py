"""Windows by name and by number: as an op in front of `decode`, on files in Hounsfield units and on others."""

import numpy as np
import pytest

pytest.importorskip("pydicom")

from paligemma_med.pp import dicom, get_preprocess_fn, images, ops_image, windows  # noqa: E402
from tests.pp.dicom_files import item, make  # noqa: E402

HU = np.array([[-1000, -600, 0, 40, 80, 400, 1300]], np.int16)
CT = dict(Modality="CT", RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=0, WindowWidth=4000)


def ct(**elements):
    return make(HU + 1024, **{**CT, **elements})


def shown(content, pp):
    return get_preprocess_fn(f"{pp}|decode")({"image": content})["image"][0, :, 0].tolist()


def by_hand(center, width):
    return np.floor(np.clip((HU[0] - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255 + 0.5).tolist()


@pytest.mark.parametrize("name", sorted(windows.PRESETS))
def test_a_preset_is_its_centre_and_width_in_hounsfield_units(name):
    center, width = windows.PRESETS[name]
    assert shown(ct(), f'window("{name}")') == shown(ct(), f"window({center}, {width})") == by_hand(center, width)


def test_presets_are_those_of_the_source():
    """Radiopaedia, "Windowing (CT)": brain W 80 L 40, lungs W 1500 L -600, bone W 1800 L 400, abdomen W 400 L 50."""
    assert [windows.PRESETS[k] for k in ("brain", "lung", "bone", "abdomen")] == [
        (40, 80),
        (-600, 1500),
        (400, 1800),
        (50, 400),
    ]


def test_without_the_op_the_files_own_window_counts():
    assert shown(ct(), "") == by_hand(0, 4000)


@pytest.mark.parametrize(
    "elements",
    [
        dict(Modality="MR"),
        dict(Modality=None),
        dict(RescaleType="US"),
        dict(RescaleIntercept=None, RescaleSlope=None, WindowCenter=1024),
    ],
    ids=str,
)
def test_hounsfield_units_are_for_a_ct_in_them(elements):
    """Numbers are in whatever units the file has."""
    content = ct(**elements)
    own, notes = dicom.decode(content)
    assert not notes
    other, notes = dicom.decode(content, window=windows.parse("brain"))
    assert notes == (windows.NO_CT,) and (own == other).all()
    numbers, notes = dicom.decode(content, window=windows.parse("40,80"))
    assert not notes and (numbers != own).any()


def test_colours_have_no_window():
    rgb = np.array([[[255, 0, 0], [1, 2, 3]]], np.uint8)
    found, notes = dicom.decode(make(rgb, bits=8, kind="RGB", Modality="CT"), window=windows.parse("1,9"))
    assert notes == (windows.NO_GREY,) and (found == rgb).all()


def test_it_is_inverted_as_the_file_says_and_may_show_nothing():
    assert shown(ct(PhotometricInterpretation="MONOCHROME1"), "window(40, 80)") == [255 - x for x in by_hand(40, 80)]
    assert set(shown(ct(), "window(9000, 10)")) == {0}


def test_the_units_of_a_frame():
    """Enhanced files: slope and intercept of each frame stand in its functional group."""
    values = np.array([[[0, 80]], [[0, 80]]], np.int16)
    groups = [item(RescaleSlope=1, RescaleIntercept=b, RescaleType="HU") for b in (0, 40)]
    frames = item(PixelValueTransformationSequence=groups[0])
    frames.append(item(PixelValueTransformationSequence=groups[1])[0])
    content = make(values, Modality="CT", PerFrameFunctionalGroupsSequence=frames)
    found = [dicom.decode(content, frame=i, window=windows.parse("brain"))[0][0, :, 0].tolist() for i in (0, 1)]
    assert found == [[0, 255], [129, 255]]  # 0 and 80 HU, 40 and 120 HU: ((x - 39.5) / 79 + 0.5) * 255
    with pytest.raises(images.ImageError, match="no frame 3; the DICOM file has 2"):
        images.decode(content, frame=2)


def test_what_is_no_dicom_goes_on_unchanged():
    op = get_preprocess_fn('window("lung")')
    assert op({"image": b"\x89PNG no DICOM"})["image"] == b"\x89PNG no DICOM"
    pixels = np.zeros((2, 2, 3), np.uint8)
    assert op({"image": pixels})["image"] is pixels
    with pytest.raises(ValueError, match="pp op 'window' comes before 'decode', found after it"):
        get_preprocess_fn('decode|window("lung")')


def test_the_window_of_a_pp_string_for_who_decodes_first():
    content, pp = ct(), 'window("bone")|decode|resize(1)'
    first = images.to_rgb(content, window=ops_image.window_of(pp))
    assert first[0, :, 0].tolist() == shown(content, 'window("bone")') == shown(first, 'window("bone")')
    assert ops_image.window_of("window(40, width=80)") == windows.Window(40, 80)
    assert ops_image.window_of("decode|resize(1)") is None is ops_image.window_of("")


@pytest.mark.parametrize("text", ["spleen", "40", "40,400,1", "40,0", "40,-3", "nan,3", "1e99,3", 7, (1,)])
def test_refused(text):
    with pytest.raises(ValueError, match=r"expected centre and width .* or one of brain, subdural"):
        windows.parse(text)
    with pytest.raises(ValueError, match="pp op"):
        get_preprocess_fn(f"window({text!r})")


@pytest.mark.parametrize("text", [None, ""])
def test_none_is_the_files_own(text):
    assert windows.parse(text) is None
    with pytest.raises(ValueError, match="expected a window's name"):
        get_preprocess_fn(f"window({text!r})")


def test_ways_to_write_one():
    assert windows.parse("Soft_Tissue") == windows.parse(" soft tissue ") == windows.Window(50, 400, "soft tissue")
    assert windows.parse("40, 400") == windows.parse((40, 400)) == windows.Window(40, 400)
