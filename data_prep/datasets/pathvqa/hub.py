"""Reads the copy of PathVQA on the Hub (flaviagiammarino/path-vqa): Parquet files that hold question, answer and image.

It names no images: one is known by the digest of its bytes, which stand there once for each of its questions. Files
that a split's names promise (train-00000-of-00007) and that aren't there would be a smaller set under the same name,
so they are an error.
"""

import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from data_prep.builders.questioned import SPLITS
from data_prep.files import DataError
from data_prep.images.store import Store
from paligemma_med.pp import table_forms

NAMES = {"train": "train", "validate": "validation", "test": "test"}  # split -> how its files' names begin
EXPECTED = "data/{train,validation,test}-*.parquet"
_COLUMNS = ("image", "question", "answer")


class Row(NamedTuple):
    """A question: where it stands, its image's name in the store, and what the file says, whatever its type."""

    where: str
    image: str
    question: object
    answer: object


def parquet_files(folder: pathlib.Path, split: str) -> list[pathlib.Path]:
    """A split's files in order, in `folder`/data or in `folder`; none if there are none.

    Raises:
      DataError: files are missing between those that are there, or there are two versions of one.
    """
    named = re.compile(rf"{NAMES[split]}(?:-(\d+)-of-(\d+))?(?:-[0-9a-f]+)?\.parquet")
    for place in (folder / "data", folder):
        files = sorted(place.glob("*.parquet")) if place.is_dir() else []
        if found := [(path, match) for path in files if (match := named.fullmatch(path.name))]:
            numbers = [int(match[1] or 0) for _, match in found]
            total = max(int(match[2] or 1) for _, match in found)
            if numbers != [*range(total)]:
                there = ", ".join(path.name for path, _ in found)
                raise DataError(f"{place}: found {there}; expected {total} files of {split}, one of each number")
            return [path for path, _ in found]
    return []


class Images(Store):
    """Images by the digest of their bytes, read from the Parquet files where they stand first."""

    def __init__(self, root: pathlib.Path):
        super().__init__(root, by_name=False)
        self._places: dict[str, tuple[table_forms.Spooled, list]] = {}

    def add(self, form: table_forms.Spooled, entry: list) -> str:
        """The name of an image: what `form` calls `entry`."""
        digest = entry[0]
        self._places.setdefault(digest, (form, entry))
        return digest

    def names(self) -> Iterator[str]:
        yield from self._places

    def _exists(self, name: str) -> bool:
        return name in self._places

    def _stamp(self, name: str) -> str:
        return name  # another content has another name

    def _read(self, name: str) -> bytes:
        form, entry = self._places[name]
        try:
            return form.image(entry)
        except (OSError, ValueError, LookupError) as e:
            raise DataError(f"{form.source}: image {name}: can't be read ({e})") from None


def rows(path: pathlib.Path, images: Images) -> Iterator[Row]:
    """The questions of a file, their images added to `images`.

    Raises:
      DataError: not Parquet, damaged, without one of the columns image, question, answer; a row without image bytes.
    """
    try:
        form = table_forms.parquet([path], "image")
        if missing := [name for name in _COLUMNS if name not in form.columns]:
            raise DataError(f"{path}: no column {missing[0]!r}, only {', '.join(form.columns)}; expected {_COLUMNS}")
        for number, _, _, record in form.scan():
            where = f"{path} row {number}"
            if isinstance(record, str):
                raise DataError(f"{where}: {record}")
            yield Row(where, images.add(form, _entry(record, where)), record["question"], record["answer"])
    except (OSError, ValueError) as e:
        raise DataError(str(e)) from None


def _entry(record: Mapping, where: str) -> list:
    entry = record.get(table_forms.IMAGE)
    if not entry:
        raise DataError(f"{where}: image has no bytes; expected the image itself in the file")
    return entry


def is_there(folder: pathlib.Path) -> bool:
    """Whether `folder` has files of any split."""
    return any(parquet_files(folder, split) for split in SPLITS)
