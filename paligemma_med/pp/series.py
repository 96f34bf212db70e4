"""A folder of slices → its files in the order in which a radiologist turns them over.

That order is the slices' place along the axis that they are stacked on; names of files say little about it (archives
count in base 36, or name a file by its UID). A folder with slices of two series or patients has no such order: it is
refused, and the series to choose from are named.
"""

import collections
import functools
import math
import os
import pathlib
import re
from typing import Any, NamedTuple

import numpy as np

from paligemma_med.pp import dicom, dicom_open, files, images

MAX_FILES = 4096  # of a folder: a CT of the whole body has some 2000
_LISTED = 6  # series that a message names
_SAME = 0.01  # cosines of directions that differ by less are those of one stack
_ELEMENTS = (
    *("PatientID", "PatientName", "SeriesInstanceUID", "SeriesNumber", "NumberOfFrames"),
    *("InstanceNumber", "ImagePositionPatient", "ImageOrientationPatient"),
)


class _Slice(NamedTuple):
    """What a slice's header says; `position` and `directions` are None where it doesn't."""

    path: pathlib.Path
    patient: str
    series: str
    number: str
    frames: int
    instance: float
    position: np.ndarray | None
    directions: np.ndarray | None


def ordered(folder: pathlib.Path, series: str = "") -> tuple[pathlib.Path, ...]:
    """The image files of a folder, not of those below it, in order.

    DICOM: by position along the normal of the slices (from the feet upwards, from front to back, from right to left),
    then by InstanceNumber, then by name. Where a slice has no position, or they lie in different planes, positions
    don't count. Other images: by name, numbers in it as numbers.

    Args:
      series: SeriesInstanceUID or SeriesNumber of the one to take; "" if there is but one.

    Raises:
      ImageError: no images, too many files, DICOM beside other images (unless `series` is given), several series or
        patients, several files of more than one frame, or a header that can't be read; doesn't name the folder.
    """
    try:
        return tuple(folder / name for name in _ordered(folder, series, os.stat(folder).st_mtime_ns))
    except OSError as e:
        raise images.ImageError(f"the folder can't be read ({e.strerror})") from None


@functools.lru_cache(maxsize=1024)  # many questions on one series, and many epochs
def _ordered(folder, series, changed):
    """Names of the files."""
    del changed
    paths = list_images(folder)
    found = [_header(path) for path in paths]
    slices = [x for x in found if x is not None]
    if not slices:
        if series:
            raise images.ImageError(f"series={series:.80} is for DICOM; the folder has none")
        return tuple(path.name for path in paths)
    if len(slices) < len(found) and not series:
        other = next(path for path, x in zip(paths, found) if x is None)
        raise images.ImageError(f"DICOM slices beside {other.name}, which is none; #series= takes those of one series")
    slices = _of_one_series(slices, series)
    if len({x.patient for x in slices}) > 1:
        raise images.ImageError("slices of several patients; expected those of one")
    if len(slices) > 1 and (several := next((x for x in slices if x.frames > 1), None)):
        raise images.ImageError(
            f"{len(slices)} files, of which {several.path.name} has {several.frames} frames; name the file, and its "
            "frame by #frame="
        )
    places = _places(slices)
    keys = {x.path.name: (place, x.instance, _natural(x.path.name)) for x, place in zip(slices, places)}
    return tuple(sorted(keys, key=keys.get))


def list_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Image files of a folder, by name. ImageError: none, or more than `MAX_FILES` files."""
    with os.scandir(folder) as entries:
        names = [entry.name for _, entry in zip(range(MAX_FILES + 1), entries)]
    if len(names) > MAX_FILES:
        raise images.ImageError(f"a folder of more than {MAX_FILES:,} files; expected the slices of one series")
    paths = [path for name in sorted(names, key=_natural) if images.is_image_file(path := folder / name)]
    if not paths:
        raise images.ImageError("a folder without images; those in folders below it don't count")
    return paths


def _of_one_series(slices, series):
    found = collections.Counter((x.number, x.series) for x in slices)
    if series:
        slices = [x for x in slices if series in (x.series, x.number)]
        found = {key: count for key, count in found.items() if series in key} or found
    if len(found) > 1:
        words = [
            f"{number or 'no number'} ({uid or 'no UID'}, {n} file{'s' * (n > 1)})"
            for (number, uid), n in sorted(found.items())
        ]
        more = ", …" if len(words) > _LISTED else ""
        asked = f"no series {series:.80}, but" if series and not slices else "slices of"
        raise images.ImageError(
            f"{asked} {len(found)} series; #series= chooses one by number or UID: {', '.join(words[:_LISTED])}{more}"
        )
    if not slices:
        raise images.ImageError(
            f"no series {series:.80}; its slices are of {' '.join(filter(None, next(iter(found))))}"
        )
    return slices


def _header(path):
    """`_Slice` of a DICOM file, None of another."""
    try:
        ds = dicom_open.header_of(path, _ELEMENTS)
    except OSError as e:
        raise images.ImageError(f"{path.name}: {e.strerror}") from None
    except dicom.DicomError as e:
        raise images.ImageError(f"{path.name}: {files.one_line(str(e))}") from None
    if ds is None:
        return None
    with dicom_open.quiet():
        number, uid = (dicom_open.code(_text(ds, k)) if _text(ds, k) else "" for k in _ELEMENTS[3:1:-1])
        frames, instance = (_numbers(ds, k, 1) for k in ("NumberOfFrames", "InstanceNumber"))
        return _Slice(
            path,
            _text(ds, "PatientID") or _text(ds, "PatientName"),
            uid,
            number,
            int(frames[0]) if frames is not None else 1,
            float(instance[0]) if instance is not None else math.inf,
            _numbers(ds, "ImagePositionPatient", 3),
            _numbers(ds, "ImageOrientationPatient", 6),
        )


def _text(ds: Any, name: str) -> str:
    try:
        return str(ds.get(name) or "").strip()
    except Exception:  # pydicom parses elements when they are asked for, and raises what it likes
        return ""


def _numbers(ds: Any, name: str, count: int) -> np.ndarray | None:
    """float64[count] of an element; None where it has another number of values, or one that is no number."""
    try:
        values = np.atleast_1d(np.array(ds.get(name), np.float64))
    except Exception:
        return None
    return values if values.shape == (count,) and np.isfinite(values).all() else None


def _places(slices) -> list[float]:
    """Each slice's place along their common normal, in mm; all 0 if they have none."""
    directions = [x.directions for x in slices]
    if any(x is None for x in directions) or any(x.position is None for x in slices):
        return [0.0] * len(slices)
    if max(np.abs(x - directions[0]).max() for x in directions) > _SAME:
        return [0.0] * len(slices)
    normal = np.cross(directions[0][:3], directions[0][3:])
    # Coordinates grow to the left, to the back and upwards (PS3.3 C.7.6.2.1.1), whichever way the rows run.
    normal *= np.sign(normal[np.argmax(np.abs(normal))])
    return [round(float(normal @ x.position), 3) for x in slices]


def _natural(name):
    """Orders slice2 before slice10."""
    return [(int(x), "") if x.isdecimal() and len(x) < 300 else (-1, x) for x in re.split(r"(\d+)", name)], name
