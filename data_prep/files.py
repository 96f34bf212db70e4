"""Reads untrusted files: JSON, image bytes, and paths found inside JSON.

Released data sets come with truncated downloads, git-LFS pointers, stray paths. Each function here
either returns the content or raises `DataError` with one sentence that names the file, what was
found and what was expected, because a user can act on that and not on a stack trace.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import pathlib
import secrets
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from paligemma_med.pp import files as pp_files
from paligemma_med.pp import images, json_text, tables, tfds_files
from paligemma_med.pp.files import is_lfs_pointer, lfs_message


class DataError(ValueError):
    """The data given by the user can't be built; the message says which file and why."""


def read_bytes(path: os.PathLike | str, what: str) -> bytes:
    """The content of a file. DataError: missing, unreadable, a git-LFS pointer."""
    try:
        content = pathlib.Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: {what} is missing") from None
    except OSError as e:
        raise DataError(f"{path}: {what} can't be read ({e.strerror or e})") from None
    if is_lfs_pointer(content):
        raise DataError(f"{path}: {lfs_message(what)}")
    return content


def read_json(path: os.PathLike | str, what: str = "a JSON file") -> Any:
    """Parses a UTF-8 JSON file (a byte-order mark is tolerated).

    Raises:
      DataError: missing, unreadable, a git-LFS pointer, or what `json_text.parse` refuses.
    """
    return json_text.parse(read_bytes(path, what), str(path), what, constants=True, error=DataError)


def read_text(path: os.PathLike | str, what: str) -> str:
    """A UTF-8 file (a byte-order mark is tolerated). DataError: as `read_bytes`, or not UTF-8."""
    content = read_bytes(path, what)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise DataError(f"{path}: not UTF-8 text at byte {e.start}; expected {what}") from None


def read_table(path: os.PathLike | str, needed: Sequence[str], what: str) -> Iterator[tuple[str, dict[str, str]]]:
    """(where, row without outer blanks) of each line of a CSV file.

    Raises:
      DataError: as `read_text`; a column is missing, or a row has another length.
    """
    columns, rows = tables.read(io.StringIO(read_text(path, what), newline=""), path, error=DataError)
    if missing := [c for c in needed if c not in columns]:
        raise DataError(f"{path}: column {', '.join(missing)} missing; expected {', '.join(needed)}")
    for line, row in rows:
        if isinstance(row, str):
            raise DataError(f"{path} line {line}: {row}; expected {', '.join(needed)}")
        yield f"{path} line {line}", {k: v.strip() for k, v in row.items()}


def given_folder(folder: os.PathLike | str, expected: str) -> pathlib.Path:
    """The folder that a user gave, `~` expanded. DataError: there is none."""
    folder = pathlib.Path(folder).expanduser()
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; expected a folder with {expected}")
    return folder


def did_you_mean(folder: pathlib.Path, is_right: Callable[[pathlib.Path], Any], *, above: bool = True) -> str:
    """ "; did you mean …?" with a folder in a wrong one, or above it, that has what is expected; else ""."""
    near = [folder.parent] * above + sorted(p for p in folder.iterdir() if p.is_dir())
    right = next((p for p in near if is_right(p)), None)
    return f"; did you mean {right}?" if right else ""


def path_inside(root: os.PathLike | str, name: Any) -> pathlib.Path:
    """Joins a relative path from a data file to `root`, and never leaves `root`: see `pp.files.path_inside`.

    Raises:
      DataError: empty, absolute, with a drive letter, a NUL or a `..` part, or not a string.
    """
    try:
        return pp_files.path_inside(root, name)
    except ValueError as e:
        raise DataError(str(e)) from None


def open_built(folder: os.PathLike | str) -> Any:
    """The TFDS builder of a built data set; DataError: see `pp.tfds_files`."""
    try:
        return tfds_files.open_built(folder)
    except ValueError as e:
        raise DataError(str(e)) from None


def built_folder(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The newest built version of a set. DataError: it isn't built, or has configs to choose from."""
    there = [p.parent for p in (data_dir / name).glob("*/dataset_info.json")]
    if not there:
        configs = sorted({p.parents[1].name for p in (data_dir / name).glob("*/*/dataset_info.json")})
        hint = f"; did you mean {name}/{configs[0]}?" if configs else ""
        raise DataError(f"{data_dir / name}: not built; expected records of {name} there{hint}")
    return max(there, key=lambda p: [int(x) if x.isdigit() else -1 for x in p.name.split(".")])


def check_feature_classes(folder: os.PathLike | str) -> None:
    """DataError where a built data set would have TFDS import other classes than its own: see `pp.tfds_files`."""
    try:
        tfds_files.check_feature_classes(folder)
    except ValueError as e:
        raise DataError(str(e)) from None


class Checked(NamedTuple):
    """An image that can be read.

    Attributes:
      digest: SHA-256 of its bytes.
      notes: what the reader assumed or found odd, in words that are the same for each file; for the report.
    """

    digest: str
    notes: tuple[str, ...]


def check_image_bytes(content: bytes, where: str) -> Checked:
    """Decodes an image, as training will.

    Raises:
      DataError: a git-LFS pointer, corrupt or truncated; `where` names the file.
    """
    try:
        notes = images.decode(content).notes
    except ValueError as e:
        raise DataError(f"{where}: {e}") from None
    return Checked(hashlib.sha256(content).hexdigest(), notes)


@functools.cache
def _check_image(path: str, size: int, mtime_ns: int) -> Checked:
    # size and mtime are in the cache key so that a file changed on disk is checked again.
    del size, mtime_ns
    return check_image_bytes(read_bytes(path, "an image"), path)


def check_image(path: os.PathLike | str) -> Checked:
    """Decodes an image file, once per process.

    Raises:
      DataError: missing, a git-LFS pointer, corrupt or truncated.
    """
    path = os.fspath(path)
    try:
        stat = os.stat(path)
    except OSError:
        raise DataError(f"{path}: the image is missing") from None
    if not os.path.isfile(path):
        raise DataError(f"{path}: expected an image file, found a folder")
    return _check_image(path, stat.st_size, stat.st_mtime_ns)


@contextlib.contextmanager
def whole_file(path: os.PathLike | str) -> Iterator[BinaryIO]:
    """A context with a binary file to write, which becomes `path` whole or not at all.

    As in `paligemma_med.files`, which isn't imported here; several take their places in the reverse order of the
    `with`: the first one is there last.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException as e:
        temporary.unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno and e.filename is None:  # a write that failed, as on a full disk
            raise OSError(e.errno, e.strerror, os.fspath(path)) from e
        raise


def told(error: Exception, what: os.PathLike | str) -> str:
    """An error as the one sentence that a program ends with; `what` was written or read, if it names no file."""
    if isinstance(error, OSError):
        return f"{error.filename or what}: {error.strerror or error}"
    return str(error)


def write_json(path: os.PathLike | str, content: Any) -> None:
    """Writes readable UTF-8 JSON that ends in a newline, whole or not at all."""
    text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    with whole_file(path) as f:
        f.write(text.encode())
