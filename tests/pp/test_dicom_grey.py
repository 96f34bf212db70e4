"""Grey DICOM values: where windows and slopes may stand, and what is shown if they are broken.

The expected levels are computed by hand from PS3.3 C.11.
"""

import numpy as np
import pytest

pytest.importorskip("pydicom")

from pydicom.dataelem import DataElement  # noqa: E402
from pydicom.uid import ExplicitVRBigEndian  # noqa: E402

from paligemma_med.pp import dicom, dicom_grey  # noqa: E402
from tests.pp.dicom_files import grey, item, items, make, table  # noqa: E402

VALUES = np.array([[0, 100, 200, 400]], np.int16)
STRETCHED = [[0, 64, 128, 255]]  # from the smallest to the largest
WINDOW = dict(WindowCenter=100.5, WindowWidth=201)  # 0..200
SHOWN = [[0, 128, 255, 255]]


def notes(content):
    return " ".join(dicom.decode(content)[1])


def group(window=None, slope=None):
    """An item of functional groups with a window (centre, width) and a slope."""
    made = {}
    if window:
        made["FrameVOILUTSequence"] = item(WindowCenter=window[0], WindowWidth=window[1])
    if slope:
        made["PixelValueTransformationSequence"] = item(RescaleSlope=slope, RescaleIntercept=0, RescaleType="US")
    return item(**made)


# Enhanced multi-frame files


def test_window_and_rescale_of_functional_groups():
    frames = np.stack([VALUES, VALUES])
    shared = make(frames, SharedFunctionalGroupsSequence=group((100.5, 201), 1))
    assert grey(shared) == SHOWN
    doubled = make(frames, SharedFunctionalGroupsSequence=group((100.5, 201), 2))
    assert grey(doubled) == [[0, 255, 255, 255]]


def test_a_frames_own_groups_come_before_the_shared_ones_and_those_before_the_files():
    frames = np.stack([VALUES, VALUES])
    own = items(group((200.5, 401)), group((5000, 2)))  # the second frame's
    content = make(
        frames,
        PerFrameFunctionalGroupsSequence=own,
        SharedFunctionalGroupsSequence=group((100.5, 201), 2),
        WindowCenter=1,
        WindowWidth=1,
        RescaleSlope=100,
        RescaleIntercept=0,
    )
    # The slope is shared, the window the first frame's: 0, 200, 400, 800 of 0..400.
    assert grey(content) == [[0, 128, 255, 255]]
    files_own = make(frames, PerFrameFunctionalGroupsSequence=items(group(), group()), **WINDOW)
    assert grey(files_own) == SHOWN


# Windows that show nothing


@pytest.mark.parametrize(
    "center, width",
    [([0, 100.5], [0, 201]), ([50, 100.5], [-3, 201]), ([9999, 100.5], [10, 201]), ([None, 100.5], [None, 201])],
)
def test_a_window_that_cannot_be_used_or_misses_all_is_followed_by_the_next(center, width):
    center, width = (["" if x is None else x for x in xs] for xs in (center, width))
    content = make(VALUES, WindowCenter=center, WindowWidth=width)
    assert grey(content) == SHOWN and "passed over" in notes(content)


def test_then_by_the_voi_lut_then_by_the_whole_range():
    lut = table([0, 50, 255], first=100)  # below 100 and above 102: the ends
    missing = dict(WindowCenter=9999, WindowWidth=10)
    assert grey(make(VALUES, VOILUTSequence=lut, **missing)) == [[0, 0, 255, 255]]
    assert grey(make(VALUES, VOILUTSequence=table([0, 0]), **missing)) == STRETCHED
    assert grey(make(VALUES, **missing)) == STRETCHED
    assert grey(make(VALUES, WindowCenter=None, WindowWidth=None)) == STRETCHED
    assert grey(make(VALUES, WindowCenter=100)) == STRETCHED  # a pair lacks its half
    unknown = make(VALUES, VOILUTFunction="CUBIC", **WINDOW)
    assert grey(unknown) == STRETCHED and "function" in notes(unknown)


