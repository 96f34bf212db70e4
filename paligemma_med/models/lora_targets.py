"""What LoRA can adapt in a model, and the names and shapes of its factors.

Everything follows from the tables of leaves: every kernel with the role "product" can have adapters, one
for each projection that it holds.
"""

from typing import NamedTuple

from paligemma_med.models import parts, regexes
from paligemma_med.models.layers import lora
from paligemma_med.models.layers.quantised import SCALE
from paligemma_med.models.leaves import Leaf, join


class Target(NamedTuple):
    """A projection that can be adapted.

    Attributes:
      param: path of the kernel that holds it.
      part: its name among the kernel's projections; "" if there is only one.
      index: its index on the axis after the layers, or None.
      scope: path of the folder of its factors.
      kernel: axis letters of the projection in one layer.
      inputs: the letters of its input; they come first in A, the others last in B.
      stacked: whether there is an axis of layers in front.
    """

    param: str
    part: str
    index: int | None
    scope: str
    kernel: str
    inputs: str
    stacked: bool

    @property
    def name(self) -> str:
        """The name that rules are matched with, in addition to `param`."""
        return f"{self.param}:{self.part}" if self.part else self.param

    @property
    def outputs(self) -> str:
        """Axis letters of the output."""
        return "".join(c for c in self.kernel if c not in self.inputs)


def targets_of(leaf: Leaf) -> tuple[Target, ...]:
    """The projections in a leaf that can be adapted; none if it isn't a product's kernel."""
    if leaf.role != "product":
        return ()
    several = len(leaf.parts) > 1
    return tuple(
        Target(
            leaf.path,
            part,
            i if several else None,
            f"{leaf.folder}/{part}" if part else leaf.folder,
            leaf.letters,
            leaf.inputs,
            leaf.stacked,
        )
        for i, part in enumerate(leaf.parts or ("",))
    )


# Of all families: see `parts.LEAVES`.
TARGETS = tuple(target for leaf in parts.LEAVES.values() for target in targets_of(leaf))


def _twins():
    for part, families in parts.FAMILIES.items():
        for family in families.values():
            for pair in getattr(family, "ALTERNATIVES", ()):
                tables = (join(**{part: [leaf for leaf in family.LEAVES if leaf.when == when]}) for when in pair)
                either = [[target for leaf in table.values() for target in targets_of(leaf)] for table in tables]
                yield from zip(*either, strict=True)


# Projections that different models keep in different kernels: the target in one and in the other.
TWINS = {a: b for pair in _twins() for a, b in (pair, reversed(pair))}


def resolve(rules, names, leaves: dict[str, Leaf] | None = None) -> dict[Target, lora.Spec]:
    """Which projections of a model are adapted, and how.

    Args:
      rules: config.lora, or the result of `lora.as_rules`.
      names: paths of the model's parameters.
      leaves: the model's table of leaves; by default all families'.

    Returns:
      {Target: Spec}, in the order of the table.

    Raises:
      ValueError: a regex matches nothing that can be adapted.
    """
    rules, names = lora.as_rules(rules), set(names)
    table = parts.LEAVES if leaves is None else leaves
    there = [t for leaf in table.values() if leaf.path in names for t in targets_of(leaf)]
    for regex, _ in rules:
        if not any(regexes.fullmatch(regex, n) for t in there for n in (t.param, t.name)):
            can = ", ".join(dict.fromkeys(t.name for t in there))
            raise ValueError(f"lora: {regex!r} matches nothing that can be adapted; that is: {can}")
    specs = {t: lora.find(rules, t.param, t.part) for t in there}
    return {t: spec for t, spec in specs.items() if spec is not None}


def leaf_by_name(leaves: dict[str, Leaf] | None = None) -> dict[str, Leaf]:
    """{name: Leaf} for everything that a tree of parameters may hold: the leaves of the table (by default
    all families'), their scales if quantised, and the factors of adapters, which have their kernel's
    Leaf."""
    table = parts.LEAVES if leaves is None else leaves
    scales = {path + SCALE: leaf for path, leaf in table.items()}
    factors = {name: leaf for leaf in table.values() for name in factor_names(targets_of(leaf))}
    return {**table, **scales, **factors}


def table_for(names) -> dict[str, Leaf]:
    """All families' leaves, those with these names last. Families have kernels of other names whose adapters have one
    name (`mlp/linear`'s part "down" of Gemma and `mlp/down` of BLOOM): in `leaf_by_name` and the like the last one
    counts, which is then the one that is there."""
    there = {path: leaf for path, leaf in parts.LEAVES.items() if path in names}
    return {**{path: leaf for path, leaf in parts.LEAVES.items() if path not in there}, **there}


def factor_names(targets) -> list[str]:
    """Paths of the factors that adapters on `targets` add, in order."""
    return [f"{t.scope}/{f}" for t in targets for f in lora.FACTORS]


def factor_shapes(target: Target, spec: lora.Spec, kernel_shape) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of (lora_a, lora_b), with layers in front if the kernel has them.

    Args:
      kernel_shape: shape of the whole parameter `target.param`.
    """
    layers = kernel_shape[:1] if target.stacked else ()
    one = kernel_shape[len(layers) + (target.index is not None) :]
    size = dict(zip(target.kernel, one, strict=True))
    a = (*(size[c] for c in target.inputs), spec.rank)
    b = (spec.rank, *(size[c] for c in target.outputs))
    return (*layers, *a), (*layers, *b)
