"""DICOM → 8-bit RGB as a viewer first shows it: rescale, window, inversion, palette, first frame.

Scanner files hold what the detector measured, in 10 to 16 bits and sometimes with white as zero;
models want what a radiologist sees. Read with pydicom (extra `dicom`); compressed files need a
decoder that pydicom finds, such as pylibjpeg. Only pixels are kept, so patients' names and dates are
gone, except for what is burned into the pixels.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image


class DicomError(ValueError):
    """A DICOM file that can't be read; one sentence says why."""


# The first bytes of files without the 128-byte preamble: group 0002 or 0008, either byte order.
_HEADS = (b"\x02\x00", b"\x08\x00", b"\x00\x08\x00")
_DEFLATED = b"1.2.840.10008.1.2.1.99"


def is_dicom(content: bytes) -> bool:
    """True for DICOM files, also for those without a preamble."""
    return content[128:132] == b"DICM" or content.startswith(_HEADS)


def window(values: np.ndarray, center: float, width: float, kind: str = "LINEAR") -> np.ndarray:
    """The VOI window function of DICOM PS3.3 C.11.2.1.2, to 0..1.

    Args:
      values: numbers of any shape, after the rescale.
      center, width: of the window; the width is at least 1 for "LINEAR", above 0 for the others.
      kind: "LINEAR" (by the standard, not quite center ± width / 2), "LINEAR_EXACT", "SIGMOID".

    Returns:
      float64 of the same shape, 0 black and 1 white.

    Raises:
      DicomError: a width that is too small, or another kind.
    """
    x = np.asarray(values, np.float64)
    if not (np.isfinite(center) and np.isfinite(width)) or width <= 0:
        raise DicomError(f"window centre {center}, width {width}; expected a width above 0")
    if kind == "LINEAR":
        if width < 1:
            raise DicomError(f"window width {width}; expected at least 1 for a LINEAR window")
        if width == 1:
            return (x > center - 0.5).astype(np.float64)
        return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1)
    if kind == "LINEAR_EXACT":
        return np.clip((x - center) / width + 0.5, 0, 1)
    if kind == "SIGMOID":
        return 1 / (1 + np.exp(np.clip(-4 * (x - center) / width, -700, 700)))
    raise DicomError(f"VOI LUT function {kind!r}; expected LINEAR, LINEAR_EXACT or SIGMOID")