def test_a_picture_of_one_value_has_no_window_that_misses():
    content = make(np.full((1, 3), 7, np.int16), WindowCenter=9999, WindowWidth=10)
    assert grey(content) == [[0, 0, 0]] and not notes(content)


def test_a_sigmoid_far_away_shows_nothing():
    content = make(VALUES, WindowCenter=20000, WindowWidth=100, VOILUTFunction="SIGMOID")
    assert grey(content) == STRETCHED and "none of the picture's values" in notes(content)


def test_a_window_half_wide_shows_small_slopes():
    content = make(VALUES, RescaleSlope=0.00125, RescaleIntercept=0, WindowCenter=0.25, WindowWidth=0.5)
    assert grey(content) == STRETCHED and not notes(content)


# Elements that are empty or alone


def test_slopes_that_are_empty_or_alone():
    for one in (dict(RescaleSlope=2), dict(RescaleSlope=2, RescaleIntercept=None)):
        assert grey(make(VALUES, **one, **WINDOW)) == [[0, 255, 255, 255]]
    for one in (dict(RescaleIntercept=100), dict(RescaleSlope=None, RescaleIntercept=100)):
        assert grey(make(VALUES, **one, **WINDOW)) == [[128, 255, 255, 255]]
    both = make(VALUES, RescaleSlope=None, RescaleIntercept=None, **WINDOW)
    assert grey(both) == SHOWN and not notes(both)
    zero = make(VALUES, RescaleSlope=0, RescaleIntercept=0, **WINDOW)
    assert grey(zero) == SHOWN and "slope is 0" in notes(zero)


def test_numbers_that_are_text():
    window = make(VALUES, **WINDOW).replace(b"\x00201.0", b"\x0020x.0")
    assert b"20x" in window and grey(window) == STRETCHED
    slope = make(VALUES, RescaleSlope=2, RescaleIntercept=0, **WINDOW).replace(b"\x002.0 ", b"\x00.-. ")
    assert b".-." in slope and grey(slope) == SHOWN


@pytest.mark.parametrize("name", ["VOILUTSequence", "ModalityLUTSequence"])
def test_empty_tables(name):
    nothing = {key: DataElement(key, "US", None) for key in ("LUTDescriptor", "LUTData")}
    for empty in (item(LUTExplanation="none"), item(LUTDescriptor=[4, 0, 8]), item(**nothing)):
        content = make(VALUES, **{name: empty})
        assert grey(content) == STRETCHED and "empty" in notes(content)
    assert grey(make(VALUES, **{name: item()[:0]})) == STRETCHED


# Padding


@pytest.mark.parametrize("padding, vr", [(-2000, "SS"), (65536 - 2000, "US")])
def test_padding_counts_for_neither_range_nor_window(padding, vr):
    """Signed pixels with unsigned padding have the same bits."""
    values = np.array([[-2000, 0, 100, 200]], np.int16)
    element = dict(PixelPaddingValue=DataElement("PixelPaddingValue", vr, padding))
    assert grey(make(values, **element)) == [[0, 0, 128, 255]]
    # Without padding, the window would show one value of the four.
    content = make(values, WindowCenter=-1000.5, WindowWidth=2, **element)
    assert grey(content) == [[0, 0, 128, 255]] and "none of the picture's values" in notes(content)
    assert grey(make(np.full((1, 2), -2000, np.int16), **element)) == [[0, 0]]  # nothing but padding


def test_numbers_that_are_none_are_black():
    values = np.array([[np.nan, 0, 1, 2, np.inf]], np.float32)
    content = make(values.view(np.uint32), bits=32)
    as_floats = content.replace(b"\xe0\x7f\x10\x00OW\0\0", b"\xe0\x7f\x08\x00OF\0\0")
    assert as_floats != content and grey(as_floats) == [[0, 0, 128, 255, 0]]


