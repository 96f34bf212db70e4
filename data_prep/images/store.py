"""Images of a release, from its folder or straight from its zip file, which is never unpacked.

Zip files of 20 GB are read member by member: only the list of names is held in memory. Stores can be
sent to other processes, which open the file themselves.
"""

import contextlib
import os
import pathlib
import posixpath
import zipfile
import zlib
from collections.abc import Iterator

from data_prep import files
from data_prep.files import DataError

# A member that claims to be larger isn't a radiograph but a zip bomb.
MAX_BYTES = 1 << 30

__all__ = ["MAX_BYTES", "Store", "open_store"]


def open_store(path: os.PathLike | str, *, by_name: bool = False) -> "Store":
    """Opens a folder of images, or a zip file of them.

    Args:
      path: folder or `.zip`.
      by_name: a name that isn't found as a path is looked up by its last part in all folders, and
        refused if it is in two places. Zip files often have an outer folder that the tables don't
        name.

    Raises:
      DataError: missing, neither folder nor zip, or a broken zip (such as a part of a download).
    """
    path = pathlib.Path(path).expanduser()
    if path.is_dir():
        return _Folder(path, by_name)
    if path.suffix.lower() == ".zip" or (path.is_file() and zipfile.is_zipfile(path)):
        return _Zip(path, by_name)
    raise DataError(f"{path}: found no such folder; expected a folder of images or a .zip of them")


class Store:
    """Names are relative paths with `/` inside the root; Windows separators are accepted.

    Args:
      root: the folder or zip file.
      by_name: see `open_store`.
    """

    def __init__(self, root: pathlib.Path, by_name: bool):
        self.root = root
        self._by_name = by_name
        self._last: dict[str, str | None] | None = None  # last part -> name; None: at two places

    def names(self) -> Iterator[str]:
        """Relative paths of all files, except macOS' metadata files."""
        raise NotImplementedError

    def has(self, name: str) -> bool:
        """Whether `read` would find a file. DataError if `name` leaves the root."""
        return self._find(name) is not None

    def read(self, name: str) -> bytes:
        """The file's bytes. DataError: missing, at two places, an LFS pointer, damaged."""
        found = self._find(name)
        if found is None:
            raise DataError(f"{self.root}: the image {name!r} is missing{self._twice(name)}")
        content = self._read(found)
        if files.is_lfs_pointer(content):
            raise DataError(f"{self._where(found)}: {files.lfs_message('an image')}")
        return content

    def check(self, name: str) -> files.Checked:
        """Decodes the image. DataError: as `read`, or corrupt."""
        return files.check_image_bytes(self.read(name), self._where(self._find(name) or name))

    def stamp(self, name: str) -> str:
        """Changes when the file's content does; cheap. The file must be there."""
        return self._stamp(self._find(name) or name)

    def _exists(self, name: str) -> bool:
        raise NotImplementedError

    def _stamp(self, name: str) -> str:
        raise NotImplementedError

    def _read(self, name: str) -> bytes:
        raise NotImplementedError

    def _where(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _find(self, name: str) -> str | None:
        inside = files.path_inside(pathlib.PurePosixPath("/"), name)  # refuses paths that leave it
        name = str(inside).removeprefix("/")
        if self._exists(name):
            return name
        return self._index().get(posixpath.basename(name)) if self._by_name else None

    def _twice(self, name: str) -> str:
        last = posixpath.basename(name.replace("\\", "/"))
        if not self._by_name or last not in self._index():
            return ""
        return f" there and {last!r} lies in more than one of its folders"

    def _index(self) -> dict[str, str | None]:
        if self._last is None:
            self._last = {}
            for name in self.names():
                last = posixpath.basename(name)
                self._last[last] = None if last in self._last else name
        return self._last


class _Folder(Store):
    def names(self) -> Iterator[str]:
        for folder, folders, names in os.walk(self.root):
            folders.sort()
            relative = pathlib.Path(folder).relative_to(self.root)
            for name in sorted(names):
                if not _litter(full := (relative / name).as_posix()):
                    yield full

    def _exists(self, name: str) -> bool:
        try:
            return (self.root / name).is_file()
        except OSError:  # such as a name longer than the file system allows
            return False

    def _stamp(self, name: str) -> str:
        stat = os.stat(self.root / name)
        return f"{stat.st_mtime_ns}-{stat.st_size}"

    def _read(self, name: str) -> bytes:
        try:
            return (self.root / name).read_bytes()
        except OSError as e:
            raise DataError(f"{self._where(name)}: can't be read ({e.strerror or e})") from None


class _Zip(Store):
    def __init__(self, root: pathlib.Path, by_name: bool):
        super().__init__(root, by_name)
        self._open_in = 0
        self._zip: zipfile.ZipFile | None = None
        self._members: dict[str, str] = {}  # name with "/" -> name in the zip
        self._file()

    def _file(self) -> zipfile.ZipFile:
        # After a fork, parent and child would share the file handle's position.
        if self._zip is None or self._open_in != os.getpid():
            try:
                with open(self.root, "rb") as f:
                    head = f.read(200)
                if files.is_lfs_pointer(head):
                    raise DataError(f"{self.root}: {files.lfs_message('a zip file')}")
                self._zip = zipfile.ZipFile(self.root)
            except OSError as e:
                raise DataError(f"{self.root}: can't be read ({e.strerror or e})") from None
            except (zipfile.BadZipFile, ValueError, NotImplementedError) as e:
                size = os.path.getsize(self.root)
                raise DataError(
                    f"{self.root}: not a whole zip file ({size:,} bytes; {e}); "
                    "expected the released file, completely downloaded"
                ) from None
            self._open_in = os.getpid()
            self._members = {}
            for member in self._zip.namelist():
                name = member.replace("\\", "/").removeprefix("./")
                if not name.endswith("/") and not _litter(name) and _inside(name):
                    self._members.setdefault(name, member)
        return self._zip

    def __getstate__(self):
        return {**self.__dict__, "_zip": None, "_members": {}, "_last": None}

    def names(self) -> Iterator[str]:
        self._file()
        yield from self._members

    def _exists(self, name: str) -> bool:
        self._file()
        return name in self._members

    def _stamp(self, name: str) -> str:
        member = self._file().getinfo(self._members[name])
        return f"{member.CRC:08x}-{member.file_size}"

    def _read(self, name: str) -> bytes:
        zip_file = self._file()
        member = zip_file.getinfo(self._members[name])
        if member.flag_bits & 1:
            raise DataError(f"{self._where(name)}: encrypted; expected a zip file without password")
        if member.file_size > MAX_BYTES:
            raise DataError(
                f"{self._where(name)}: {member.file_size:,} bytes; expected an image of at most {MAX_BYTES:,}"
            )
        try:
            return zip_file.read(member)
        except (OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as e:
            raise DataError(
                f"{self._where(name)}: damaged or not readable in the zip file ({e or type(e).__name__})"
            ) from None


def _litter(name: str) -> bool:
    """Whether this is a file that macOS adds to folders and zip files."""
    parts = name.split("/")
    return "__MACOSX" in parts or parts[-1] == ".DS_Store" or parts[-1].startswith("._")


def _inside(name: str) -> bool:
    with contextlib.suppress(DataError):
        files.path_inside(pathlib.PurePosixPath("/"), name)
        return True
    return False
