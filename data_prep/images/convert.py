"""Encoded image bytes of any kind → the bytes to store, and the pixels they stand for.

Data sets keep the released bytes wherever every reader shows them alike. The rest (16 bits, CMYK,
transparency, palettes, DICOM, formats that not all readers know) becomes 8-bit PNG here, once and
by known rules, because readers differ on them: some drop alpha, some wrap 16 bits round.
"""

import io
import re

import numpy as np
import PIL.Image

from data_prep.files import DataError, is_lfs_pointer, lfs_message
from data_prep.images import dicom

# PIL decodes these itself; for others it starts programs, or they are too rare to trust.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")


def to_rgb(content: bytes, name: str = "image") -> np.ndarray:
    """uint8[H, W, 3] of encoded bytes.

    Grey is repeated, palettes are looked up, CMYK is converted (Adobe's inverted JPEGs too);
    transparency is put on black, the colour of air in a radiograph. 16-bit grey is scaled from its
    full range, 0..65535 to 0..255, rounded. The first frame or page of several is taken; EXIF
    orientation is left alone. DICOM: see `dicom.to_rgb`.

    Args:
      content: of a file.
      name: of the file, for the error.

    Raises:
      DataError: no image, damaged, cut off, too large, a git-LFS pointer, or values of unknown
        range (floats, negative or above 65535).
    """
    return _decode(content, name)[0]


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
        with PIL.Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as image:
            plain = image.mode in ("L", "RGB") and "transparency" not in image.info
            # 24: bits per channel; PIL reads 16-bit colour as 8 bits.
            if image.format == "PNG":
                plain = plain and content[24] == 8 and getattr(image, "n_frames", 1) == 1
            elif image.format != "JPEG":
                plain = False
    except Exception:  # `convert` tells what is wrong
        plain = False
    return content if plain else convert(content, name)


def _decode(content: bytes, name: str) -> tuple[np.ndarray, bool]:
    """uint8[H, W, 3], and whether the bytes can be stored as they are."""
    if is_lfs_pointer(content):
        raise DataError(f"{name}: {lfs_message('an image')}")
    try:
        if dicom.is_dicom(content):
            return dicom.to_rgb(content), False
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            pixels, limit = image.width * image.height, PIL.Image.MAX_IMAGE_PIXELS
            if limit and pixels > limit:
                raise DataError(f"{image.width} x {image.height} pixels; expected at most {limit}")
            image.verify()  # finds broken chunks and checksums; load() finds pixels that lack
        with PIL.Image.open(io.BytesIO(content), formats=FORMATS) as image:
            image.load()
            rgb, changed = _pil_to_rgb(image)
            plain = image.format in ("JPEG", "MPO", "PNG") and not changed
            if image.format == "PNG":
                # PIL reads 16-bit colour by its high bytes and says nothing of it.
                plain = plain and content[24] <= 8 and getattr(image, "n_frames", 1) == 1
            return rgb, plain
    except DataError as e:
        raise DataError(f"{name}: {e}") from None
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, struct.error, IndexError, …
        reason = re.sub(r" ?<_io\.[^>]*>", "", " ".join(str(e).split()))  # no memory addresses
        raise DataError(
            f"{name}: not a readable image ({len(content)} bytes; {reason:.200}); expected a whole "
            "JPEG, PNG, TIFF or DICOM file"
        ) from None


def _pil_to_rgb(image: PIL.Image.Image) -> tuple[np.ndarray, bool]:
    """uint8[H, W, 3], and whether it differs from what the plainest reader would show."""
    if image.mode == "F":
        raise DataError("grey values are floats, whose range is unknown; expected whole numbers")
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise DataError(f"grey values from {values.min()} to {values.max()}; expected 0 to 65535")
        white_is_zero = 262  # TIFF's PhotometricInterpretation; PIL heeds it for 8 bits only
        if image.format == "TIFF" and image.tag_v2.get(white_is_zero) == 0:
            values = 65535 - values
        grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257; + 128 rounds
        return np.repeat(grey[:, :, None], 3, axis=2), True
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA")).astype(np.uint16)
        colour, alpha = rgba[..., :3], rgba[..., 3:]
        opaque = bool((alpha == 255).all()) and image.mode in ("RGBA", "LA")
        return ((colour * alpha + 127) // 255).astype(np.uint8), not opaque
    return np.array(image.convert("RGB")), image.mode not in ("1", "L", "RGB")
