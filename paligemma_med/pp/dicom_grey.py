"""The grey values of a DICOM file → what a screen shows, 0 black to 1 white.

The order is PS3.3's: modality transformation (C.11.1), window or VOI LUT (C.11.2), presentation
(C.11.6). Enhanced files keep the first two in functional groups (C.7.6.16). Scanners and converters leave
elements empty, write windows that show nothing, or forget one of a pair: each such element is passed
over, and a note says so, because a picture that can be shown is worth more than a refusal.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from paligemma_med.pp import windows

Note = Callable[[str], None]


class DicomError(ValueError):
    """A DICOM file that can't be read; one sentence says why."""


def show(ds: Any, values: np.ndarray, note: Note, frame: int = 0, chosen: windows.Window | None = None) -> np.ndarray:
    """0..1 of a frame of a grey image, float64.

    Args:
      ds: the pydicom Dataset.
      values: as stored, of any shape, each that occurs once at least: where is no matter.
      note: called with a sentence for each thing that had to be passed over or assumed.
      frame: whose functional groups count, from 0.
      chosen: a window in place of the file's.

    Raises:
      DicomError: no value is a number.
    """
    x = _modality(ds, values, note, frame)
    inside = np.isfinite(x)
    if not inside.any():
        raise DicomError("a DICOM file with pixel values that are not numbers")
    picture = inside & ~_padding(ds, values)
    if picture.any():
        inside = picture

    y = window(x, chosen.center, chosen.width) if chosen else _voi(ds, x, inside, note, frame)
    if y is None:
        bits = int(ds.get("BitsStored") or 16)
        if bits <= 8 and values.dtype.kind == "u" and np.array_equal(x, values):
            y = x / (2**bits - 1)  # already meant for a screen
        else:
            # From the darkest to the lightest value. Padding isn't part of the picture.
            low, high = float(x[inside].min()), float(x[inside].max())
            y = (x - low) / (high - low) if high > low else np.zeros_like(x)
    y = np.clip(np.nan_to_num(y), 0, 1)  # slopes and windows may be beyond what floats hold
    inverse = str(ds.get("PresentationLUTShape") or "").upper() == "INVERSE"
    # Both say the same; a file with both is inverted once.
    y = 1 - y if inverse or ds.PhotometricInterpretation == "MONOCHROME1" else y
    return np.where(np.isfinite(x), y, 0)  # what isn't a number is no part of the picture


def window(values: np.ndarray, center: float, width: float, kind: str = "LINEAR") -> np.ndarray:
    """The VOI window function of DICOM PS3.3 C.11.2.1.2, to 0..1.

    Args:
      values: numbers of any shape, after the rescale.
      center, width: of the window; the width is above 0.
      kind: "LINEAR" (by the standard, not quite center ± width / 2), "LINEAR_EXACT", "SIGMOID". A LINEAR
        window narrower than 1, which the standard doesn't have but files with small rescale slopes do, is
        taken as LINEAR_EXACT.

    Returns:
      float64 of the same shape, 0 black and 1 white.

    Raises:
      DicomError: a width that is too small, or another kind.
    """
    x = np.asarray(values, np.float64)
    if not (math.isfinite(center) and math.isfinite(width)) or width <= 0:
        raise DicomError(f"window centre {center}, width {width}; expected a width above 0")
    if kind == "LINEAR" and width >= 1:
        if width == 1:
            return (x > center - 0.5).astype(np.float64)
        return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    if kind in ("LINEAR", "LINEAR_EXACT"):
        return np.clip((x - center) / width + 0.5, 0, 1)
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
    raise DicomError(f"VOI LUT function {kind!r}; expected LINEAR, LINEAR_EXACT or SIGMOID")


def is_in_hounsfield_units(ds: Any, frame: int = 0) -> bool:
    """Whether a frame is a CT's, with a rescale that isn't said to be to other units.

    A CT's secondary captures (8 bits, as a screen showed them) have none.
    """
    if str(ds.get("Modality") or "").strip().upper() != "CT":
        return False
    for item in _groups(ds, "PixelValueTransformationSequence", frame):
        if _number(item, "RescaleIntercept") is not None:
            return str(item.get("RescaleType") or "HU").strip().upper() == "HU"
    return False


def look_up(values: np.ndarray, descriptor: Any, data: Any, little: bool) -> tuple[np.ndarray, np.ndarray]:
    """Looks values up in a DICOM table (PS3.3 C.11.1.1, C.11.2.1.1 and C.7.6.3.1.5).

    Args:
      values: any shape; floats are rounded.
      descriptor: number of entries (0: 65536), first value mapped, bits of an entry.
      data: the entries: numbers, or bytes of 8 or 16 bits each, whatever the descriptor says.
      little: whether the file's byte order is little-endian.

    Returns:
      The entries of `values`, and the whole table.

    Raises:
      DicomError: no descriptor or no entries.
    """
    try:
        count, first = int(descriptor[0]) % 2**16 or 2**16, int(descriptor[1])
    except (TypeError, ValueError, IndexError):
        raise DicomError("a lookup table without descriptor") from None
    if isinstance(data, bytes):
        wide = len(data) >= 2 * count
        words = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if little else ">u2")
        table = words if wide else words.astype("<u2").view(np.uint8)  # OW: words, whatever stands in them
    else:
        table = np.atleast_1d(np.asarray([] if data is None else data, np.int64))
        if 2 * table.size == count + count % 2 and int(descriptor[2]) <= 8:
            table = table.astype("<u2").view(np.uint8)
    table = table[:count]
    if not table.size:
        raise DicomError("a lookup table without entries")
    if first >= 2**15 and values.max() < first:
        first -= 2**16  # a negative number that is stored as if it were none
    index = np.clip(np.rint(values).astype(np.int64) - first, 0, table.size - 1)
    return table[index], table


