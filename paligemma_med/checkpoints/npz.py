"""big_vision's `.npz` weights files: reading and writing them.

A file holds one array per leaf under a flat key such as `params/img/head/kernel`. Released files
have the `params/` prefix, others don't; both are read. numpy has no bfloat16, so such leaves are 2-byte
void (`V2`) in the file and get their type back here. Nothing in a file is ever unpickled.

Arrays are numpy's in host memory, or `lazy.Lazy` ones that stay in their file; no function here touches a
device. `fit` fits them to a model.
"""

import os
import re
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, first_line, listed
from paligemma_med.checkpoints.lazy import BFLOAT16, Lazy
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

_VOID2 = np.dtype("V2")
_PREFIX = "params/"
_PIECE = 2**24  # bytes to cast and write at once


# --- reading -----------------------------------------------------------------------------------


def split_spec(spec: str) -> tuple[str, str | None]:
    """Splits "x.npz:img" into ("x.npz", "img"), and "x.npz" into ("x.npz", None).

    Only a colon directly after `.npz` splits, so drive letters and URLs keep theirs. A string without
    `.npz` is a whole path.
    """
    match = re.fullmatch(r"(.*\.npz)(?::(.*))?", spec, flags=re.DOTALL | re.IGNORECASE)
    if not match:
        return spec, None
    path, subtree = match.groups()
    if subtree is not None and not subtree.strip("/"):
        raise CheckpointError(f"{spec!r}: expected a subtree such as 'img' after the colon")
    return path, subtree


def load_npz(path: os.PathLike | str, subtree: str | None = None) -> dict[str, Any]:
    """Reads a big_vision weights file into a nested dict of numpy arrays; otherwise like `open_npz`."""
    return lazy.read_all(open_npz(path, subtree))


def open_npz(path: os.PathLike | str, subtree: str | None = None) -> dict[str, Any]:
    """Opens a big_vision weights file: a nested dict of `lazy.Lazy`, read one by one.

    Args:
      path: the file, or "file.npz:subtree".
      subtree: only this part ("img", "llm/layers").

    Returns:
      The tree below `params/` if the file has that prefix (other top-level entries, such as optimizer
      state, are then ignored), else all of it; floats keep their dtype, in native byte order.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: not an npz file, a damaged or pickled entry, or no such subtree. Damage
        within an entry shows when it is read.
    """
    path = os.fspath(path)
    if subtree is None:
        path, subtree = split_spec(path)
    with _open_archive(path) as archive:
        keys = list(archive.files)
        if not keys:
            raise CheckpointError(f"{path} holds no arrays")
        if len(set(keys)) < len(keys):
            twice = sorted({k for k in keys if keys.count(k) > 1})
            raise CheckpointError(f"{path} holds these keys twice: {listed(twice)}")
        prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
        names = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
        if subtree is not None:
            names = _select(names, subtree.strip("/"), path)
        flat = {name: _open_array(archive, key, path) for name, key in names.items()}
    try:
        return unflatten_tree(flat)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _open_archive(path: str):
    if not os.path.isfile(path):
        hint = ": expected a local file" if "://" in path else ""
        raise FileNotFoundError(f"no weights file {path}{hint}")
    try:
        archive = np.load(path, allow_pickle=False)
    except Exception as e:  # many types, depending on the first bytes, all with one meaning
        size = os.path.getsize(path)
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable .npz file; it may be cut short or "
            f"something else (numpy says: {type(e).__name__}: {first_line(e)})"
        ) from e
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CheckpointError(f"{path} holds a single array: expected an .npz file of many")
    return archive


def _select(names: dict, subtree: str, path: str) -> dict:
    inside = {n[len(subtree) + 1 :]: k for n, k in names.items() if n.startswith(subtree + "/")}
    if inside:
        return inside
    if subtree in names:
        raise CheckpointError(f"{path}:{subtree} is a single array: expected a folder of arrays")
    top = sorted({n.split("/")[0] for n in names})
    raise CheckpointError(f"{path} has no subtree {subtree!r}: found {listed(top)}")


