"""What a table's cell `image` may name besides one file: a slice or frame, a folder of slices, several images.

    chest.dcm#window=lung        ct1                      a series: a montage of nine slices
    ct1#slice=12                 ct1#slice=40-80|montage=2x4|window=brain
    cine.dcm#frame=middle        before.png;after.png     side by side; or a JSON list of these

A cell becomes the bytes of one image, so that training, evaluations, `ask` and served models see the same picture. The
name of a file that is there is taken as it is, whatever signs are in it.
"""

import hashlib
import os
import pathlib
import re
import stat
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from paligemma_med.pp import dicom, files, images, json_text, montage, series, windows

KEYS = ("slice", "frame", "montage", "series", "window")
DEFAULT = (3, 3)  # the montage of a series
MAX_NUMBERS = 10_000  # that a selection may name
_PART = re.compile(r"(\d{1,6})(?:-(\d{1,6}))?")


class OutsideError(images.ImageError):
    """A name that leaves the folder."""


class Choice(NamedTuple):
    """What is to be shown of a file or folder; empty and None: not said.

    slice, frame: "12", "3,7", "10-40" or "middle", counted from 1. montage: (rows, columns). series: number or UID.
    """

    slice: str = ""
    frame: str = ""
    montage: tuple[int, int] | None = None
    series: str = ""
    window: windows.Window | None = None


class Part(NamedTuple):
    """One of the pictures of a cell."""

    path: pathlib.Path
    name: str
    choice: Choice


def load(cell: str, folder: str | os.PathLike | None, *, choose: Choice = Choice()) -> bytes:  # noqa: B008
    """The encoded image that a cell stands for: a file's own bytes where it names no more than that, else a PNG.

    Args:
      folder: that the cell's names begin in and stay in; None: the cell is its user's own path.
      choose: for what a cell doesn't say itself. Of it slice and montage are for folders, frame for files of several.

    Raises:
      ImageError: a sentence that names the file.
      OSError: a file that the cell names by itself can't be read.
    """
    parts = parse(cell, folder)
    if len(parts) == 1:
        part = parts[0]
        if part.choice == Choice() and not part.path.is_dir():
            content = part.path.read_bytes()
            if not choose.frame and not (choose.window and dicom.is_dicom(content)):
                return content
        return montage.encode(_shown(part, choose))
    return montage.encode(montage.draw((_shown(part, choose) for part in parts), *montage.grid(len(parts))))


def read(cell: str, flag: str) -> bytes:
    """`load` of the cell that a program's flag gives, an image that can be decoded. ImageError names flag and file."""
    try:
        content = load(cell, None)
        images.decode(content)
        return content
    except OSError as e:
        raise images.ImageError(f"{flag} {cell}: {e.strerror}.") from None
    except ValueError as e:
        raise images.ImageError(f"{flag} {cell}: {e}") from None


def parse(cell: str, folder: str | os.PathLike | None) -> list[Part]:
    """The pictures of a cell, whose files needn't be there.

    Raises:
      ImageError: what can't be understood, or a path that leaves the folder.
    """
    plain = _path(folder, cell, strict=False)
    if plain is not None and os.path.exists(plain):
        return [Part(plain, cell, Choice())]
    try:
        parts = [_part(name) for name in _names(cell)]
    except ValueError as e:
        raise images.ImageError(f"what it names can't be understood: {cell:.100}: {e}") from None
    return [Part(_path(folder, name), name, choice) for name, choice in parts]


def _part(name):
    path, found, fragment = name.rpartition("#")
    return (path.strip(), parse_choice(fragment)) if found and "=" in fragment else (name, Choice())


def _names(cell):
    text = cell.strip()
    if text.startswith("["):
        names = json_text.parse(text, "image", "a list of names", root=list)
        if not names or not all(isinstance(x, str) for x in names):
            raise images.ImageError("expected a list of names, as texts")
    else:
        names = text.split(";")
    names = [x.strip() for x in names]
    if not all(names):
        raise images.ImageError("several images, of which one has no name")
    if len(names) > montage.MAX_CELLS:
        raise images.ImageError(f"{len(names)} images; expected at most {montage.MAX_CELLS}")
    return names


