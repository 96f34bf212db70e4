"""Encoded images of any kind → uint8 RGB: the project's only reader of images.

Training data, `predict`, `explain` and the builders of data sets all pass through it, so that a
file means the same picture to each of them.
"""

import functools
import io
import logging
import os
import pathlib
import warnings
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image

from paligemma_med.pp import dicom, dicom_open, files, windows

# Formats that PIL decodes itself. For others it starts outside programs (EPS runs Ghostscript), or
# they are too rare to justify their attack surface on files from strangers.
FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "GIF", "WEBP", "PPM", "JPEG2000")
# What names of image files end in. DICOM files often have no suffix, or the last part of a UID.
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".gif", ".bmp", ".ppm", ".pgm", ".jp2", ".dcm", ".dicom")
_TIFF_BITS, _TIFF_WHITE = 258, 262  # BitsPerSample; PhotometricInterpretation, 0 if white is zero
_PNG_EXIF = b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif"  # where PIL finds an orientation
UNSTRETCHED = (
    "its 16-bit grey values all lie below 4096, as 12-bit ones do that weren't stretched; it shows next to nothing"
)


# PIL warns of what `open_image` refuses.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class ImageError(ValueError):
    """Bytes that aren't an image, or an image that is refused; the message is one sentence."""


class Decoded(NamedTuple):
    """An image and how it was stored.

    Attributes:
      rgb: uint8[H, W, 3].
      plain: whether the plainest reader (8 bits, no palette, no alpha, one frame, upright) shows the
        same picture, so that the bytes can be stored as they are.
      notes: what was assumed or looks wrong, in words that are the same for each file.
    """

    rgb: np.ndarray
    plain: bool
    notes: tuple[str, ...] = ()


def to_rgb(content: bytes, *, window: windows.Window | None = None) -> np.ndarray:
    """uint8[H, W, 3] of encoded bytes.

    Grey is repeated, palettes are looked up, CMYK is converted (Adobe's inverted JPEGs too). 16-bit
    grey is scaled from its full range, 0..65535 to 0..255, rounded, so that 12-bit values stored
    without stretching stay dark, of which a warning tells; a TIFF whose white is zero is inverted.
    Transparency is put on black, the colour of air in a radiograph: dropping alpha would uncover whatever
    an editor left under the transparent parts. Of several frames or pages the first is taken. EXIF
    orientation is obeyed, as by viewers and Hugging Face (TensorFlow ignores it). DICOM: see
    `dicom.decode`.

    What the decoder assumed is logged, each thing once a process. `window` is for DICOM alone.

    Raises:
      ImageError: not an image, damaged, cut off, more than `PIL.Image.MAX_IMAGE_PIXELS` pixels, or
        values of unknown range (floats, negative or above 65535).
    """
    found = decode(content, window=window)
    for note in found.notes:
        tell(note)
    return found.rgb


def read_file(path: str | os.PathLike, flag: str) -> np.ndarray:
    """uint8[H, W, 3] of the image file that a program's flag names, as `to_rgb`.

    Raises:
      ImageError: the file can't be opened, or isn't such an image; names flag and file.
    """
    try:
        with open(path, "rb") as f:
            return to_rgb(f.read())
    except OSError as e:
        raise ImageError(f"{flag} {path}: {e.strerror}.") from None
    except ImageError as e:
        raise ImageError(f"{flag} {path}: {e}") from None


@functools.cache
def tell(note: str) -> None:
    """Logs a note of `decode`, once a process."""
    logging.getLogger(__name__).warning("an image: %s (told once)", note)


def decode(content: bytes, *, frame: int = 0, window: windows.Window | None = None) -> Decoded:
    """Like `to_rgb`, and how the image was stored. The same for builds, training and programs, so that
    what one accepts no other refuses. `frame`, from 0, and, of DICOM, a window may be chosen."""
    if files.is_lfs_pointer(content):
        raise ImageError(files.lfs_message("an image"))
    try:
        if dicom.is_dicom(content):
            rgb, notes = dicom.decode(content, frame=frame, window=window)
            return Decoded(rgb, False, notes)
        if content[:4] == b"\x89PNG":
            with open_image(content) as image:
                image.verify()  # checksums, which decoding ignores; makes the image unusable
        with open_image(content) as image:
            if frame:
                _turn_to(image, frame)
            image.load()
            rgb, changed, notes = _pil_to_rgb(image)
            if (orientation := _orientation(image)) > 1:
                rgb, changed = _upright(rgb, orientation), True
            plain = image.format in ("JPEG", "MPO", "PNG") and not changed
            if image.format == "PNG":
                # PIL silently reads only the high bytes of 16-bit colour.
                plain = plain and content[24] <= 8 and getattr(image, "n_frames", 1) == 1
            return Decoded(rgb, plain, notes)
    except dicom.DicomError as e:
        raise ImageError(files.one_line(str(e))) from None
    except ImageError:
        raise
    except Exception as e:  # PIL's decoders raise OSError, SyntaxError, struct.error, IndexError, …
        raise ImageError(f"not a readable image, {describe(content)}: {files.reason(e)}") from e


