"""Decodes each image of a store once, even if a build is killed and restarted.

Decoding 150,000 figures takes minutes. Results are appended to a file immediately, so that the next
build, or the next config of this one, continues from there.
"""

import hashlib
import os
import pathlib

from data_prep.files import DataError
from data_prep.images.store import Store


class CheckedImages:
    """Digests of a store's images.

    Args:
      store: where the images are.
      cache_dir: folder for the file of results; None: nothing is saved.
    """

    def __init__(self, store: Store, cache_dir: pathlib.Path | None):
        self._store = store
        self._found: dict[str, tuple[str, bytes | str]] = {}  # name -> stamp, digest or error
        self._file = None
        if cache_dir is not None:
            cache_dir.mkdir(parents=True, exist_ok=True)
            root = os.fspath(store.root.resolve())
            path = cache_dir / f"{hashlib.sha256(root.encode()).hexdigest()[:16]}.tsv"
            self._load(path)
            self._file = open(path, "a", encoding="utf-8", newline="\n")

    def __len__(self) -> int:
        return len(self._found)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def check(self, name: str) -> bytes:
        """Returns 16 bytes that identify the content. DataError: as `Store.check`."""
        stamp = self._store.stamp(name)
        found = self._found.get(name)
        if found is None or found[0] != stamp:
            try:
                found = stamp, bytes.fromhex(self._store.check(name))[:16]
            except DataError as e:
                found = stamp, str(e)
            self._found[name] = found
            self._note(name, *found)
        if isinstance(found[1], str):
            raise DataError(found[1])
        return found[1]

    def _note(self, name: str, stamp: str, found: bytes | str) -> None:
        if self._file is None:
            return
        good = isinstance(found, bytes)
        fields = [name, stamp, "ok" if good else "bad", found.hex() if good else found]
        if not any(c in field for field in fields for c in "\t\r\n"):
            self._file.write("\t".join(fields) + "\n")
            self._file.flush()

    def _load(self, path: pathlib.Path) -> None:
        if not path.is_file():
            return
        content = path.read_text(encoding="utf-8", errors="replace")
        whole = content.rpartition("\n")[0]  # a killed build may leave half a line
        path.write_text(whole and whole + "\n", encoding="utf-8")
        for line in whole.split("\n"):
            fields = line.split("\t")
            if len(fields) == 4 and fields[2] == "bad":
                self._found[fields[0]] = fields[1], fields[3]
            elif len(fields) == 4 and fields[2] == "ok" and len(fields[3]) == 32:
                self._found[fields[0]] = fields[1], bytes.fromhex(fields[3])
