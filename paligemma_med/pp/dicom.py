"""DICOM → 8-bit RGB as a viewer first shows it: rescale, window, inversion, palette, first frame.

Scanner files hold what the detector measured, in 10 to 16 bits and sometimes with white as zero;
models want what a radiologist sees. Read with pydicom (extra `dicom`); compressed files need a
decoder that pydicom finds, such as pylibjpeg. Only pixels are kept, so patients' names and dates are
gone, except for what is burned into the pixels.
"""

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image

from paligemma_med.pp import dicom_grey, dicom_stream, files
from paligemma_med.pp.dicom_grey import DicomError, Note, window

__all__ = ["DicomError", "decode", "is_dicom", "to_rgb", "window"]

# Files without the 128-byte preamble begin with an element of group 0002 or 0008: its tag, then a value
# representation (two capital letters) or, in implicit files, a length below 65,536.
_HEAD = re.compile(rb"[\x02\x08]\0.\0(?:[A-Z]{2}|..\0\0)|\0[\x02\x08]\0.[A-Z]{2}", re.DOTALL)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")


def is_dicom(content: bytes) -> bool:
    """True for DICOM files, also for those without a preamble."""
    return content[128:132] == b"DICM" or _HEAD.match(content) is not None


def decode(content: bytes) -> tuple[np.ndarray, tuple[str, ...]]:
    """(uint8[H, W, 3], notes) of a DICOM file's bytes.

    Grey images: modality LUT or rescale slope and intercept; the first window of several (centre
    and width by the standard's function) that shows anything, else the first such VOI LUT, else 8-bit
    values as they are, else from the smallest to the largest value, padding left out; MONOCHROME1 (or
    presentation shape INVERSE) is inverted. Rescale and window of Enhanced files stand in functional
    groups: the first frame's come before those of all frames. Palettes are looked up and scaled by what
    their entries hold, YBR becomes RGB, colours of more than 8 bits are scaled from their full range. Of
    several frames the first is taken. Overlays and supplemental palettes are not drawn, and pixels that
    aren't square stay as they are.

    The notes are sentences on what was passed over or assumed, the same words in each file.

    Raises:
      DicomError: pydicom isn't installed; not DICOM, without pixels, cut off, or compressed in a way
        that no installed decoder reads. Callers put the file's name before the message.
    """
    try:
        import pydicom
    except ImportError:
        raise DicomError("a DICOM file, and pydicom is not installed; pip install 'paligemma_med[dicom]'") from None
    notes: dict[str, None] = {}
    try:
        with warnings.catch_warnings(), _quiet(logging.getLogger("pydicom")):
            warnings.simplefilter("ignore")  # about values that no pixel depends on
            ds = _open(pydicom, content)
            note = lambda text: notes.setdefault(text)  # noqa: E731
            x = _show(ds, _pixels(ds, note), note)
    except DicomError:
        raise
    except Exception as e:  # pydicom raises nearly anything, depending on where a file is damaged
        raise DicomError(f"a DICOM file that can't be decoded ({len(content)} bytes; {files.reason(e)})") from None
    return np.repeat(x[:, :, None], 3, axis=2) if x.ndim == 2 else np.ascontiguousarray(x), tuple(notes)