def _open_array(archive, key: str, path: str) -> Lazy:
    """Opens an array by reading only its entry's header."""
    try:
        shape, dtype = _read_header(archive, key)
    except Exception as e:  # zlib, zipfile, header parsing, ...
        raise _unreadable(path, key, e) from e
    if dtype is None:
        raise CheckpointError(f"{path}: entry {key!r} is not an array")
    if dtype.hasobject:
        raise _unreadable(path, key, ValueError("it holds Python objects"))
    if dtype != _VOID2 and dtype.kind not in "fiubc":
        raise CheckpointError(f"{path}: entry {key!r} has dtype {dtype}: expected numbers, or bfloat16 as V2")
    dtype = BFLOAT16 if dtype == _VOID2 else dtype.newbyteorder("=")
    return Lazy(shape, dtype, lambda: _read_array(path, key, shape, dtype))


def _read_header(archive, key: str):
    names = set(archive.zip.namelist())
    with archive.zip.open(f"{key}.npy" if f"{key}.npy" in names else key) as f:
        if f.peek(len(np.lib.format.MAGIC_PREFIX))[:6] != np.lib.format.MAGIC_PREFIX:
            return None, None
        # Version 3 only differs from 2 in field names, which arrays of numbers don't have.
        first = np.lib.format.read_magic(f) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(f)
    return shape, dtype


def _read_array(path: str, key: str, shape, dtype) -> np.ndarray:
    # Opened again each time: an open handle would have to be shared and closed by someone.
    with _open_archive(path) as archive:
        try:
            array = archive[key]
        except Exception as e:
            raise _unreadable(path, key, e) from e
    if dtype == BFLOAT16 and array.dtype == _VOID2:
        array = array.view(BFLOAT16)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.shape != shape or array.dtype != dtype:
        raise CheckpointError(f"{path}: entry {key!r} changed while the file was in use")
    return array


def _unreadable(path: str, key: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: entry {key!r} can't be read; it may be damaged or hold a pickled object, which "
        f"is never loaded (numpy says: {type(error).__name__}: {first_line(error)})"
    )


# --- writing -----------------------------------------------------------------------------------


def save_npz(
    path: os.PathLike | str,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    prefix: str = _PREFIX,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a tree as a big_vision weights file, one leaf in memory at a time.

    The file appears whole or not at all: it is written next to `path` under another name, flushed to disk
    and moved into place. Equal trees give equal bytes.

    Args:
      path: the file to write; must end in `.npz`. Missing folders are created.
      params: nested mapping of arrays (numpy, jax, `lazy.Lazy`, or anything `np.asarray` takes).
      dtype: floating leaves are cast to this ("bfloat16", "float16", "float32", ...); None keeps
        each as it is. Integers and booleans stay.
      prefix: put before each key; "" writes bare keys.
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      CheckpointError: a leaf is not an array of numbers, or a key can't be written.
    """
    path = os.fspath(path)
    if not path.lower().endswith(".npz"):
        raise CheckpointError(f"{path}: expected a file name that ends in .npz")
    dtype = lazy.dtype_of(dtype)
    flat = flatten_tree(params)
    files.sweep(path)
    with (
        files.whole_file(path) as f,
        zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for key in sorted(flat):
            # A separate ZipInfo has a fixed date, which a default entry wouldn't have.
            entry = zipfile.ZipInfo(f"{prefix}{key}.npy")
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as out:
                _write_array(out, lazy.numbers(key, flat[key]), dtype, progress)


def _write_array(out, array: np.ndarray, dtype, progress) -> None:
    """Like np.lib.format.write_array, but always in C order and cast piece by piece."""
    if dtype is None or not lazy.is_float(array.dtype):
        dtype = array.dtype
    # numpy itself describes bfloat16 as void.
    header = dict(
        descr=np.lib.format.dtype_to_descr(dtype),
        fortran_order=False,
        shape=array.shape,
    )
    np.lib.format.write_array_header_1_0(out, header)
    flat = array.reshape(-1)
    step = max(1, _PIECE // array.dtype.itemsize)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        out.write(piece.astype(dtype, copy=False).tobytes())
        if progress:
            progress(piece.nbytes)