def frames(content: bytes) -> int:
    """How many frames or pages an encoded image has. ImageError: it can't be told."""
    try:
        if dicom.is_dicom(content):
            with dicom_open.quiet():
                return max(int(dicom_open.header(content, ("NumberOfFrames",)).get("NumberOfFrames") or 1), 1)
        with open_image(content) as image:
            return getattr(image, "n_frames", 1)
    except dicom.DicomError as e:
        raise ImageError(files.one_line(str(e))) from None
    except ImageError:
        raise
    except Exception as e:
        raise ImageError(f"not a readable image, {describe(content)}: {files.reason(e)}") from e


def plain_by_header(content: bytes) -> bool:
    """True if the header alone shows that `decode(content).plain` is True of a whole file; quick."""
    try:
        with open_image(content, formats=("JPEG", "PNG")) as image:
            if image.mode not in ("L", "RGB") or "transparency" in image.info:
                return False
            if image.format == "PNG":
                # Byte 24 holds the bits per channel; PIL reads 16-bit colour as 8 bits. EXIF may follow the pixels.
                has_exif = any(name in content for name in _PNG_EXIF)
                return content[24] == 8 and getattr(image, "n_frames", 1) == 1 and not has_exif
            return image.format == "JPEG" and _orientation(image) == 1
    except Exception:  # `decode` reports what is wrong
        return False


def _turn_to(image: Image.Image, frame: int) -> None:
    if not 0 <= frame < (count := getattr(image, "n_frames", 1)):
        raise ImageError(f"no frame {frame + 1}; the image has {count}")
    image.seek(frame)
    _check_size(image)  # pages have sizes of their own


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation of a loaded image, 1 to 8; above 1 it has to be turned or mirrored.

    Of TIFF it is always 1, since PIL turns them itself.
    """
    if image.format == "TIFF":
        return 1
    try:
        found = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # EXIF that is damaged says nothing, and PIL raises what it likes
        return 1
    return found if found in range(1, 9) else 1


def _upright(rgb: np.ndarray, orientation: int) -> np.ndarray:
    """The image as seen by who took it: rows and columns swapped from 5 on, then one or both reversed."""
    if orientation >= 5:
        rgb = rgb.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def open_image(content: bytes, formats: tuple[str, ...] = FORMATS) -> Image.Image:
    """A PIL image whose pixels aren't read yet; ImageError if there are too many of them.

    Raises:
      Whatever PIL raises for bytes that are none of `formats`.
    """
    image = Image.open(io.BytesIO(content), formats=formats)
    _check_size(image)
    return image


def _check_size(image: Image.Image) -> None:
    # PIL itself refuses at twice its limit and warns in between; one limit is clearer.
    pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
    if limit and pixels > limit:
        raise ImageError(
            f"image refused, as it may be a decompression bomb: {image.width} x {image.height} pixels; "
            f"expected at most {limit}"
        )


def is_image_file(path: pathlib.Path) -> bool:
    """Whether a file in a folder is to be read as an image: by its suffix, or as DICOM by its first bytes.

    Hidden files, what macOS adds to folders (`._film.jpg`, `__MACOSX`) and DICOMDIR, a table of contents, are
    none.
    """
    if path.name.startswith(".") or "__MACOSX" in path.parts or path.name.upper() == "DICOMDIR":
        return False
    try:
        if not path.is_file():
            return False
        if path.suffix.lower() in SUFFIXES:
            return True
        with open(path, "rb") as f:
            return dicom.is_dicom(f.read(132))
    except OSError:  # no permission, a broken link
        return False


def size(content: bytes) -> tuple[int, int]:
    """(height, width) in pixels of what `to_rgb` gives; of JPEG and DICOM from the header. ImageError as `to_rgb`."""
    try:
        if dicom.is_dicom(content):
            found = dicom_open.header(content, ("Rows", "Columns"))
            return int(found.Rows), int(found.Columns)
        with open_image(content, formats=("JPEG",)) as image:
            size = image.height, image.width
            return size[::-1] if _orientation(image) >= 5 else size
    except Exception:  # another format, or an error that decoding explains better
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


def _pil_to_rgb(image: Image.Image) -> tuple[np.ndarray, bool, tuple[str, ...]]:
    """uint8[H, W, 3], whether it differs from what the plainest reader would show, and notes."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ImageError(f"grey values of mode {image.mode} lie in {low}..{high}, expected 0..65535")
        values, white = values.astype(np.uint16), 65535
        if image.format == "TIFF":
            bits = image.tag_v2.get(_TIFF_BITS, 16)
            white = 2 ** min(bits[0] if isinstance(bits, tuple) else bits, 16) - 1
            if image.tag_v2.get(_TIFF_WHITE) == 0:  # PIL heeds it for 8 bits only
                values = white - values
        if white < 65535:
            values = ((values.astype(np.uint32) * 65535 + white // 2) // white).astype(np.uint16)
        return array_to_rgb(values), True, (UNSTRETCHED,) if 0 < high < 4096 and white == 65535 else ()
    if image.mode == "F":
        raise ImageError("grey values are floats, whose range is unknown; store them as integers")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        opaque = bool((rgba[..., 3] == 255).all()) and image.mode in ("RGBA", "LA")
        return array_to_rgb(rgba), not opaque, ()
    return np.array(image.convert("RGB")), image.mode not in ("1", "L", "RGB"), ()  # a writable copy


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
        return dicom.grey_to_rgb(array[:, :, 0])
    if array.shape[2] == 4:
        colour, alpha = array[..., :3].astype(np.uint16), array[..., 3:].astype(np.uint16)
        return ((colour * alpha + 127) // 255).astype(np.uint8)  # alpha 255 leaves the colour
    return array