def to_rgb(content: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a DICOM file's bytes: `decode` without the notes."""
    return decode(content)[0]


def _open(pydicom: Any, content: bytes) -> Any:
    if _DEFLATED in content:
        # pydicom would inflate all of it before its size can be checked.
        raise DicomError("a deflated DICOM file; expected another transfer syntax")
    ds = pydicom.dcmread(io.BytesIO(content), force=True)
    if not any(k in ds for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DicomError(f"a DICOM file without pixels (kind: {_kind(ds)}); expected an image")
    if not getattr(ds, "file_meta", None):
        ds.file_meta = pydicom.dataset.FileMetaDataset()
    if not ds.file_meta.get("TransferSyntaxUID"):
        implicit, little = ds.original_encoding
        uids = pydicom.uid
        big = uids.ExplicitVRBigEndian
        plain = uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = plain if little else big
    if missing := [k for k in ("Rows", "Columns", "PhotometricInterpretation") if ds.get(k) is None]:
        raise DicomError(f"a DICOM file without {', '.join(missing)}; expected an image")
    rows, columns = int(ds.Rows), int(ds.Columns)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit and rows * columns > limit:
        raise DicomError(f"{columns} x {rows} pixels; expected at most {limit}")
    return ds


def _kind(ds: Any) -> str:
    """What a file without pixels is: a structured report, a plan, a directory, …"""
    for uid in (ds.get("SOPClassUID"), getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID")):
        if uid:
            return _code(getattr(uid, "name", ""))
    return _code(ds.get("Modality"))


def _code(value: Any) -> str:
    """A name or code of the standard as it is. A damaged file's could be anything, patients' names included."""
    return str(value) if re.fullmatch(r"[\w .,:()\[\]/-]{1,120}", str(value or ""), re.ASCII) else "unknown"


def _pixels(ds: Any, note: Note) -> np.ndarray:
    """The first frame, as stored or, for YBR, as RGB: [H, W] or [H, W, 3]."""
    from pydicom.pixels import get_decoder, pixel_array
    from pydicom.uid import JPEGBaseline8Bit, JPEGExtended12Bit

    try:
        int(ds.get("NumberOfFrames") or 1)
    except (TypeError, ValueError):
        note("its number of frames is no number; its first frame was read")
        ds.NumberOfFrames = 1
    syntax = ds.file_meta.TransferSyntaxUID
    decoder = None
    if syntax.is_encapsulated:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            raise DicomError(f"a DICOM file compressed as {_code(syntax.name)}, which pydicom doesn't read") from None
        if not decoder.is_available:
            raise DicomError(
                f"a DICOM file compressed as {syntax.name}, for which no decoder is installed; "
                f"pip install {_package(syntax)}"
            )
        _trust_stream(ds, note)
    # Decoders of lossy JPEG differ by a few levels; PIL's is everywhere, so that a picture is the same everywhere.
    plugin = "pillow" if syntax in (JPEGBaseline8Bit, JPEGExtended12Bit) and ds.get("BitsStored") == 8 else ""
    try:
        values = pixel_array(ds, index=0, decoding_plugin=plugin) if decoder else _uncompressed(ds, note)
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


def _uncompressed(ds: Any, note: Note) -> np.ndarray:
    """The first frame; where older files put values in the upper bits (PS3.5 8.1.1), they are moved down."""
    from pydicom.pixels import pixel_array

    stored, high = ds.get("BitsStored"), ds.get("HighBit")
    if isinstance(stored, int) and isinstance(high, int) and stored <= high < ds.BitsAllocated:
        ds.BitsStored = high + 1  # or pydicom, which asks for no HighBit, would cut off the upper ones
        values = pixel_array(ds, index=0)
        ds.BitsStored, shift = stored, high + 1 - stored
        if not (values & ((1 << shift) - 1)).any():
            note("its values stand in the upper bits, and were moved down")
            return values >> shift
        # Values in the lower bits: the header is wrong.
    return pixel_array(ds, index=0)


def _trust_stream(ds: Any, note: Note) -> None:
    """Corrects the data set where its compressed frame says of itself that it is something else.

    Raises:
      DicomError: the frame isn't as large as the header says.
    """
    from pydicom import uid
    from pydicom.encaps import get_frame
    from pydicom.pixels.utils import get_j2k_parameters

    frame = get_frame(ds.PixelData, 0, number_of_frames=int(ds.get("NumberOfFrames") or 1))
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


def _show(ds: Any, values: np.ndarray, note: Note) -> np.ndarray:
    """uint8[H, W] or [H, W, 3]."""
    kind = str(ds.PhotometricInterpretation)
    if kind == "PALETTE COLOR" and values.ndim == 2:
        return _eight_bits(_palette(ds, values))
    if values.ndim == 2:
        return _grey(ds, values, note)
    if values.ndim != 3 or values.shape[2] != 3 or kind not in _COLOURS:
        raise DicomError(f"colours of kind {_code(kind)}, shape {values.shape}; expected one of {', '.join(_COLOURS)}")
    return _eight_bits(values / (2 ** int(ds.BitsStored) - 1))


def _grey(ds: Any, values: np.ndarray, note: Note) -> np.ndarray:
    """uint8[H, W]. Each value is worked out once, since a film has far more pixels than values."""
    low = values.min()
    if values.dtype.kind not in "iu" or int(values.max()) - int(low) >= 2**16:
        return _eight_bits(dicom_grey.show(ds, values, note))
    index = values.astype(np.int64) - low
    is_there = np.zeros(2**16, bool)
    is_there[index] = True
    there = np.flatnonzero(is_there)
    levels = np.zeros(2**16, np.uint8)
    levels[there] = _eight_bits(dicom_grey.show(ds, (there + low).astype(values.dtype), note))
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
    plugin = "pylibjpeg-openjpeg" if "2000" in syntax.name else "pylibjpeg-libjpeg"
    return f"pylibjpeg {plugin} (or python-gdcm)"


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silences pydicom, which logs the traceback of each decoder that fails before it raises a summary."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
