"""big_vision's own reader of JSON lines, `data = dict(name="bv:jsonl", fname=…, fopen_keys={"image": ROOT}, …)`.

A row is its line's object as it stands, "id" added: the number of the row, as big_vision gives it. Nothing is made up
and no row is left out. Source: big_vision, datasets/jsonl.py, whose arguments these are.
"""

import array
import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.pp import json_text, table_forms

_KEYS = {"name", "fname", "fopen_keys", "download_keys", "start", "stop"}
_REMOTE = re.compile(r"\w+://")


class JsonlSource:
    """Random access to a file of JSON lines: `len(source)`, `source[i]` -> dict. Picklable.

    Files that a row names come as their bytes, the rest as JSON has it. name, split, features (the first row's keys).
    """

    def __init__(self, fname: str, folders: Mapping[str, str], start: int, stop: float):
        self.name, self.split = f"bv:jsonl {fname}", f"[{start}:{'' if stop == float('inf') else stop}]"
        self._folders, self._fname = dict(folders), fname
        self._form = table_forms.JsonLines(fname)
        begins, sizes = array.array("q"), array.array("I")
        # Blank lines are rows to big_vision, and an error there; here they are none.
        for i, (line, begin, size, record) in enumerate(self._form.scan()):
            if start <= i < stop:
                if isinstance(record, str):
                    raise InputError(f"{fname} line {line}: {record}")
                begins.append(begin)
                sizes.append(size)
        self._begins, self._sizes = np.array(begins), np.array(sizes)
        if not len(self):
            raise InputError(f"{fname}: there are no rows from {start} on; expected an object a line")
        first = self._record(0)
        self.features = dict.fromkeys(["id", *first])
        if missing := [k for k in self._folders if k not in first]:
            raise InputError(
                f"{fname}: its first row has no {missing[0]!r}, which fopen_keys names; found {sorted(first)}"
            )
        with open(fname, "rb") as f:
            self._digest = hashlib.file_digest(f, "sha256").hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._begins)

    def about(self) -> dict[str, Any]:
        """What was opened: name, split, examples, digest of the file, and its size."""
        return dict(
            name=self.name,
            split=self.split,
            examples=len(self),
            bytes=os.path.getsize(self._fname),
            digest=self._digest,
        )

    def digest(self) -> str:
        """Of the file."""
        return self._digest

    def columns(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The rows in order with only these keys; names of files, not what is in them."""
        for i in range(len(self)):
            row = {"id": str(i), **self._record(i)}
            if missing := [k for k in keys if k not in row]:
                raise InputError(f"{self}, record {i}: has no {missing[0]!r}, found {sorted(row)}")
            yield {k: row[k] for k in keys}

    def _record(self, index):
        try:
            return self._form.at(int(self._begins[index]), int(self._sizes[index]))
        except ValueError as e:
            raise InputError(f"{self}, record {index}: {e}") from e

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = {"id": str(index), **self._record(int(index))}
        for key, folder in self._folders.items():
            name = row.get(key)
            if not isinstance(name, str) or not name or _REMOTE.match(name):
                shown = json_text.shown(name)
                raise InputError(
                    f"{self}, record {index}: {key} is {shown}; expected the name of a file on this machine"
                )
            path = os.path.join(folder, name)  # the user's own file: big_vision's names may be whole paths
            try:
                with open(path, "rb") as f:
                    row[key] = f.read()
            except (OSError, ValueError) as e:
                raise InputError(f"{self}, record {index}: {key} {path!r:.300}: {getattr(e, 'strerror', e)}") from e
        return row

    def __str__(self) -> str:
        return f"data set {self.name}{self.split}"

    __repr__ = __str__


def open_jsonl(data: Mapping[str, Any]) -> JsonlSource:
    """Opens `dict(name="bv:jsonl", fname, fopen_keys, download_keys, start, stop)`.

    fopen_keys: keys whose text is the path of a file, or {key: folder in front}. start, stop: rows, as in a slice.

    InputError: an unknown key, what would be downloaded, a line that is no object, a file that isn't there.
    """
    data = dict(data)
    if unknown := sorted(set(data) - _KEYS):
        raise InputError(f"data set bv:jsonl: unknown keys {unknown}; expected some of {sorted(_KEYS)}")
    fname, folders = data.get("fname"), data.get("fopen_keys") or {}
    if not isinstance(fname, str) or not fname:
        raise InputError(f"data set bv:jsonl: fname={fname!r}; expected the path of a .jsonl file")
    if data.get("download_keys"):
        raise InputError(
            f"data set bv:jsonl: download_keys={list(data['download_keys'])} would fetch files, and nothing is "
            "downloaded here: fetch them once, and name the files in fopen_keys"
        )
    folders = dict(folders) if hasattr(folders, "items") else {k: "" for k in folders}  # a ConfigDict is no Mapping
    for path in (fname, *folders.values()):
        if _REMOTE.match(str(path)):
            raise InputError(f"data set bv:jsonl: {path} is not on this machine; copy it here, nothing is downloaded")
    start, stop = data.get("start") or 0, data.get("stop") or float("inf")
    if not isinstance(start, int) or not isinstance(stop, int | float) or start < 0 or stop < 0:
        raise InputError(f"data set bv:jsonl: start={start!r}, stop={stop!r}; expected numbers of rows")
    folders = {k: os.path.expanduser(v) for k, v in folders.items()}
    try:
        return JsonlSource(os.path.expanduser(fname), folders, start, stop)
    except InputError:
        raise
    except (ValueError, OSError) as e:
        raise InputError(f"data set bv:jsonl: {e}") from None
