"""Our leaves from the tensors that a table of rows names: what must be there, and how a leaf is filled when read.

Axis letters as in `models.leaves`. A file that doesn't say into how many heads its kernels are cut gives them with
heads as one axis; `compose.for_model` cuts them as the model has them.
"""

import functools
import re
from collections.abc import Iterable, Mapping

import numpy as np
from absl import logging

from paligemma_med.checkpoints.errors import raise_all
from paligemma_med.checkpoints.hf.layout import Row, Sizes, leaf_shape, relayout, shape
from paligemma_med.checkpoints.hf.tensors import Tensor
from paligemma_med.checkpoints.lazy import Lazy

Found = Mapping[str, Tensor]  # by canonical name
_FEW = 3


def check(found: Found, rows: Iterable[Row], sizes: Sizes, what: str) -> None:
    """Raises one CheckpointError, which begins with `what`, for everything that is missing, unexpected or of another
    shape."""
    expected = {}
    for row in rows:
        for i in layers(row, sizes[row.part]):
            expected[row.name_in(i)] = row.tensor_shape(sizes[row.part])
    problems = []
    for name, wanted in expected.items():
        if name not in found:
            problems.append(f"{name}: missing, expected {wanted}")
        elif found[name].shape != wanted:
            problems.append(f"{name}: expected {wanted}, found {found[name].shape}")
    for name in sorted(found.keys() - expected.keys()):
        problems.append(f"{name}: unexpected, found {found[name].shape}")
    raise_all(problems, what, len(expected))


def layers(row: Row, size: Mapping[str, int]) -> Iterable[int | None]:
    """Our layers that have the row; (None,) for a leaf without layers."""
    return range(size["L"]) if row.leaf.stacked else (None,)


def leaf(rows: list[Row], found: Found, size: Mapping[str, int], *, one_axis: bool = False) -> Lazy:
    """Our leaf, made from the tensors of all its rows in all layers.

    Args:
      rows: of one leaf.
      size: {axis letter: length}.
      one_axis: whether heads stay one axis; `size` then has N = 1.
    """
    ours = rows[0].ours.replace("N H", "(N H)") if one_axis else rows[0].ours
    pieces = []  # (where in our array, tensor, row)
    for row in rows:
        for i in layers(row, size):
            at = tuple(n for n in (i, row.index) if n is not None)
            pieces.append((at, found[row.name_in(i)], row))
    whole = leaf_shape(rows[0].leaf, size)
    whole = (*whole[: len(whole) - len(rows[0].leaf.letters)], *shape(ours, size))
    dtypes = {tensor.dtype for _, tensor, _ in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype("float32")
    return Lazy(whole, dtype, functools.partial(_fill, whole, dtype, pieces, ours, size))


def _fill(whole, dtype, pieces, ours, size):
    out = np.empty(whole, dtype)
    for at, tensor, row in pieces:
        out[at] = relayout(read_piece(tensor, *row.piece), row.theirs, ours, size)
    return out


def read_piece(tensor: Tensor, j: int, n: int) -> np.ndarray:
    """The j-th of n equal pieces of a tensor, cut along its first axis."""
    rows = tensor.shape[0] // n
    return tensor.read() if n == 1 else tensor.read(j * rows, (j + 1) * rows)


def tell_unread(where: str, names: Iterable[str]) -> None:
    """Says which of a file's tensors the model has no place for, once a process."""
    groups = {}
    for name in sorted(names):
        groups.setdefault(re.match(r"[^.]*(?:\.\d+)?", name)[0], []).append(name)
    shown = [x for first, g in groups.items() for x in (g if len(g) <= _FEW else [f"{first}.… ({len(g)} tensors)"])]
    if shown:
        tell(f"{where}: not read, since our models have no place for it: {', '.join(shown)}")


@functools.cache
def tell(message: str) -> None:
    """Says something on stderr, once a process: weights are opened again for each check."""
    logging.warning("%s", message)