def _first(value: Any) -> Any:
    """The first of a multi-valued element, or the value itself; None if there's none."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    try:
        values = list(value)
    except TypeError:
        return value
    return values[0] if values else None


def _open(content: bytes) -> Any:
    import pydicom

    if _DEFLATED in content[:4096]:
        # pydicom would inflate all of it before its size can be checked.
        raise DicomError("a deflated DICOM file; expected another transfer syntax")
    ds = pydicom.dcmread(io.BytesIO(content), force=True)
    if not any(k in ds for k in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        what = ds.get("Modality") or "of unknown modality"
        raise DicomError(f"a DICOM file without pixels ({what}); expected an image")
    if not getattr(ds, "file_meta", None):
        ds.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in ds.file_meta:
        implicit, little = ds.original_encoding
        uids = pydicom.uid
        big = uids.ExplicitVRBigEndian
        plain = uids.ImplicitVRLittleEndian if implicit else uids.ExplicitVRLittleEndian
        ds.file_meta.TransferSyntaxUID = plain if little else big
    rows, columns = int(ds.Rows), int(ds.Columns)
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if limit and rows * columns > limit:
        raise DicomError(f"{columns} x {rows} pixels; expected at most {limit}")
    return ds


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Silences pydicom, which logs the traceback of each decoder that fails before it raises a summary."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _grey(ds: Any, values: np.ndarray) -> np.ndarray:
    """0..1 of a grey image: modality rescale, then the first window, then the inversion."""
    from pydicom.pixels import apply_modality_lut, apply_voi

    if "ModalityLUTSequence" in ds:
        x = np.asarray(apply_modality_lut(values, ds), np.float64)
    else:
        slope, intercept = ds.get("RescaleSlope"), ds.get("RescaleIntercept")
        x = values.astype(np.float64)
        x = x * float(1 if slope is None else slope) + float(0 if intercept is None else intercept)
    center, width = _first(ds.get("WindowCenter")), _first(ds.get("WindowWidth"))
    bits = int(ds.get("BitsStored") or 16)
    if center is not None and width is not None:
        kind = str(ds.get("VOILUTFunction") or "LINEAR").upper()
        x = window(x, float(center), float(width), kind)
    elif ds.get("VOILUTSequence"):
        depth = int(ds.VOILUTSequence[0].LUTDescriptor[2])
        x = np.asarray(apply_voi(x.astype(np.int64), ds), np.float64) / (2**depth - 1)
    elif bits <= 8 and not int(ds.get("PixelRepresentation") or 0) and np.array_equal(x, values):
        x = x / (2**bits - 1)  # already meant for a screen
    else:
        # Without a window: from the darkest to the lightest value. Padding isn't part of the picture.
        inside, padding = np.ones(values.shape, bool), ds.get("PixelPaddingValue")
        if isinstance(padding, int):
            last = ds.get("PixelPaddingRangeLimit")
            ends = sorted((padding, last if isinstance(last, int) else padding))
            inside = (values < ends[0]) | (values > ends[1])
        seen = x[inside] if inside.any() else x
        low, high = float(seen.min()), float(seen.max())
        x = np.clip((x - low) / (high - low), 0, 1) if high > low else np.zeros_like(x)
    inverse = str(ds.get("PresentationLUTShape") or "").upper() == "INVERSE"
    # Both say the same; a file with both is inverted once.
    return 1 - x if inverse or ds.PhotometricInterpretation == "MONOCHROME1" else x


def to_rgb(content: bytes) -> np.ndarray:
    """uint8[H, W, 3] of a DICOM file's bytes.

    Grey images: modality LUT or rescale slope and intercept; the first window of several (centre
    and width by the standard's function), else the first VOI LUT, else 8-bit values as they are,
    else from the smallest to the largest value; MONOCHROME1 (or presentation shape INVERSE) is
    inverted. Palettes are looked up, YBR becomes RGB, colours of more than 8 bits are scaled from
    their full range. Of several frames the first is taken. Overlays are not drawn, and pixels that
    aren't square stay as they are.

    Raises:
      DicomError: pydicom isn't installed; not DICOM, without pixels, cut off, or compressed in a way
        that no installed decoder reads. Callers put the file's name before the message.
    """
    try:
        from pydicom.pixels import apply_color_lut, pixel_array
    except ImportError:
        raise DicomError("a DICOM file, and pydicom is not installed; pip install 'paligemma_med[dicom]'") from None
    try:
        with warnings.catch_warnings(), _quiet(logging.getLogger("pydicom")):
            warnings.simplefilter("ignore")  # about values that no pixel depends on
            ds = _open(content)
            values = pixel_array(ds, index=0)
            kind = ds.PhotometricInterpretation
            if values.size == 0:
                raise DicomError(f"an empty image, {values.shape}; expected pixels")
            if kind == "PALETTE COLOR":
                # The descriptor says whether entries have 8 or 16 bits; pydicom returns that type.
                values = apply_color_lut(values, ds)
                x = values / np.iinfo(values.dtype).max
            elif values.ndim == 2:
                x = _grey(ds, values)
            else:
                x = values / (2 ** int(ds.BitsStored) - 1)
    except DicomError:
        raise
    except Exception as e:  # pydicom raises nearly anything, depending on where a file is damaged
        reason = " ".join(str(e).split()) or type(e).__name__
        raise DicomError(f"a DICOM file that can't be decoded ({len(content)} bytes; {reason:.200})") from None
    if not np.isfinite(x).all():
        raise DicomError("a DICOM file with pixel values that are not numbers")
    x = np.floor(np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)
    return np.repeat(x[:, :, None], 3, axis=2) if x.ndim == 2 else x
