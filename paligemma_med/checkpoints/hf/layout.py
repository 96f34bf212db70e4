"""How a Hugging Face tensor becomes (a part of) one of our parameters: names, layouts and sizes.

A family's table is made of `Row`s. Our side of a row is described by the part's own table of leaves (`models.parts`);
a row gives the tensor's name and its layout in their file.

In a layout, letters are axes as in `models.leaves`, and axes in brackets are one axis: PyTorch's linear layers have
"(outputs) (inputs)".
"""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.models import parts
from paligemma_med.models.leaves import Leaf

Sizes = Mapping[str, Mapping[str, int]]  # for each part: {"img": {letter: length}, "llm": …}


class Row(NamedTuple):
    """One kind of tensor.

    Attributes:
      name: its canonical name; "{i}" stands for the layer if our leaf has layers in front.
      theirs: its layout.
      path: our leaf's path.
      projection: which of the leaf's projections the tensor is; "" if the leaf holds only one.
      piece: (j, n): our leaf is the j-th of n equal pieces of the tensor, cut along its first axis; `theirs` is the
        piece's layout.
      numbering: (first, step): our layer i is their layer first + step · i.
    """

    name: str
    theirs: str
    path: str
    projection: str = ""
    piece: tuple[int, int] = (0, 1)
    numbering: tuple[int, int] = (0, 1)

    @property
    def leaf(self) -> Leaf:
        return parts.LEAVES[self.path]

    @property
    def part(self) -> str:
        """The part of the model whose sizes apply: "img", "llm"."""
        return self.path.partition("/")[0]

    @property
    def ours(self) -> str:
        """Our layout of the tensor, in one layer."""
        return " ".join(self.leaf.letters)

    def name_in(self, layer: int | None) -> str:
        """The tensor's canonical name in one of our layers; None for a leaf without layers."""
        first, step = self.numbering
        return self.name if layer is None else self.name.format(i=first + step * layer)

    def tensor_shape(self, size: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        rows, *rest = shape(self.theirs, size)
        return (self.piece[1] * rows, *rest)

    @property
    def index(self) -> int | None:
        """Its index on our axis of projections, or None without such an axis."""
        return self.leaf.parts.index(self.projection) if len(self.leaf.parts) > 1 else None


def linear(name: str, path: str, projection: str = "") -> Row:
    """The row of a linear layer's weight, with outputs in front and each side as one axis."""
    leaf = parts.LEAVES[path]
    outputs = [c for c in leaf.letters if c not in leaf.inputs]
    inputs = [c for c in leaf.letters if c in leaf.inputs]
    return Row(f"{name}.weight", f"({' '.join(outputs)}) ({' '.join(inputs)})", path, projection)


def dense(name: str, folder: str) -> Iterator[Row]:
    """The rows of a linear layer with a bias; ours are <folder>/kernel and <folder>/bias."""
    yield linear(name, f"{folder}/kernel")
    yield Row(f"{name}.bias", f"({' '.join(parts.LEAVES[f'{folder}/bias'].letters)})", f"{folder}/bias")


def norm(name: str, folder: str, *, bias: bool) -> Iterator[Row]:
    """The rows of a norm; ours are <folder>/scale and, for a LayerNorm, <folder>/bias."""
    yield Row(f"{name}.weight", "D", f"{folder}/scale")
    if bias:
        yield Row(f"{name}.bias", "D", f"{folder}/bias")


def by_path(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """{path of our leaf: its rows}."""
    out = {}
    for row in rows:
        out.setdefault(row.path, []).append(row)
    return out


# --- layouts -----------------------------------------------------------------------------------


def _axes(layout):
    """ "(N H) D" → [["N", "H"], ["D"]]."""
    return [re.findall(r"\w", group) for group in re.findall(r"\([^)]*\)|\w", layout)]


def _length(letter, size):
    return int(letter) if letter.isdigit() else size[letter]


def shape(layout: str, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of an array in a layout whose axes have the lengths `size`; a digit is its own length."""
    return tuple(math.prod(_length(c, size) for c in group) for group in _axes(layout))


def relayout(x: np.ndarray, old: str, new: str, size: Mapping[str, int]) -> np.ndarray:
    """Array in layout `old` → the same in layout `new`; a view if numpy can make one.

    Args:
      size: {axis letter: length}. Axes of length 1, written as the digit, may be in only one of the layouts.
    """
    before, after = ([c for c in itertools.chain(*_axes(layout)) if not c.isdigit()] for layout in (old, new))
    x = x.reshape([size[c] for c in before]).transpose([before.index(c) for c in after])
    return x.reshape(shape(new, size))


def leaf_shape(leaf: Leaf, size: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of our whole parameter."""
    layers = (size["L"],) if leaf.stacked else ()
    several = (len(leaf.parts),) if len(leaf.parts) > 1 else ()
    return (*layers, *several, *shape(leaf.letters, size))


def measure(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, dict[str, int]]:
    """`Sizes` of the model whose parameters have these shapes, {path: shape}.

    Raises:
      CheckpointError: a leaf has the wrong number of axes, or another length for a letter than an earlier leaf of its
        part.
    """
    sizes = {}
    for path, found in shapes.items():
        leaf, size = parts.LEAVES[path], sizes.setdefault(path.partition("/")[0], {})
        axes = ["L"] * leaf.stacked + [str(len(leaf.parts))] * (len(leaf.parts) > 1) + list(leaf.letters)
        # A letter is kept if any length is possible.
        expected = [int(c) if c.isdigit() else size.get(c, c) for c in axes]
        if len(found) != len(axes) or any(e not in (n, c) for e, n, c in zip(expected, found, axes)):
            raise CheckpointError(f"{path}: found shape {found}, expected ({', '.join(map(str, expected))})")
        size.update((c, n) for c, n in zip(axes, found) if not c.isdigit())
    return sizes