def parse_choice(text: str | None, keys: Sequence[str] = KEYS) -> Choice:
    """`Choice` of "slice=12|window=brain"; ImageError says what can't be understood."""
    given: dict[str, Any] = {}
    for section in (text or "").split("|"):
        key, found, value = (x.strip() for x in section.partition("="))
        if not section.strip() and not text:
            continue
        if not found or key not in keys or key in given or not value:
            raise images.ImageError(f"{section:.80}: expected {'=, '.join(keys)}=, each once, with | between them")
        given[key] = value
    for key in ("slice", "frame"):
        if key in given and given[key] != "middle":
            _numbers(given[key], key)
    if "slice" in given and "frame" in given and keys is KEYS:
        raise images.ImageError("slice= is for folders, frame= for files of several frames; expected one of them")
    if value := given.get("montage"):
        match = re.fullmatch(r"(\d{1,2})x(\d{1,2})", value)
        size = tuple(map(int, match.groups())) if match else (0, 0)
        if not 1 <= size[0] * size[1] <= montage.MAX_CELLS:
            raise images.ImageError(
                f"montage={value:.80}: expected rows x columns, such as 3x4, at most {montage.MAX_CELLS} places"
            )
        given["montage"] = size
    try:
        given["window"] = windows.parse(given.get("window"))
    except ValueError as e:
        raise images.ImageError(str(e)) from None
    return Choice(**given)


def parse_default(text: str | None) -> Choice:
    """`Choice` for cells that don't say it themselves. ImageError as of `parse_choice`."""
    try:
        return parse_choice(text, ("slice", "frame", "montage", "window"))
    except images.ImageError as e:
        raise images.ImageError(f"choose={text:.200}: {e}") from None


