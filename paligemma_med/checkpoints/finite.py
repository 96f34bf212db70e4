"""Weights are finite floats: what files hold is checked as it is read, leaf by leaf.

A file with NaN or Inf, or with integers where weights should be, loads like any other, and the answers of such a model
look like a model's. The check reads what is in memory anyway, in pieces that stay in the processor's cache.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.lazy import BFLOAT16, Lazy
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

_PIECE = 2**16  # numbers
# The bits of the exponent, all set in NaN and Inf alone. numpy's own test of these types is ten times slower.
_EXPONENT = {BFLOAT16: 0x7F80, np.dtype("float16"): 0x7C00}


def check_kind(dtype: Any, where: str) -> None:
    """CheckpointError unless it is a floating type; `where` begins the message, with file and leaf."""
    if not lazy.is_float(np.dtype(dtype)):
        raise CheckpointError(f"{where} has numbers of type {np.dtype(dtype)}; expected weights, which are floats")


def is_finite(array: np.ndarray) -> bool:
    """Whether all numbers of an array of floats are finite, and no larger than float32's."""
    # In the order of memory, so that it is a view unless the array has gaps.
    flat = array.ravel(order="K")
    exponent = _EXPONENT.get(array.dtype)
    if exponent is not None:
        flat = flat.view(np.uint16)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        if exponent is not None:
            good = (piece & np.uint16(exponent)).max() < exponent
        elif array.dtype.itemsize > 4:
            good = (np.abs(piece) <= np.finfo(np.float32).max).all()
        else:
            good = np.isfinite(piece).all()
        if not good:
            return False
    return True


def check(array: np.ndarray, where: str) -> np.ndarray:
    """The array. CheckpointError if it isn't of finite floats; `where` begins the message, with file and leaf."""
    check_kind(array.dtype, where)
    if is_finite(array):
        return array
    with np.errstate(over="ignore"):
        wrong = ~np.isfinite(array.astype(np.float32))
    first = np.unravel_index(int(wrong.argmax()), wrong.shape)
    at = f"[{', '.join(map(str, first))}]" if first else ""
    raise CheckpointError(
        f"{where} has {int(wrong.sum()):,} of {array.size:,} numbers that are NaN or infinite, the first is "
        f"{array[first]}{f' at {at}' if at else ''}; expected finite weights (--allow_nonfinite takes them as they are)"
    )


def cast(array: np.ndarray, dtype: Any, where: str) -> np.ndarray:
    """The array in another type. CheckpointError if numbers that were finite no longer are: float16 ends at 65,504."""
    if np.dtype(dtype) != np.float16 or array.dtype == np.float16:
        return array.astype(dtype, copy=False)
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if not is_finite(out) and is_finite(array):
        most = np.abs(array.astype(np.float32)).max()
        raise CheckpointError(f"{where} has numbers up to {most:g}, which {np.dtype(dtype)} can't hold; use bfloat16")
    return out


def checked(tree: Mapping[str, Any], spec: Any, allow_nonfinite: bool = False) -> dict[str, Any]:
    """A tree of weights whose leaves are checked: types now, numbers when a leaf is read.

    Args:
      tree: nested, of arrays or `lazy.Lazy`.
      spec: where it comes from, for messages.
      allow_nonfinite: don't look at the numbers.

    Raises:
      CheckpointError: a leaf isn't of floats; a leaf that is in memory already, or a Lazy one when it is read, has NaN
        or Inf.
    """
    out = {}
    for key, leaf in flatten_tree(tree).items():
        where = f"{spec}: {key}"
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        check_kind(leaf.dtype, where)
        if allow_nonfinite:
            out[key] = leaf
        elif isinstance(leaf, Lazy):
            out[key] = lazy.derive(leaf, leaf.shape, lambda x, where=where: check(x, where))
        else:
            out[key] = check(np.asarray(leaf), where)
    return unflatten_tree(out)
