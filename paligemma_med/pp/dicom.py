"""DICOM files as the pixels that a viewer first shows, for `explain`.

Data sets are built by `data_prep.images.dicom`, which the library doesn't import; this is the short form
for one file, on pydicom's own functions (extra `dicom`). Tests hold the two against each other.
Nothing but pixels leaves the file: no name, no date. What is burned into them stays.
"""

import contextlib
import io
import logging
import warnings

import numpy as np
import PIL.Image


def is_dicom(content):
    """True for bytes of a DICOM file with its usual preamble."""
    return content[128:132] == b"DICM"


def to_rgb(content):
    """uint8[H, W, 3] of the first frame: modality rescale, first window (else from the smallest to
    the largest value, 8-bit images as they are), white where MONOCHROME1 says black.

    Raises:
      ValueError: pydicom isn't installed, or the file can't be read.
    """
    try:
        import pydicom
        from pydicom import pixels
    except ImportError:
        raise ValueError("a DICOM file, and pydicom is not installed: pip install 'paligemma_med[dicom]'.") from None
    try:
        with warnings.catch_warnings(), _quiet(logging.getLogger("pydicom")):
            warnings.simplefilter("ignore")  # remarks on values that no pixel depends on
            if b"1.2.840.10008.1.2.1.99" in content[:4096]:
                raise ValueError("deflated; expected another transfer syntax")
            data = pydicom.dcmread(io.BytesIO(content))
            limit = PIL.Image.MAX_IMAGE_PIXELS
            if limit and int(data.Rows) * int(data.Columns) > limit:
                raise ValueError(f"{data.Columns} x {data.Rows} pixels; expected at most {limit}")
            values, kind = pixels.pixel_array(data, index=0), data.PhotometricInterpretation
            if kind == "PALETTE COLOR":
                values = pixels.apply_color_lut(values, data)
                x = values / np.iinfo(values.dtype).max
            elif values.ndim == 2:
                x = np.repeat(_grey(data, pixels, values)[..., None], 3, axis=2)
            else:
                x = values / (2 ** int(data.BitsStored) - 1)
    except Exception as e:  # pydicom raises nearly every kind, depending on where a file is damaged
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ValueError(f"a DICOM file that can't be read: {reason:.200}.") from None
    return np.floor(np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


@contextlib.contextmanager
def _quiet(logger):
    """pydicom logs the traceback of each decoder that fails, and then raises what sums them up."""
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def _grey(data, pixels, values):
    """0…1 of a grey image."""
    import pydicom

    x = np.asarray(pixels.apply_modality_lut(values, data), np.float64)
    bits = int(data.get("BitsStored") or 16)
    if data.get("WindowCenter") is not None and data.get("WindowWidth") is not None:
        # pydicom maps onto the range of stored values, which is 0…1 for unsigned ones of one bit.
        window = pydicom.Dataset()
        window.BitsStored, window.PixelRepresentation = 1, 0
        for name in ("WindowCenter", "WindowWidth", "VOILUTFunction", "PhotometricInterpretation"):
            if data.get(name) is not None:
                setattr(window, name, data.get(name))
        x = pixels.apply_windowing(x, window, index=0)
    elif data.get("VOILUTSequence"):
        depth = int(data.VOILUTSequence[0].LUTDescriptor[2])
        x = pixels.apply_voi(x.astype(np.int64), data, index=0) / (2**depth - 1)
    elif bits <= 8 and not int(data.get("PixelRepresentation") or 0) and np.array_equal(x, values):
        x = x / (2**bits - 1)
    else:
        low, high = x.min(), x.max()
        x = (x - low) / (high - low) if high > low else np.zeros_like(x)
    inverse = str(data.get("PresentationLUTShape") or "").upper() == "INVERSE"
    return 1 - x if inverse or data.PhotometricInterpretation == "MONOCHROME1" else x
