"""DICOM → 8-bit RGB as a viewer first shows it: rescale, window, inversion, palette, first frame.

Scanner files hold what the detector measured, in 10 to 16 bits and sometimes with white as zero;
models want what a radiologist sees. Read with pydicom and, where compressed, with GDCM or another decoder that
pydicom finds (extra `dicom`). Only pixels are kept, so patients' names and dates are gone, except for what is burned
into the pixels.
"""

from typing import Any

import numpy as np

from paligemma_med.pp import dicom_grey, dicom_open, dicom_stream, files, windows
from paligemma_med.pp.dicom_grey import DicomError, Note, window
from paligemma_med.pp.dicom_open import code, is_dicom

__all__ = ["DicomError", "decode", "is_dicom", "to_rgb", "window"]

_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def decode(
    content: bytes, *, frame: int = 0, window: windows.Window | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(uint8[H, W, 3], notes) of a DICOM file's bytes.

    Grey images: modality LUT or rescale slope and intercept; the first window of several (centre
    and width by the standard's function) that shows anything, else the first such VOI LUT, else 8-bit
    values as they are, else from the smallest to the largest value, padding left out; MONOCHROME1 (or
    presentation shape INVERSE) is inverted. Rescale and window of Enhanced files stand in functional
    groups: the frame's come before those of all frames. Palettes are looked up and scaled by what their
    entries hold, YBR becomes RGB, colours of more than 8 bits are scaled from their full range. Overlays
    and supplemental palettes are not drawn, and pixels that aren't square stay as they are.

    Args:
      frame: of several, from 0.
      window: in place of the file's own, and even if it shows nothing. A file that has no such units (colours, a
        window in Hounsfield units for what isn't a CT) keeps its own, and a note says so.

    The notes are sentences on what was passed over or assumed, the same words in each file.

    Raises:
      DicomError: pydicom isn't installed; not DICOM, without pixels or that frame, cut off, or compressed in a
        way that no installed decoder reads. Callers put the file's name before the message.
    """
    pydicom = dicom_open.need_pydicom()
    notes: dict[str, None] = {}
    try:
        with dicom_open.quiet():
            ds = dicom_open.dataset(pydicom, content)
            note = lambda text: notes.setdefault(text)  # noqa: E731
            x = _show(ds, _pixels(ds, frame, note), note, frame, window)
    except DicomError:
        raise
    except Exception as e:  # pydicom raises nearly anything, depending on where a file is damaged
        raise DicomError(f"a DICOM file that can't be decoded ({len(content)} bytes; {files.reason(e)})") from None
    return grey_to_rgb(x) if x.ndim == 2 else np.ascontiguousarray(x), tuple(notes)


def to_rgb(content: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a DICOM file's bytes: `decode` without the notes."""
    return decode(content)[0]


def grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """[H, W, 3] of [H, W], channel by channel: np.repeat goes pixel by pixel, which takes twice as long."""
    out = np.empty((*grey.shape, 3), grey.dtype)
    for channel in range(3):
        out[..., channel] = grey
    return out


def _pixels(ds: Any, frame: int, note: Note) -> np.ndarray:
    """A frame, as stored or, for YBR, as RGB: [H, W] or [H, W, 3]."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

    try:
        count = int(ds.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        note("its number of frames is no number; its first frame was read")
        ds.NumberOfFrames = count = 1
    if frame and not 0 <= frame < count:
        raise DicomError(f"no frame {frame + 1}; the DICOM file has {count}")
    syntax = ds.file_meta.TransferSyntaxUID
    decoder = None
    if syntax.is_encapsulated:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise DicomError(f"a DICOM file compressed as {code(syntax.name)}, which pydicom doesn't read") from None
        if not decoder.is_available:
            raise DicomError(
                f"a DICOM file compressed as {syntax.name}, for which no decoder is installed; "
                f"pip install {_package(syntax)}"
            )
        _trust_stream(ds, frame, note)
    # Decoders of lossy JPEG differ by a few levels; PIL's is everywhere, so that a picture is the same everywhere.
    plugin = "pillow" if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) and ds.get("BitsStored") == 8 else ""
    try:
        values = pixel_array(ds, index=frame, decoding_plugin=plugin) if decoder else _uncompressed(ds, frame, note)
    except Exception as e:
        if decoder is None or not decoder.missing_dependencies:
            raise
        raise DicomError(
            f"a DICOM file compressed as {syntax.name} that no installed decoder reads; it is damaged, or "
            f"needs pip install {_package(syntax)} ({files.reason(e)})"
        ) from None
    if values.size == 0:
        raise DicomError(f"an empty image, {values.shape}; expected pixels")
    return values


def _uncompressed(ds: Any, frame: int, note: Note) -> np.ndarray:
    """A frame; where older files put values in the upper bits (PS3.5 8.1.1), they are moved down."""
    from pydicom.pixels import pixel_array

    stored, high = ds.get("BitsStored"), ds.get("HighBit")
    if isinstance(stored, int) and isinstance(high, int) and stored <= high < ds.BitsAllocated:
        ds.BitsStored = high + 1  # or pydicom, which asks for no HighBit, would cut off the upper ones
        values = pixel_array(ds, index=frame)
        ds.BitsStored, shift = stored, high + 1 - stored
        if not (values & ((1 << shift) - 1)).any():
            note("its values stand in the upper bits, and were moved down")
            return values >> shift
        # Values in the lower bits: the header is wrong.
    return pixel_array(ds, index=frame)


def _trust_stream(ds: Any, index: int, note: Note) -> None:
    """Corrects the data set where its compressed frame says of itself that it is something else.

    Raises:
      DicomError: the frame isn't as large as the header says.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import get_j2k_parameters

    frame = get_frame(ds.PixelData, index, number_of_frames=int(ds.get("NumberOfFrames") or 1))
    stream = dicom_stream.read(frame)
    if stream.size and stream.size != (ds.Rows, ds.Columns):
        found, expected = ("{1} x {0}".format(*size) for size in (stream.size, (ds.Rows, ds.Columns)))
        raise DicomError(f"a DICOM file whose compressed frame has {found} pixels; its header says {expected}")
    syntax, label = ds.file_meta.TransferSyntaxUID, str(ds.PhotometricInterpretation)
    if syntax in uid.JPEG2000TransferSyntaxes:
        if get_j2k_parameters(frame).get("is_signed") and not ds.get("PixelRepresentation"):
            note("its compressed values have a sign, though its header says no; read with sign")
            ds.PixelRepresentation = 1
    elif syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit) and ds.get("SamplesPerPixel") == 3:
        if stream.colours == "YBR" and label == "RGB":
            note("its colours are labelled RGB, but compressed as YCbCr; read as YCbCr")
            ds.PhotometricInterpretation = "YBR_FULL"
        elif stream.colours == "RGB" and label.startswith("YBR"):
            note("its colours are labelled YCbCr, but compressed as RGB; read as RGB")
            ds.PhotometricInterpretation = "RGB"


def _show(ds: Any, values: np.ndarray, note: Note, frame: int, window: windows.Window | None) -> np.ndarray:
    """uint8[H, W] or [H, W, 3]."""
    kind = str(ds.PhotometricInterpretation)
    if window and (kind == "PALETTE COLOR" or values.ndim != 2):
        note(windows.NO_GREY)
    elif window and window.name and not dicom_grey.is_in_hounsfield_units(ds, frame):
        note(windows.NO_CT)
        window = None
    if kind == "PALETTE COLOR" and values.ndim == 2:
        return _eight_bits(_palette(ds, values))
    if values.ndim == 2:
        return _grey(ds, values, note, frame, window)
    if values.ndim != 3 or values.shape[2] != 3 or kind not in _COLOURS:
        raise DicomError(f"colours of kind {code(kind)}, shape {values.shape}; expected one of {', '.join(_COLOURS)}")
    return _eight_bits(values / (2 ** int(ds.BitsStored) - 1))


def _grey(ds: Any, values: np.ndarray, note: Note, frame: int, window: windows.Window | None) -> np.ndarray:
    """uint8[H, W]. Each value is worked out once, since a film has far more pixels than values."""
    low = values.min()
    if values.dtype.kind not in "iu" or int(values.max()) - int(low) >= 2**16:
        return _eight_bits(dicom_grey.show(ds, values, note, frame, window))
    index = values.astype(np.int64) - low
    is_there = np.zeros(2**16, bool)
    is_there[index] = True
    there = np.flatnonzero(is_there)
    levels = np.zeros(2**16, np.uint8)
    levels[there] = _eight_bits(dicom_grey.show(ds, (there + low).astype(values.dtype), note, frame, window))
    return levels[index]


def _eight_bits(x: np.ndarray) -> np.ndarray:
    return np.floor(np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def _palette(ds: Any, values: np.ndarray) -> np.ndarray:
    """Colours of a palette (PS3.3 C.7.6.3.1.5, C.7.9), float64[H, W, 3]."""
    names = [f"{colour}PaletteColorLookupTable" for colour in ("Red", "Green", "Blue")]
    bits = int(ds[names[0] + "Descriptor"].value[2])
    if f"{names[0]}Data" in ds:
        little = ds.file_meta.TransferSyntaxUID.is_little_endian
        found = [dicom_grey.look_up(values, ds.get(n + "Descriptor"), ds.get(n + "Data"), little) for n in names]
        colours, tables = zip(*found)
        rgb = np.stack(colours, axis=-1)
    else:
        from pydicom.pixels import apply_color_lut

        rgb = apply_color_lut(values, ds)[..., :3]  # unfolds segments, heeding the byte order
        tables = [rgb]
    return rgb / dicom_grey.full_scale(np.concatenate([t.ravel() for t in tables]), bits)


def _package(syntax: Any) -> str:
    """What pip has to install for a compression. GDCM, of the extra, reads all but two families."""
    if "High-Throughput" in syntax.name:
        return "pylibjpeg pylibjpeg-openjpeg"
    return "pylibjpeg pylibjpeg-libjpeg" if "Extended" in syntax.name else "python-gdcm"
