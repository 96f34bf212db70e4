"""Bytes or a file → pydicom's data set: what is DICOM, which of it holds an image, and how large that may be.

Whatever is checked here is checked before anything is unpacked or decoded.
"""

import contextlib
import io
import logging
import os
import re
import sys
import warnings
import zlib
from collections.abc import Iterator
from typing import Any

import PIL.Image

from paligemma_med.pp import files
from paligemma_med.pp.dicom_grey import DicomError

# Files without the 128-byte preamble begin with an element of group 0002 or 0008: its tag, then a value
# representation (two capital letters) or, in implicit files, a length below 65,536.
_HEAD = re.compile(rb"[\x02\x08]\0.\0(?:[A-Z]{2}|..\0\0)|\0[\x02\x08]\0.[A-Z]{2}", re.DOTALL)
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_META_LENGTH = b"\x02\0\0\0UL\x04\0"  # element 0002,0000 in front of its value
_HEADER = 2**17  # bytes, in which most headers end
MAX_INFLATED = 2**29  # bytes


def is_dicom(content: bytes) -> bool:
    """True for DICOM files, also for those without a preamble."""
    return content[128:132] == b"DICM" or _HEAD.match(content) is not None


def dataset(pydicom: Any, content: bytes) -> Any:
    """The data set of a file's bytes, with pixels of a size that may be read.

    Raises:
      DicomError: no pixels, too many of them, or no word on how many there are. pydicom's functions raise what
        they like besides.
    """
    ds = pydicom.dcmread(io.BytesIO(_inflated(content)), force=True)
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


def header(content: bytes, names: tuple[str, ...]) -> Any:
    """The data set of a file's bytes with the elements `names` (keywords) alone, and without its pixels.

    Raises:
      DicomError: pydicom isn't installed, or can't read the file.
    """
    try:
        return _header(content, names)[0]
    except DicomError:
        raise
    except Exception as e:
        raise DicomError(f"a DICOM file whose header can't be read ({files.reason(e)})") from None


def header_of(path: os.PathLike | str, names: tuple[str, ...]) -> Any:
    """`header` of a file, of which no more is read than it takes; None if it isn't DICOM. OSError: can't be opened."""
    with open(path, "rb") as f:
        if not is_dicom(content := f.read(_HEADER)):
            return None
        try:
            ds, is_whole = _header(content, names)
        except Exception:  # the whole file may be readable
            is_whole = False
        return ds if is_whole else header(content + f.read(), names)


def _header(content, names):
    """The data set, and whether its pixels were seen to begin, so that there is no more of it."""
    source = io.BytesIO(_inflated(content))
    with quiet():
        ds = need_pydicom().dcmread(source, stop_before_pixels=True, force=True, specific_tags=list(names))
    return ds, source.tell() < source.getbuffer().nbytes


def need_pydicom() -> Any:
    """The module; DicomError that says how to install it."""
    try:
        with _without_dl():
            import pydicom
    except ImportError:
        raise DicomError("a DICOM file, and pydicom is not installed; pip install 'paligemma_med[dicom]'") from None
    return pydicom


@contextlib.contextmanager
def _without_dl() -> Iterator[None]:
    """Hides modules called dl and DLFCN. GDCM, which pydicom imports, tries them first, as Python 2 had them: a
    folder dl/ where a program is started (deep learning?) would be taken for one, and end it."""
    hidden = {} if "pydicom" in sys.modules else {name: sys.modules.get(name) for name in ("dl", "DLFCN")}
    sys.modules.update(dict.fromkeys(hidden))
    try:
        yield
    finally:
        for name, module in hidden.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def code(value: Any) -> str:
    """A name or code of the standard as it is. A damaged file's could be anything, patients' names included."""
    return str(value) if re.fullmatch(r"[\w .,:()\[\]/-]{1,120}", str(value or ""), re.ASCII) else "unknown"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silences pydicom: it warns of values that no pixel depends on, and logs the traceback of each decoder that fails
    before it raises a summary."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _inflated(content: bytes) -> bytes:
    """A deflated file (PS3.5 A.5) as an ordinary one without meta header; others as they are.

    pydicom would inflate all of it, whatever it comes to: here it ends at a limit.
    """
    if _DEFLATED not in content:
        return content
    start = content.find(_META_LENGTH, 0, 132 + len(_META_LENGTH))
    value = start + len(_META_LENGTH)
    end = value + 4 + int.from_bytes(content[value : value + 4], "little")
    if start < 0 or _DEFLATED not in content[:end]:
        raise DicomError(
            "a deflated DICOM file without the length of its meta header; expected another transfer syntax"
        )
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        out = unpacker.decompress(content[end:], MAX_INFLATED)
    except zlib.error as e:
        raise DicomError(f"a deflated DICOM file that is damaged ({e})") from None
    if not unpacker.eof:
        if len(out) < MAX_INFLATED:
            raise DicomError("a deflated DICOM file that is cut off")
        raise DicomError(f"a deflated DICOM file of more than {MAX_INFLATED >> 20} MiB; expected less")
    return out


def _kind(ds: Any) -> str:
    """What a file without pixels is: a structured report, a plan, a directory, …"""
    for uid in (ds.get("SOPClassUID"), getattr(ds, "file_meta", {}).get("MediaStorageSOPClassUID")):
        if uid:
            return code(getattr(uid, "name", ""))
    return code(ds.get("Modality"))
