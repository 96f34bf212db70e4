"""Decodes each image of a store once, even if a build is killed and restarted.

Decoding 150,000 figures takes minutes. Results are appended to a file immediately, so that the next
build, or the next config of this one, continues from there.
"""

import hashlib
import os
import pathlib
import re
from typing import NamedTuple

from data_prep.files import DataError
from data_prep.images.store import Store

# Counted up whenever the reader comes to read a file otherwise, or refuse another: old results are forgotten.
_READER = 2


class _Found(NamedTuple):
    """stamp: of the file, see `Store.stamp`; digest: of a good image; error: of a bad one, else ""."""

    stamp: str
    digest: bytes
    error: str
    notes: tuple[str, ...]


class CheckedImages:
    """Digests of a store's images.

    Args:
      store: where the images are.
      cache_dir: folder for the file of results; None: nothing is saved.
    """

    def __init__(self, store: Store, cache_dir: pathlib.Path | None):
        self._store = store
        self._found: dict[str, _Found] = {}
        self._file = None
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            key = f"{_READER} {os.fspath(store.root.resolve())}"
            path = cache_dir / f"{hashlib.sha256(os.fsencode(key)).hexdigest()[:16]}.tsv"
            self._load(path)
            self._file = open(path, "a", encoding="utf-8", errors="surrogateescape", newline="\n")

    def __len__(self) -> int:
        return len(self._found)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def check(self, name: str) -> bytes:
        """Returns 16 bytes that identify the content. DataError: as `Store.check`."""
        stamp = self._store.stamp(name)
        found = self._found.get(name)
        if found is None or found.stamp != stamp:
            try:
                digest, notes = self._store.check(name)
                found = _Found(stamp, bytes.fromhex(digest)[:16], "", notes)
            except DataError as e:
                found = _Found(stamp, b"", str(e), ())
            self._found[name] = found
            self._note(name, found)
        if found.error:
            raise DataError(found.error)
        return found.digest

    def notes(self, name: str) -> tuple[str, ...]:
        """What the reader assumed or found odd in an image that was checked."""
        return self._found[name].notes

    def _note(self, name: str, found: _Found) -> None:
        if self._file is None:
            return
        fields = [name, found.stamp, found.digest.hex(), found.error, *found.notes]
        if not any(c in field for field in fields for c in "\t\r\n"):
            self._file.write("\t".join(fields) + "\n")
            self._file.flush()

    def _load(self, path: pathlib.Path) -> None:
        if not path.is_file():
            return
        content = path.read_text(encoding="utf-8", errors="surrogateescape")
        whole = content.rpartition("\n")[0]  # a killed build may leave half a line
        path.write_text(whole and whole + "\n", encoding="utf-8", errors="surrogateescape")
        for line in whole.split("\n"):
            name, *rest = line.split("\t")
            if len(rest) >= 3 and (rest[2] or re.fullmatch("[0-9a-f]{32}", rest[1])):
                self._found[name] = _Found(rest[0], bytes.fromhex(rest[1]), rest[2], tuple(rest[3:]))
