"""Encoded image bytes of any kind → the bytes to store, and the pixels they stand for.

Data sets store the released bytes if every reader shows them alike. The rest (16 bits, CMYK,
transparency, palettes, DICOM, formats that not all readers know) is converted to 8-bit PNG here, once and
by known rules, because readers differ on them: some drop alpha, some let 16 bits overflow.
"""

import io

import numpy as np
import PIL.Image

from data_prep.files import DataError
from paligemma_med.pp import images


def to_rgb(content: bytes, name: str = "image") -> np.ndarray:
    """uint8[H, W, 3] of encoded bytes.

    Follows `paligemma_med.pp.images.to_rgb`, so that a stored image and the same file given to `predict`
    are the same picture.

    Args:
      content: a file's bytes.
      name: the file's name, for errors.

    Raises:
      DataError: not an image, damaged, cut off, too large, a git-LFS pointer, or values of unknown
        range (floats, negative or above 65535).
    """
    return _decode(content, name).rgb


def convert(content: bytes, name: str = "image") -> bytes:
    """The bytes to store: `content` itself if every reader shows it correctly, else an 8-bit PNG of it.

    Kept: JPEG of mode grey or RGB; PNG of at most 8 bits, grey or RGB, also with an alpha channel
    that is opaque everywhere; one frame each. The PNG is grey if all three channels are equal.

    Arguments and errors as in `to_rgb`; the image is decoded in any case.
    """
    rgb, plain = _decode(content, name)
    if plain:
        return content
    grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
    out = io.BytesIO()
    PIL.Image.fromarray(rgb[..., 0] if grey else rgb).save(out, "PNG")
    return out.getvalue()


def convert_checked(content: bytes, name: str = "image") -> bytes:
    """Like `convert`, for an image that was decoded before and is whole.

    Nearly all are plain JPEG or PNG, which the header shows without decoding them again.
    """
    try:
        with images.open_image(content, formats=("JPEG", "PNG")) as image:
            plain = image.mode in ("L", "RGB") and "transparency" not in image.info
            # Byte 24 holds the bits per channel; PIL reads 16-bit colour as 8 bits.
            if image.format == "PNG":
                plain = plain and content[24] == 8 and getattr(image, "n_frames", 1) == 1
            elif image.format != "JPEG":
                plain = False
    except Exception:  # `convert` reports what is wrong
        plain = False
    return content if plain else convert(content, name)


def _decode(content: bytes, name: str) -> images.Decoded:
    try:
        return images.decode(content, verify=True)
    except ValueError as e:
        raise DataError(f"{name}: {e}") from None
