"""The tensors of a directory of safetensors files, and the header of such a file.

Each tensor is read separately, when needed. The format is that of the library safetensors (its README.md): the length
of a JSON object, the object, the bytes.
"""

import json
import math
import os
import re
import struct
from collections.abc import Iterable
from typing import NamedTuple

import ml_dtypes  # noqa: F401 (numpy knows "bfloat16" once it is imported, and safetensors needs that)
import numpy as np
import safetensors

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, listed
from paligemma_med.checkpoints.hf.config import read_json

TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Tensor(NamedTuple):
    """A tensor in a safetensors file; dtype is None if it isn't a float."""

    path: str
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype | None

    def read(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """The rows from start to stop.

        Raises:
          CheckpointError: they can't be read.
        """
        # Opened again each time: what an open file has read counts as this process' memory.
        try:
            with safetensors.safe_open(self.path, "np") as f:
                if (start, stop) == (0, None):
                    return f.get_tensor(self.name)
                return f.get_slice(self.name)[start:stop]
        except (safetensors.SafetensorError, OSError) as e:
            raise CheckpointError(f"{self.path}: {self.name} can't be read: {e}") from e


def open_all(folder: str) -> list[Tensor]:
    """All tensors of a directory, in one file or in several with an index; or of one file.

    Raises:
      FileNotFoundError: no weights, or one of their files is missing.
      CheckpointError: a file is damaged, or the index and the files have different tensors.
    """
    if os.path.isfile(folder):
        return _open_file(folder)
    names, indexed = _files(folder)
    tensors = [tensor for name in names for tensor in _open_file(os.path.join(folder, name))]
    found = {tensor.name for tensor in tensors}
    if indexed is not None and indexed != found:
        wrong = sorted(indexed ^ found)
        raise CheckpointError(
            f"{folder}: {len(wrong)} tensors are either in the index or in the files, not in both: {listed(wrong)}"
        )
    return tensors


def _files(folder):
    """(names of the files, the tensors that the index lists or None)."""
    single = os.path.join(folder, SINGLE)
    index = os.path.join(folder, INDEX)
    if os.path.isfile(single) or not os.path.isfile(index):
        names = sorted(n for n in os.listdir(folder) if n.endswith(".safetensors"))
        names = [SINGLE] if SINGLE in names else names
        if len(names) != 1:
            found = f"{listed(names)} without {INDEX}" if names else "none"
            raise FileNotFoundError(f"{folder} has no weights: expected {SINGLE}, found {found}")
        return names, None
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise CheckpointError(f"{index} has no weight_map")
    for name, file in where.items():
        # A plain name: an index can't refer to files outside its folder.
        if not isinstance(file, str) or not re.fullmatch(r"[^/\\]+\.safetensors", file):
            raise CheckpointError(f"{index}: {name} is in {file!r}, expected a .safetensors file of this folder")
    return sorted(set(where.values())), set(where)


def _open_file(path):
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing")
    out = []
    try:
        with safetensors.safe_open(path, "np") as f:
            for name in f.keys():  # noqa: SIM118 (f is no mapping)
                tensor = f.get_slice(name)
                kind = TYPES.get(tensor.get_dtype())
                out.append(Tensor(path, name, tuple(tensor.get_shape()), kind and lazy.dtype_of(kind)))
    except (safetensors.SafetensorError, OSError) as e:
        raise CheckpointError(
            f"{path} ({os.path.getsize(path):,} bytes) is not a readable safetensors file; it may "
            f"be cut short or something else (safetensors says: {e})"
        ) from e
    return out


def header(tensors: Iterable[tuple[str, np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file with these (name, dtype, shape): length, then JSON padded to whole words."""
    names = {lazy.dtype_of(v): k for k, v in TYPES.items()}
    # transformers before 5 refuses a file that doesn't say what wrote it.
    out, start = {"__metadata__": {"format": "pt"}}, 0
    for name, dtype, shape in tensors:
        end = start + math.prod(shape) * dtype.itemsize
        out[name] = {"dtype": names[dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(out, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
