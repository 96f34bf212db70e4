"""Weights as a plain Orbax checkpoint, which any JAX program can restore, written and read on the host.

A run's own checkpoints are in `workdir`. Orbax takes a whole tree, and copies it while writing. Here a handler for
arrays that are still in their file reads them one at a time.
"""

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, first_line
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.checkpoints.plain_path import plain_path
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

MARK = "_METADATA"  # a file that every Orbax checkpoint of a tree has
_CHUNK = 2**28  # bytes that Orbax compresses at once, holding several copies of them


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes Lazy leaves like Orbax writes numpy arrays, reading each only when it is written."""

    def __init__(self, dtype=None, progress=None):
        super().__init__(deepcopy_host_arrays=False)
        self.dtype, self.progress = dtype, progress

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values)):
            array = np.asarray(value)
            if self.dtype is not None and lazy.is_float(array.dtype):
                array = array.astype(self.dtype, copy=False)
            for future in await super().serialize([array], [info], [arg]):
                future.result()
            del array
            if self.progress:
                self.progress(value.nbytes)
        return []


def save_orbax(
    folder: os.PathLike | str,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a tree that `ocp.StandardCheckpointer().restore(folder)` restores.

    One leaf is in memory at a time, and the folder appears whole or not at all.

    Args:
      folder: the folder to write.
      params: nested mapping of arrays (numpy, jax or `lazy.Lazy`).
      dtype: floating leaves are cast to this; None keeps each as it is.
      overwrite: replace an existing checkpoint.
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      FileExistsError: `folder` exists.
      CheckpointError: a leaf isn't an array.
    """
    flat = {key: _as_lazy(key, leaf) for key, leaf in flatten_tree(params).items()}
    tree = unflatten_tree(flat)
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, _OneByOne(lazy.dtype_of(dtype), progress)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns if there is none
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), tree)
    with files.whole_folder(os.fspath(folder), replaces=(MARK,) if overwrite else None) as new:
        # Orbax creates its folder itself, by renaming a temporary one next to it.
        inner = os.path.join(plain_path(new), "tree")
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        try:
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(inner, args=ocp.args.PyTreeSave(tree, save_args=chunks))
        except CheckpointError:
            raise
        except Exception as e:  # Orbax and TensorStore raise generic errors
            raise CheckpointError(f"{folder} can't be written (Orbax says: {first_line(e)}); is the disk full?") from e
        if _shapes(flatten_tree(_metadata(inner))) != _shapes(flat):
            raise CheckpointError(f"{folder}: what lies there is not what was written; is the disk sound?")
        for name in os.listdir(inner):
            os.rename(os.path.join(inner, name), os.path.join(new, name))
        os.rmdir(inner)


def _as_lazy(key, leaf):
    if isinstance(leaf, Lazy):
        return leaf
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    dtype = np.dtype(leaf.dtype)
    if not lazy.is_float(dtype) and dtype.kind not in "iubc":
        raise CheckpointError(f"{key}: expected an array of numbers, found dtype {dtype}")
    return Lazy(leaf.shape, dtype, lambda: np.asarray(leaf))


def open_orbax(folder: os.PathLike | str) -> dict[str, Any]:
    """Opens an Orbax checkpoint of a dict of arrays: its tree of `lazy.Lazy`, read one by one.

    Leaves are read into numpy arrays, whatever devices and sharding wrote them.

    Returns:
      The tree below "params" if there is that key, else all of it; dtypes as stored.

    Raises:
      FileNotFoundError: no such folder.
      CheckpointError: it isn't an Orbax checkpoint of arrays, or a leaf is damaged (when it is read).
    """
    folder = os.path.abspath(os.fspath(folder))
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"no checkpoint {folder}")
    flat = {}
    for keys, leaf in _by_keys(_metadata(folder)).items():
        key = "/".join(map(str, keys))
        if getattr(leaf, "shape", None) is None or getattr(leaf, "dtype", None) is None:
            raise CheckpointError(f"{folder}: {key} is not an array")
        flat[key] = Lazy(leaf.shape, leaf.dtype, functools.partial(_read, folder, keys, leaf))
    if any(key.startswith("params/") for key in flat):
        flat = {k[len("params/") :]: v for k, v in flat.items() if k.startswith("params/")}
    return unflatten_tree(flat)


def _metadata(folder):
    """The tree with what Orbax says of each leaf."""
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(plain_path(folder)).item_metadata.tree
    except Exception as e:  # Orbax and TensorStore raise generic errors
        raise _unreadable(folder, e) from e
    if not isinstance(tree, Mapping):
        raise _unreadable(folder, TypeError(f"expected a nested dict of arrays, found {type(tree).__name__}"))
    return tree


def _by_keys(tree, before=()):
    """{keys on the way to it: leaf}. Keys may have slashes: those of Gemma's own checkpoints do."""
    out = {}
    for key, child in tree.items():
        out |= _by_keys(child, (*before, key)) if isinstance(child, Mapping) else {(*before, key): child}
    return out


def _shapes(flat):
    return {key: tuple(leaf.shape) for key, leaf in flat.items()}


def _read(folder, keys, leaf):
    where = f"{folder}: {'/'.join(map(str, keys))}"
    lazy.check_room(where, leaf.shape, leaf.dtype)

    def only(value):
        for key in reversed(keys):
            value = {key: value}
        return value

    args = ocp.args.PyTreeRestore(
        item=only(0),
        restore_args=only(ocp.RestoreArgs(restore_type=np.ndarray)),
        partial_restore=True,
    )
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            out = checkpointer.restore(plain_path(folder), args=args)
    except Exception as e:
        raise _unreadable(where, e) from e
    return _by_keys(out)[keys]


def _unreadable(what, error):
    return CheckpointError(
        f"{what} is not a readable Orbax checkpoint; it may be damaged or something else (Orbax "
        f"says: {type(error).__name__}: {first_line(error)})"
    )
