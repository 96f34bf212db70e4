"""Arrays that stay in their file until needed, so that only one weight is in memory at a time.

A tree of them can be renamed, fitted to a model and stacked without a byte being read;
`np.asarray(leaf)` reads one, and nothing is kept.
"""

import math
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from paligemma_med.checkpoints.errors import CheckpointError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Lazy:
    """An array of known shape and dtype that `read` fetches.

    Attributes:
      shape: tuple of int.
      dtype: numpy dtype.
      read: function without arguments that returns the array; called each time it is needed.
    """

    def __init__(self, shape: Iterable[int], dtype: Any, read: Callable[[], np.ndarray]):
        self.shape = tuple(int(n) for n in shape)
        self.dtype = np.dtype(dtype)
        self.read = read

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: math.prod(self.shape))
    nbytes = property(lambda self: self.size * self.dtype.itemsize)

    def __array__(self, dtype=None, copy=None):
        if copy is False:
            raise ValueError("an array that is still in its file can't be read without a copy")
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __repr__(self):
        return f"Lazy(shape={self.shape}, dtype={self.dtype})"


def dtype_of(name: Any) -> np.dtype | None:
    """A numpy dtype from its name (including "bfloat16") or anything numpy takes; None stays None."""
    return None if name is None else BFLOAT16 if str(name) == "bfloat16" else np.dtype(name)


def check_room(where: str, shape: Iterable[int], dtype: Any) -> None:
    """Raises CheckpointError for an array that no memory here holds. TensorStore, which would try, ends the process."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise CheckpointError(f"{where} takes {size:,} bytes by what its file says; this machine has {memory:,}")


def is_float(dtype: np.dtype) -> bool:
    """Whether it is a floating type, bfloat16 included."""
    return dtype == BFLOAT16 or dtype.kind == "f"


def derive(leaf: Any, shape: tuple[int, ...], function: Callable[[np.ndarray], np.ndarray], dtype: Any = None) -> Any:
    """function(array): immediately for an array, when read if `leaf` is Lazy.

    Args:
      shape, dtype: of the result; by default dtype is unchanged.
    """
    if not isinstance(leaf, Lazy):
        return function(np.asarray(leaf))
    return Lazy(shape, dtype or leaf.dtype, lambda: function(np.asarray(leaf)))


def stack(leaves: Iterable[Any]) -> Any:
    """Leaves of one shape on a new leading axis: Lazy if one of them is, else an array.

    When read, it is filled leaf by leaf, so that memory holds it and one leaf.
    """
    leaves = list(leaves)
    shape = (len(leaves), *np.shape(leaves[0]))
    dtypes = {np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else None for leaf in leaves}
    if len(dtypes) > 1 or not any(isinstance(leaf, Lazy) for leaf in leaves):
        # Mixed types are rare, and only numpy knows their common type.
        return np.stack([np.asarray(leaf) for leaf in leaves])

    def read():
        out = np.empty(shape, *dtypes)
        for i, leaf in enumerate(leaves):
            out[i] = np.asarray(leaf)
        return out

    return Lazy(shape, *dtypes, read)


def numbers(key: str, leaf: Any) -> np.ndarray:
    """`leaf` as an array; CheckpointError if it isn't one of numbers."""
    array = np.asarray(leaf)
    if array.dtype != BFLOAT16 and array.dtype.kind not in "fiubc":
        raise CheckpointError(
            f"{key}: expected an array of numbers, found {type(leaf).__name__} of dtype {array.dtype}"
        )
    return array


def read_all(tree: Any) -> Any:
    """Nested mapping of arrays and Lazy → nested dict of numpy arrays."""
    if isinstance(tree, Mapping):
        return {key: read_all(child) for key, child in tree.items()}
    return np.asarray(tree)