# Tables


def test_a_tables_first_value_and_its_ends():
    negative = np.array([[-5, -2, -1, 0, 9]], np.int16)
    content = make(negative, VOILUTSequence=table([10, 20, 30], first=-2))
    assert grey(content) == [[10, 10, 20, 30, 30]]
    stored_unsigned = dicom_grey.look_up(negative, [3, 65534, 8], [10, 20, 30], True)[0]
    assert stored_unsigned.tolist() == [[10, 10, 20, 30, 30]]


def test_a_table_of_all_65536_entries():
    """The standard writes 65,536 as 0."""
    every = np.arange(65536, dtype="<u2")[::-1]
    for data in (every.tolist(), every.tobytes()):
        assert dicom_grey.look_up(np.array([0, 65534]), [0, 0, 16], data, True)[0].tolist() == [65535, 1]


@pytest.mark.parametrize("count, size", [(4, 8), (3, 8), (4, 16), (3, 16)])
@pytest.mark.parametrize("little", [True, False])
def test_entries_in_bytes_of_either_size_and_order(count, size, little):
    entries = np.arange(count) + 1
    if size == 8:
        words = np.pad(entries, (0, count % 2)).astype(np.uint8).view("<u2")  # OW: two entries a word
    else:
        words = entries * 257
    data = words.astype("<u2" if little else ">u2").tobytes()
    found, table = dicom_grey.look_up(np.arange(count), [count, 0, size], data, little)
    assert found.tolist() == table.tolist() == (entries if size == 8 else entries * 257).tolist()


@pytest.mark.parametrize(
    "top, bits, white",
    [(255, 8, 255), (65535, 16, 65535), (60000, 16, 65535), (255, 16, 255), (200, 16, 255), (4095, 16, 4095)]
    + [(4095, 12, 4095), (3000, 12, 4095), (40000, 8, 65535), (0, 16, 255)],
)
def test_what_is_white_is_told_by_the_entries(top, bits, white):
    assert dicom_grey.full_scale(np.array([0, top]), bits) == white


def palette(*colours, bits, syntax, stored=None):
    """Elements of a palette; `stored`: the size of an entry in the file, if not `bits`."""
    made = {}
    for name, values in zip(("Red", "Green", "Blue"), np.array(colours).T):
        made[f"{name}PaletteColorLookupTableDescriptor"] = [len(values), 0, bits]
        if (stored or bits) == 8:
            values = values.astype(np.uint8).view("<u2")
        order = ">u2" if syntax == ExplicitVRBigEndian else "<u2"
        made[f"{name}PaletteColorLookupTableData"] = values.astype(order).tobytes()
    return made


@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize("bits, stored, scale", [(8, 8, 1), (16, 16, 257), (16, 16, 1), (16, 8, 1), (8, 16, 1)])
def test_palettes_are_scaled_by_what_they_hold_in_the_files_byte_order(big, bits, stored, scale):
    """Descriptors promise 16 bits above entries of 8, and the other way round."""
    syntax = ExplicitVRBigEndian if big else "1.2.840.10008.1.2.1"
    colours = np.array([[0, 0, 255], [255, 0, 0], [10, 20, 30], [1, 2, 3]])
    elements = palette(*(colours * scale), bits=bits, stored=stored, syntax=syntax)
    content = make(np.array([[2, 1, 0, 3]], np.uint8), bits=8, kind="PALETTE COLOR", syntax=syntax, **elements)
    assert dicom.to_rgb(content).tolist() == [colours[[2, 1, 0, 3]].tolist()]


def test_a_palette_of_more_than_256_colours():
    ramp = np.repeat(np.arange(300)[:, None] % 256, 3, axis=1)
    elements = palette(*ramp, bits=8, syntax=None)
    content = make(np.array([[0, 255, 299]], np.uint16), kind="PALETTE COLOR", **elements)
    assert grey(content) == [[0, 255, 43]]
