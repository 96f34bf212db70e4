"""Encoded images of any kind → uint8 RGB: the project's only reader of images.

Training data, `predict`, `explain` and the builders of data sets all pass through it, so that a
file means the same picture to each of them.
"""

import io
import re
from typing import NamedTuple

import numpy as np
from PIL import Image

from paligemma_med.pp import dicom, files

# Formats that PIL decodes itself. For others it starts outside programs (EPS runs Ghostscript), or
# they are too rare to justify their attack surface on files from strangers.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
_WHITE_IS_ZERO = 262, 0  # TIFF's tag PhotometricInterpretation; PIL heeds it for 8 bits only


class ImageError(ValueError):
    """Bytes that aren't an image, or an image that is refused; the message is one sentence."""


class Decoded(NamedTuple):
    """An image and how it was stored.

    Attributes:
      rgb: uint8[H, W, 3].
      plain: whether the plainest reader (8 bits, no palette, no alpha, one frame) shows the same
        picture, so that the bytes can be stored as they are.
    """

    rgb: np.ndarray
    plain: bool


def to_rgb(content: bytes) -> np.ndarray:
    """uint8[H, W, 3] of encoded bytes.

    Grey is repeated, palettes are looked up, CMYK is converted (Adobe's inverted JPEGs too). 16-bit
    grey is scaled from its full range, 0..65535 to 0..255, rounded, so that 12-bit values stored
    without stretching stay dark; a TIFF whose white is zero is inverted. Transparency is put on
    black, the colour of air in a radiograph: dropping alpha would uncover whatever an editor left
    under the transparent parts. Of several frames or pages the first is taken. EXIF orientation is
    ignored, as in TensorFlow. DICOM: see `dicom.to_rgb`.

    Raises:
      ImageError: not an image, damaged, cut off, more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or
        values of unknown range (floats, negative or above 65535).
    """
    return decode(content).rgb


def decode(content: bytes, *, verify: bool = False) -> Decoded:
    """Like `to_rgb`, and whether the bytes are plain.

    Args:
      verify: also look for broken chunks and checksums, which decoding alone may not notice.
    """
    if files.is_lfs_pointer(content):
        raise ImageError(files.lfs_message("an image"))
    try:
        if dicom.is_dicom(content):
            return Decoded(dicom.to_rgb(content), False)
        if verify:
            with open_image(content) as image:
                image.verify()  # makes the image unusable, so it is opened again below
        with open_image(content) as image:
            image.load()
            rgb, changed = _pil_to_rgb(image)
            plain = image.format in ("JPEG", "MPO", "PNG") and not changed
            if image.format == "PNG":
                # PIL silently reads only the high bytes of 16-bit colour.
                plain = plain and content[24] <= 8 and getattr(image, "n_frames", 1) == 1
            return Decoded(rgb, plain)
    except ImageError:
        raise
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, struct.error, IndexError, …
        reason = re.sub(r" ?<_io\.[^>]*>", "", " ".join(str(e).split())) or type(e).__name__  # no addresses
        raise ImageError(f"not a readable image, {describe(content)}: {reason:.300}") from e


def open_image(content: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A PIL image whose pixels aren't read yet; ImageError if there are too many of them.

    Raises:
      Whatever PIL raises for bytes that are none of `formats`.
    """
    image = Image.open(io.BytesIO(content), formats=formats)
    # PIL itself refuses at twice its limit and warns in between; one limit is clearer.
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit and pixels > limit:
        raise ImageError(
            f"image refused, as it may be a decompression bomb: {image.width} x {image.height} pixels; "
            f"expected at most {limit}"
        )
    return image


def size(content: bytes) -> tuple[int, int]:
    """(height, width) in pixels, from the header where there is one. ImageError as `to_rgb`."""
    try:
        with open_image(content) as image:
            return image.height, image.width
    except Exception:  # DICOM, or an error that decoding explains better
        return decode(content).rgb.shape[:2]


def describe(content: bytes) -> str:
    """What the bytes of an undecodable image look like, for an error message."""
    if not content:
        return "found 0 bytes"
    if dicom.is_dicom(content):
        return f"found {len(content)} bytes of a DICOM file"
    if content.lstrip()[:9].lower().startswith((b"<!doctype", b"<html")):
        return "found an HTML page (a failed download?)"
    for name, magic in (("JPEG", b"\xff\xd8"), ("PNG", b"\x89PNG"), ("GIF", b"GIF8")):
        if content.startswith(magic):
            return f"found {len(content)} bytes of a damaged or cut-off {name}"
    return f"found {len(content)} bytes that start with {content[:12]!r}"


def _pil_to_rgb(image: Image.Image) -> tuple[np.ndarray, bool]:
    """uint8[H, W, 3], and whether it differs from what the plainest reader would show."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(
                f"grey values of mode {image.mode} lie in {values.min()}..{values.max()}, expected 0..65535"
            )
        tag, zero = _WHITE_IS_ZERO
        if image.format == "TIFF" and image.tag_v2.get(tag) == zero:
            values = 65535 - values
        return array_to_rgb(values.astype(np.uint16)), True
    if image.mode == "F":
        raise ImageError("grey values are floats, whose range is unknown; store them as integers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        opaque = bool((rgba[..., 3] == 255).all()) and image.mode in ("RGBA", "LA")
        return array_to_rgb(rgba), not opaque
    return np.array(image.convert("RGB")), image.mode not in ("1", "L", "RGB")  # a writable copy


def array_to_rgb(array: np.ndarray) -> np.ndarray:
    """uint8[H, W, 3] from uint8 or uint16 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4] (on black).

    Raises:
      ImageError: another type or shape, or no pixels at all.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.dtype not in ("u1", "u2"):
        raise ImageError(f"expected uint8 or uint16 [H, W, 1, 3 or 4], found {array.dtype} {list(array.shape)}")
    if 0 in array.shape:
        raise ImageError(f"the image is empty: shape {list(array.shape)}")
    if array.dtype == np.uint16:
        # 65535 / 255 = 257 exactly; adding half of it rounds.
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.shape[2] == 1:
        return np.repeat(array, 3, axis=2)
    if array.shape[2] == 4:
        colour, alpha = array[..., :3].astype(np.uint16), array[..., 3:].astype(np.uint16)
        return ((colour * alpha + 127) // 255).astype(np.uint8)  # alpha 255 leaves the colour
    return array
