"""Trees of parameters, their flat form {"img/head/kernel": array}, and tables that describe each leaf.

A part of a model (image tower, connector, language model) describes its own parameters in a table of
`Leaf`s. LoRA targets, quantisation, sharding, FLOPs, randomisation and the names in other formats all
follow from these tables, so that a new part is described in one place.

Axis letters: D width of a part, E width of the language model (where an image enters it), N query
heads, K key/value heads, H width of a head, F width of an MLP, V vocabulary, T positions, Y, X and
C rows, columns and colours (or channels) that a convolution reads, S channels of a stem; a digit is an
axis of that length. L layers, P projections in one kernel and R rank of an adapter are added in front
or at the end if a leaf has them.
"""

import os
from collections.abc import Iterable, Mapping
from typing import NamedTuple

ROLES = ("product", "table", "positions", "patch", "stem", "norm", "bias")


class Leaf(NamedTuple):
    """A parameter, as its part describes it.

    Attributes:
      path: its name within the part: "layers/attn/kv_einsum/w".
      letters: the axes of one projection in one layer.
      inputs: the axes that a matrix product sums over; "" if it is in no product.
      parts: names of the projections that the leaf holds, on a separate axis if there are several. Each
        has its own adapter, in a folder of that name.
      stacked: whether there is an axis of layers in front.
      role: "product" (a kernel, which can be adapted and quantised), "table" (of the vocabulary),
        "positions", "patch" (the kernel that makes tokens of pixels), "stem" (that of a convolution before it, which
        halves both sides of the image), "norm" or "bias".
      when: the attribute of the part's module that must be true for the leaf to exist; "" if it always
        exists.
    """

    path: str
    letters: str
    inputs: str = ""
    parts: tuple[str, ...] = ()
    stacked: bool = False
    role: str = "product"
    when: str = ""

    @property
    def axes(self) -> str:
        """A letter for each axis of the whole parameter."""
        return "L" * self.stacked + "P" * (len(self.parts) > 1) + self.letters

    @property
    def input_axes(self) -> tuple[int, ...]:
        """The inputs' axes, counted from the end, which is the same for one layer and for all."""
        return tuple(i - len(self.letters) for i, c in enumerate(self.letters) if c in self.inputs)

    @property
    def folder(self) -> str:
        """The path of the leaf's module, "" for the part itself."""
        return self.path.rpartition("/")[0]


def of_module(table: Iterable[Leaf], module) -> tuple[Leaf, ...]:
    """The leaves of a family's table that `module`, of that family, has."""
    return tuple(leaf for leaf in table if not leaf.when or getattr(module, leaf.when))


def join(**tables: Iterable[Leaf]) -> dict[str, Leaf]:
    """{"img/head/kernel": Leaf, …} from the parts' tables, img=…, llm=…, in the order of the computation.
    Each Leaf then has its whole path."""
    whole = (leaf._replace(path=f"{part}/{leaf.path}") for part, table in tables.items() for leaf in table)
    return {leaf.path: leaf for leaf in whole}


def stack_of(table: Iterable[Leaf]) -> str:
    """The folder that holds a part's stacked layers, such as "layers"; "" if there are none."""
    folders = [leaf.folder.split("/") for leaf in table if leaf.stacked]
    return "/".join(os.path.commonprefix(folders)) if folders else ""


class TreeError(ValueError):
    """Parameters that can't be read, or that don't fit the model; the message says which and why."""


def flatten_tree(tree: Mapping, *, sep: str = "/") -> dict:
    """Nested mapping -> {"a/b": leaf}. Keys must be strings without `sep`, subtrees non-empty."""
    flat = {}

    def walk(node, path):
        if not isinstance(node, Mapping):
            flat[sep.join(path)] = node
            return
        if not node:
            raise TreeError(f"{sep.join(path) or 'the tree'} is empty: expected arrays in it")
        for key, child in node.items():
            if not isinstance(key, str) or not key or sep in key:
                where = f" under {sep.join(path)}" if path else ""
                raise TreeError(f"key {key!r}{where}: expected a non-empty string without {sep!r}")
            walk(child, (*path, key))

    if not isinstance(tree, Mapping):
        raise TreeError(f"expected a nested dict of arrays, found {type(tree).__name__}")
    walk(tree, ())
    return flat


def unflatten_tree(flat: Mapping, *, sep: str = "/") -> dict:
    """{"a/b": leaf} -> nested dict; a key that is both a leaf and a folder is an error."""
    tree = {}
    folders = {()}
    leaves = set()
    for key, leaf in flat.items():
        *parents, name = parts = tuple(key.split(sep))
        if "" in parts:
            raise TreeError(f"key {key!r} has an empty part between its slashes")
        if {".", ".."} & {*parts} or "\0" in key:  # some forms of checkpoints have a folder for each part
            raise TreeError(f"key {key!r} has a part that is no name")
        node = tree
        for depth, part in enumerate(parents, 1):
            if parts[:depth] in leaves:
                raise TreeError(f"key {key!r}: {sep.join(parts[:depth])!r} is an array too")
            folders.add(parts[:depth])
            node = node.setdefault(part, {})
        if parts in folders or parts in leaves:
            raise TreeError(f"key {key!r} stands for more than one thing")
        leaves.add(parts)
        node[name] = leaf
    return tree