def full_scale(table: np.ndarray, bits: int) -> int:
    """The entry that means white in a table of `bits` per entry.

    Files say 16 bits and hold 8 or 12, or say 8 and hold 16; what the entries hold decides.
    """
    top = int(table.max())
    if top >= 2**bits:
        return 2**16 - 1
    if bits > 8 and top < 2 ** (bits - 4):
        return 255 if top <= 255 else 2 ** top.bit_length() - 1
    return 2**bits - 1


def _modality(ds: Any, values: np.ndarray, note: Note, frame: int) -> np.ndarray:
    """float64: the scanner's units, by table or by slope and intercept."""
    for item in _items(ds, "ModalityLUTSequence"):
        try:
            return _table(item, values, ds)[0].astype(np.float64)
        except DicomError:
            note("its modality LUT is empty and was passed over")
    x = values.astype(np.float64)
    for item in _groups(ds, "PixelValueTransformationSequence", frame):
        slope, intercept = _number(item, "RescaleSlope"), _number(item, "RescaleIntercept")
        if slope == 0 or (slope is not None and not math.isfinite(slope)):
            note("its rescale slope is 0 or no number and was taken as 1")
            slope = 1
        if intercept is not None and not math.isfinite(intercept):
            note("its rescale intercept is no number and was taken as 0")
            intercept = 0
        if slope is not None or intercept is not None:
            return x * (1 if slope is None else slope) + (0 if intercept is None else intercept)
    return x


def _voi(ds: Any, x: np.ndarray, inside: np.ndarray, note: Note, frame: int) -> np.ndarray | None:
    """The first window that shows anything `inside`, else the first such VOI LUT, else None."""
    flat = x[inside].min() == x[inside].max()

    def shows(y: np.ndarray) -> bool:  # neither all black nor all white
        return flat or not (y[inside].max() < 0.5 / 255 or y[inside].min() >= 1 - 0.5 / 255)

    for center, width, kind in _windows(ds, frame):
        try:
            y = window(x, center, width, kind)
        except DicomError:
            note("a window that no screen can show (its width or function) was passed over")
            continue
        if shows(y):
            return y
        note("a window that shows none of the picture's values was passed over")
    for groups in _groups(ds, "FrameVOILUTSequence", frame):
        for item in _items(groups, "VOILUTSequence"):
            try:
                found, table = _table(item, x, ds)
            except DicomError:
                note("an empty VOI LUT was passed over")
                continue
            y = found / full_scale(table, int(item.LUTDescriptor[2]))
            if shows(y):
                return y
            note("a VOI LUT that shows none of the picture's values was passed over")
    return None


def _windows(ds: Any, frame: int) -> Iterator[tuple[float, float, str]]:
    """(centre, width, function) of every window: the frame's, those for all frames, the file's."""
    for item in _groups(ds, "FrameVOILUTSequence", frame):
        kind = str(item.get("VOILUTFunction") or "LINEAR").upper()
        for center, width in zip(_numbers(item, "WindowCenter"), _numbers(item, "WindowWidth")):
            yield center, width, kind


def _padding(ds: Any, values: np.ndarray) -> np.ndarray:
    """bool: where the picture is filled up (C.7.5.1.1.2)."""
    ends = [_integer(ds, "PixelPaddingValue"), _integer(ds, "PixelPaddingRangeLimit")]
    if ends[0] is None or values.dtype.kind not in "iu":
        return np.zeros(values.shape, bool)
    # Files with signed pixels hold unsigned padding and the other way round; the bits are the same.
    wrapped = sorted(np.int64(end).astype(values.dtype) for end in ends if end is not None)
    return (values >= wrapped[0]) & (values <= wrapped[-1])


def _table(item: Any, values: np.ndarray, ds: Any) -> tuple[np.ndarray, np.ndarray]:
    little = ds.file_meta.TransferSyntaxUID.is_little_endian
    return look_up(values, item.get("LUTDescriptor"), item.get("LUTData"), little)


def _groups(ds: Any, name: str, frame: int) -> Iterator[Any]:
    """Where an element of the functional group `name` can stand: the frame, all frames, the file itself."""
    own = _items(ds, "PerFrameFunctionalGroupsSequence")[frame : frame + 1]
    for groups in own + _items(ds, "SharedFunctionalGroupsSequence")[:1]:
        yield from _items(groups, name)
    yield ds


def _items(ds: Any, name: str) -> list:
    return [item for item in ds.get(name) or () if hasattr(item, "get")]


def _numbers(ds: Any, name: str) -> list[float]:
    """An element's values; NaN for one that is empty or no number, so that the others keep their places."""
    try:
        value = ds.get(name)
    except Exception:  # pydicom parses elements when they are asked for, and raises what it likes
        return []
    out = []
    for one in () if value is None else value if hasattr(value, "__iter__") and not isinstance(value, str) else [value]:
        try:
            out.append(float(one))
        except (TypeError, ValueError):
            out.append(math.nan)
    return out


def _number(ds: Any, name: str) -> float | None:
    return next(iter(_numbers(ds, name)), None)


def _integer(ds: Any, name: str) -> int | None:
    number = _number(ds, name)
    return int(number) if number is not None and number.is_integer() else None