def _numbers(text, key):
    """The numbers of "3,7,10-40", in this order."""
    out: list[int] = []
    for section in text.split(","):
        match = _PART.fullmatch(section.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not 1 <= first <= last or len(out) + last - first >= MAX_NUMBERS:
            raise images.ImageError(f"{key}={text:.80}: expected numbers from 1, such as 12 or 3,7 or 10-40, or middle")
        out += range(first, last + 1)
    return out


# --- Files ---


def _path(folder, name, *, strict=True):
    """`files.path_inside`, which also takes the full path of a file in the folder. Not strict: None in place of an
    error."""
    try:
        if folder is None:  # the user's own
            return pathlib.Path(name)
        relative = name
        if os.path.isabs(name) and ".." not in pathlib.Path(name).parts:
            relative = os.path.relpath(name, os.path.abspath(folder))
        return files.path_inside(folder, relative)
    except ValueError:
        if not strict:
            return None
        raise OutsideError(f"the path of its image leaves the folder: {name:.200}") from None


def sources(cell: str, folder: str | os.PathLike) -> list[str]:
    """Names of a cell's files and folders alone: the same for all slices, frames and windows of one of them."""
    return sorted(part.name for part in parse(cell, folder))


def look_at(cell: str, folder: str | os.PathLike) -> tuple[int, tuple[str, ...]]:
    """(bytes of a cell's files, `sources`). Errors as of `files_of`. Quick for a file: tables have millions of them."""
    plain = _path(folder, cell, strict=False)
    try:
        found = os.stat(plain) if plain is not None else None
    except (OSError, ValueError):
        found = None
    if found and found.st_size and stat.S_ISREG(found.st_mode):
        return found.st_size, (cell,)
    return sum(size for _, size in files_of(cell, folder)), tuple(sources(cell, folder))


def files_of(cell: str, folder: str | os.PathLike) -> list[tuple[pathlib.Path, int]]:
    """(path, bytes) of every file that a cell's picture may depend on.

    Raises:
      ImageError: one that isn't there, or is empty; a folder without images; what `parse` raises.
    """
    out = []
    for part in parse(cell, folder):
        try:
            paths = series.list_images(part.path) if os.path.isdir(part.path) else [part.path]
            found = [(path, os.stat(path).st_size) for path in paths]
        except (OSError, ValueError) as e:
            why = str(e) if isinstance(e, images.ImageError) else "no image file"
            raise images.ImageError(f"{why}: {part.name:.200}") from None
        if not all(size for _, size in found):
            raise images.ImageError(f"an empty image file: {part.name:.200}")
        out += found
    return out


def digest(cell: str, folder: str | os.PathLike) -> bytes:
    """16 bytes that are equal for cells of equal files, whatever these are called and whatever is shown of them."""
    contents = []
    for path, _ in files_of(cell, folder):
        with open(path, "rb") as f:
            contents.append(hashlib.file_digest(f, lambda: hashlib.blake2b(digest_size=16)).digest())
    return hashlib.blake2b(b"".join(sorted(contents)), digest_size=16).digest()


# --- Pictures ---


def _shown(part: Part, default: Choice) -> np.ndarray:
    """uint8[H, W, 3]. ImageError names the file."""
    try:
        if part.path.is_dir():
            return _of_folder(part, default)
        return _of_file(part.path, part.choice, default)
    except OSError as e:
        raise images.ImageError(f"{part.name}: {e.strerror}") from None
    except ValueError as e:
        raise images.ImageError(f"{part.name}: {e}") from None


def _of_folder(part, default):
    own = part.choice
    paths = series.ordered(part.path, own.series)
    if own.frame:
        raise images.ImageError("frame= is for files of several frames; slice= for the slices of a folder")
    chosen = own if own.slice or own.montage else own._replace(slice=default.slice, montage=default.montage)
    if len(paths) == 1:
        content = paths[0].read_bytes()
        if (total := images.frames(content)) > 1:  # the whole series in one file
            return _several(total, chosen, "slice", lambda i: _decoded(content, i, own, default))
    return _several(len(paths), chosen, "slice", lambda i: _of_slice(paths[i], own, default))


def _of_slice(path, own, default):
    try:
        return _decoded(path.read_bytes(), 0, own, default)
    except ValueError as e:
        raise images.ImageError(f"{path.name}: {e}") from None


def _of_file(path, own, default):
    if own.slice or own.series:
        raise images.ImageError("slice= and series= are for folders; frame= for a file of several frames")
    content = path.read_bytes()
    if not (own.frame or own.montage or default.frame):
        return _decoded(content, 0, own, default)
    total = images.frames(content)
    said = bool(own.frame or own.montage)
    if total == 1 and not said:
        return _decoded(content, 0, own, default)
    chosen = own if said else own._replace(frame=default.frame)
    return _several(total, chosen, "frame", lambda i: _decoded(content, i, own, default))


def _several(total: int, choice: Choice, key: str, picture: Callable[[int], np.ndarray]) -> np.ndarray:
    """The chosen of `total` slices or frames: one by itself, several as a montage."""
    text = getattr(choice, key)
    numbers: Sequence[int]
    if text == "middle":
        numbers = [total // 2]
    elif text:
        numbers = [n - 1 for n in _numbers(text, key)]
        if max(numbers) >= total:
            raise images.ImageError(f"no {key} {max(numbers) + 1}; there are {total}")
    else:
        numbers = range(total)  # no list: a header says how many
    size = choice.montage
    if size is None and text:
        if len(numbers) > montage.MAX_CELLS:
            raise images.ImageError(
                f"{key}={text:.80}: {len(numbers)} pictures; expected at most {montage.MAX_CELLS}, or montage= besides"
            )
        size = montage.grid(len(numbers))
    elif size is None:
        numbers = [numbers[i] for i in montage.sampled(total, DEFAULT[0] * DEFAULT[1])]
        size = montage.grid(len(numbers))
    else:
        numbers = [numbers[i] for i in montage.sampled(len(numbers), size[0] * size[1])]
    if size == (1, 1):
        return picture(numbers[0])
    return montage.draw(map(picture, numbers), *size)


def _decoded(content, frame, own, default):
    """A picture by itself. A window that its cell asks for and that it can't have is an error; a general one is not."""
    if own.window and not dicom.is_dicom(content):
        raise images.ImageError("window= is for DICOM; the grey values of other images have no units")
    found = images.decode(content, frame=frame, window=own.window or default.window)
    for note in found.notes:
        if own.window and note in (windows.NO_CT, windows.NO_GREY):
            raise images.ImageError(note)
        images.tell(note)
    return found.rgb
