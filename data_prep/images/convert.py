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
    that is opaque everywhere; one frame each, upright without EXIF's help. The PNG is grey if all three
    channels are equal.

    Arguments and errors as in `to_rgb`; the image is decoded in any case.
    """
    return convert_noted(content, name)[0]


def convert_noted(content: bytes, name: str = "image") -> tuple[bytes, tuple[str, ...]]:
    """Like `convert`, and what the reader assumed: sentences that are the same for each file."""
    rgb, plain, notes = _decode(content, name)
    if plain:
        return content, notes
    grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
    out = io.BytesIO()
    PIL.Image.fromarray(rgb[..., 0] if grey else rgb).save(out, "PNG")
    return out.getvalue(), notes


def convert_checked(content: bytes, name: str = "image") -> bytes:
    """Like `convert`, for an image that was decoded before and is whole.

    Nearly all are plain JPEG or PNG, which the header shows without decoding them again.
    """
    return content if images.plain_by_header(content) else convert(content, name)


def _decode(content: bytes, name: str) -> images.Decoded:
    try:
        return images.decode(content)
    except ValueError as e:
        raise DataError(f"{name}: {e}") from None
