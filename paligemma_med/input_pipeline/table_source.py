"""Own tables as data sets: `table:PATH`, a file of questions beside a folder of images, and `hf:FOLDER`, a folder in
the layout of Hugging Face's datasets. Read in any order, as TFDS sets are."""

import functools
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_med.input_pipeline import splits
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.parallel import notes
from paligemma_med.pp import own_rows, own_table

_KEYS = {"name", "split", "images", "columns", "split_seed", "split_shares", "needs", "choose"}
NEEDS = ("image", "question", "answer")


class TableSource:
    """Random access to one split: `len(source)`, `source[i]` -> dict. Picklable.

    Images come as the bytes of the file, all other columns as str. name, split, features (the columns): what was
    opened.
    dropped: [(line, reason)] of the table's rows that can't be used, of all splits.
    """

    def __init__(self, name: str, split: str, table: own_table.OwnTable, rows: np.ndarray):
        self.name, self.split, self.table, self._rows = name, split, table, rows
        self.features = dict.fromkeys(table.columns)
        self.dropped = table.dropped

    def __len__(self) -> int:
        return len(self._rows)

    def about(self) -> dict[str, Any]:
        """What was opened: name, split, examples, digest of the table, and the size of its files."""
        table = self.table
        return dict(
            name=self.name,
            split=self.split,
            examples=len(self),
            bytes=table.bytes,
            digest=self.digest(),
            read=table.read,
        )

    def digest(self) -> str:
        """Of the table and of the rows that are this split."""
        return f"{self.table.digest}-{own_rows.key_of(self._rows.tobytes().hex()):016x}"

    def columns(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows in order with only these keys; no image is read."""
        for i in range(len(self)):
            row = self._read(i, self.table.__getitem__)
            yield {k: row[k] for k in keys}

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self._read(index, self.table.__getitem__)
        return row | {"image": self._read(index, self.table.image_bytes)}

    def _read(self, index, read):
        try:
            return read(int(self._rows[int(index)]))
        except (ValueError, OSError) as e:
            raise InputError(f"{self}, record {index}: {e}") from e

    def __str__(self) -> str:
        return f"data set {self.name} split {self.split}"

    __repr__ = __str__


def open_table_source(data: Mapping[str, Any]) -> TableSource:
    """Opens `dict(name="table:PATH" or "hf:FOLDER", split=…)`; besides: images=FOLDER, columns="image=file,…",
    choose="slice=middle" (of series, see `pp.image_cells`), and for a table without splits split_seed=0 and
    split_shares="80/10/10".

    InputError: an unknown key, a table that can't be read or has no such split; see `pp.own_table.open_table`.
    """
    data = {k: v for k, v in dict(data).items() if v is not None}
    name, split = str(data.get("name")), data.get("split")
    kind, _, path = name.partition(":")
    if unknown := sorted(set(data) - _KEYS):
        raise InputError(f"data set {name}: unknown keys {unknown}; expected some of {sorted(_KEYS)}")
    if not path:
        raise InputError(
            f"data.name={name!r}: names no {'table' if kind == 'table' else 'folder'}; expected {kind}:PATH, which "
            "configs/own_data.py has from its argument train=PATH"
        )
    if not isinstance(split, str):
        raise InputError(f"data.name={name!r}, data.split={split!r}: expected a split's name")
    seed = data.get("split_seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"data.split_seed={seed!r}: expected a whole number")
    columns = data.get("columns")
    columns = tuple(dict(columns).items()) if hasattr(columns, "items") else columns  # of a ConfigDict, too
    for key, value in (("images", data.get("images")), ("columns", columns), ("choose", data.get("choose"))):
        if value is not None and not isinstance(value, str | os.PathLike | tuple):
            raise InputError(f"data.{key}={value!r:.100}: expected a text")
    needs = tuple(data.get("needs", NEEDS))
    path = os.path.abspath(os.path.expanduser(path))
    images = os.path.abspath(os.path.expanduser(data["images"])) if data.get("images") else None
    try:
        table = _opened(kind, path, images, columns, needs, data.get("choose"), _stamp(path))
        names, codes = _splits(table, split, seed, splits.shares_of(data.get("split_shares", splits.SHARES)))
    except InputError:
        raise
    except (ValueError, OSError) as e:
        raise InputError(f"data set {name}: {e}") from None
    return TableSource(name, split, table, splits.select(split, names, codes, f"data set {name}"))


def _stamp(path):
    """What changes when a file or the files of a folder do."""
    files = sorted(p for p in pathlib.Path(path).rglob("*") if _is_table(p)) if os.path.isdir(path) else [path]
    found = [os.stat(p) for p in files if os.path.exists(p)]
    return tuple((str(p), x.st_mtime_ns, x.st_size) for p, x in zip(files, found))


@functools.lru_cache(maxsize=8)  # a run opens the same table for training, for evaluations, and to describe them
def _opened(kind, path, images, columns, needs, choose, stamp):
    columns = dict(columns) if isinstance(columns, tuple) else columns
    if kind == "hf":
        parts = hf_parts(path, images)
        columns = {ours: theirs for theirs, ours in own_rows.names_of(columns).items()}
        if any(os.path.basename(str(part.path)) in _METADATA for part in parts):
            columns.setdefault("image", "file_name")
        table = own_table.OwnTable(path, parts, columns=columns, needs=needs, choose=choose)
    else:
        table = own_table.open_table(path, images=images, columns=columns, needs=needs, choose=choose)
    for line in [*table.summary(), *splits.shared(table)]:
        notes.say(line, file=sys.stderr)
    return table


def _splits(table, split, seed, shares):
    if table.splits or all(re.match(r"\s*all\b", part) for part in split.split("+")):
        return table.splits, table.split_codes
    codes = _drawn(table, seed, shares)
    return splits.NAMES, codes


@functools.lru_cache(maxsize=8)
def _drawn(table, seed, shares):
    codes, said = splits.draw(table, seed, shares)
    notes.say(said, file=sys.stderr)
    return codes


# --- Hugging Face's layout ---

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def _is_table(path):
    return path.suffix == ".parquet" or path.name in _METADATA


def hf_parts(folder: str, images: str | None = None) -> list[own_table.Part]:
    """The tables of a folder as Hugging Face's datasets lay them out.

    Parquet files (train-00000-of-00002.parquet, data/…, or in folders named like splits), which hold their images, or
    else metadata.jsonl, .csv or .parquet beside images, of which `file_name` is the image. A split's name is the
    beginning of a file's name, or a folder's.

    Raises:
      ValueError: no such folder, or none of these in it.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{folder}: no such folder; expected one in the layout of Hugging Face's datasets")
    found = sorted(
        p for p in root.rglob("*") if _is_table(p) and not any(x.startswith(".") for x in p.relative_to(root).parts)
    )
    metadata = [p for p in found if p.name in _METADATA]
    if metadata:
        return [own_table.Part(str(p), images or str(p.parent), _split_of(p.parent.name)) for p in metadata]
    if not found:
        raise ValueError(f"{folder}: neither .parquet files nor {', '.join(_METADATA)} in it")
    groups: dict[str, list[str]] = {}
    for path in found:
        split = _split_of(re.split(r"[-_.]", path.name)[0]) or _split_of(path.parent.name)
        groups.setdefault(split, []).append(str(path))
    return [own_table.Part(paths, images or str(root), split) for split, paths in groups.items()]


def _split_of(name):
    """A split, if a folder or a file is called like one."""
    return own_rows.SPLITS.get(name.lower(), "")
