"""Encoded image bytes of any kind → the bytes to store, and the pixels they stand for.

Data sets keep the released bytes wherever every reader shows them alike. The rest (16 bits, CMYK,
transparency, palettes, DICOM, formats that not all readers know) becomes 8-bit PNG here, once and
by known rules, because readers differ on them: some drop alpha, some wrap 16 bits round.
"""

import io

import numpy as np
import PIL.Image

from data_prep.files import DataError
from paligemma_med.pp import images


def to_rgb(content: bytes, name: str = "image") -> np.ndarray:
    """uint8[H, W, 3] of encoded bytes.

    By the rules of `paligemma_med.pp.images.to_rgb`, so that a stored image and the same file given
    to `predict` are the same picture.

    Args:
      content: of a file.
      name: of the file, for the error.

    Raises:
      DataError: no image, damaged, cut off, too large, a git-LFS pointer, or values of unknown
        range (floats, negative or above 65535).
    """
    return _decode(content, name).rgb


def convert(content: bytes, name: str = "image") -> bytes:
    """The bytes to store: `content` itself if every reader shows it right, else an 8-bit PNG of it.

    Kept: JPEG of mode grey or RGB; PNG of at most 8 bits, grey or RGB, also with an alpha channel
    that is opaque everywhere; one frame each. The PNG is grey if all three channels are equal.

    Args and errors as `to_rgb`; the image is decoded in any case.
    """
    rgb, plain = _decode(content, name)
    if plain:
        return content
    grey = (rgb[..., 0] == rgb[..., 1]).all() and (rgb[..., 0] == rgb[..., 2]).all()
    out = io.BytesIO()
    PIL.Image.fromarray(rgb[..., 0] if grey else rgb).save(out, "PNG")
    return out.getvalue()


def convert_checked(content: bytes, name: str = "image") -> bytes:
    """As `convert`, for an image that was decoded before and is whole.

    Nearly all are plain JPEG or PNG, which their header tells without decoding them once more.
    """
    try:
        with images.open_image(content, formats=("JPEG", "PNG")) as image:
            plain = image.mode in ("L", "RGB") and "transparency" not in image.info
            # 24: bits per channel; PIL reads 16-bit colour as 8 bits.
            if image.format == "PNG":
                plain = plain and content[24] == 8 and getattr(image, "n_frames", 1) == 1
            elif image.format != "JPEG":
                plain = False
    except Exception:  # `convert` tells what is wrong
        plain = False
    return content if plain else convert(content, name)


def _decode(content: bytes, name: str) -> images.Decoded:
    try:
        return images.decode(content, verify=True)
    except ValueError as e:
        raise DataError(f"{name}: {e}") from None
