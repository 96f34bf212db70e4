"""The families of models that can be read and written, one module each.

A new one is its module, with what `Family` says, and a line in FAMILIES. What it shares with others stands in the
modules of the towers and decoders (`siglip`, `gemma`).
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import paligemma
from paligemma_med.checkpoints.hf.config import Described
from paligemma_med.checkpoints.hf.layout import Row, Sizes
from paligemma_med.models import lora_targets


class Family(Protocol):
    """What the module of a family must have.

    Canonical names are those of tensors and modules without what versions of transformers differ in.

    Attributes:
      MODEL_TYPE: the model_type of its config.json.
      NAME: what people call it.
      EMBEDDING, HEAD: canonical names of the table of the vocabulary, and of that of the logits, which is taken for a
        copy of it unless the table has a row for it.
      PADDING: how many rows are put behind our table when it is written, as copies of the first.
      BUFFERS: regexes of canonical names that hold nothing learnt.
      STYLES: {version of transformers: {first word of canonical names: what the version has in its place}}.
      PUBLISHED: the one of STYLES that is written.
    """

    MODEL_TYPE: str
    NAME: str
    EMBEDDING: str
    HEAD: str
    PADDING: int
    BUFFERS: tuple[str, ...]
    STYLES: Mapping[str, Mapping[str, str]]
    PUBLISHED: str

    def table(self, paths: Collection[str]) -> tuple[Row, ...]:
        """All rows of a model whose leaves have these paths; rows of leaves that it should have and hasn't, too."""

    def canonical(self, name: str) -> str:
        """The canonical name of a tensor or module."""

    def describe(self, whole: Mapping[str, Any], path: str) -> Described:
        """The model of a config.json, which stands at `path`. CheckpointError where ours can't be it."""

    def make_config(self, sizes: Sizes, paths: Collection[str], img: Mapping | None, llm: Mapping | None) -> dict:
        """The config.json of a model; its torch_dtype is put in later. CheckpointError where theirs can't be it.

        Args:
          sizes, paths: of our leaves.
          img, llm: our dicts, which say what shapes don't; None is unknown.
        """


FAMILIES: dict[str, Family] = {family.MODEL_TYPE: family for family in (paligemma,)}


def of_config(whole: Mapping[str, Any], path: str) -> Family:
    """The family of a config.json. CheckpointError if none here has its model_type."""
    kind = whole.get("model_type")
    if kind not in FAMILIES:
        raise CheckpointError(f"{path} has model_type {kind!r}: expected {' or '.join(map(repr, FAMILIES))}")
    return FAMILIES[kind]


def of_paths(paths: Collection[str]) -> Family:
    """The family whose table fits leaves with these paths best, for what has no config."""

    def misfits(family):
        return len({row.path for row in family.table(paths)} ^ {*paths})

    return min(FAMILIES.values(), key=misfits)


def of_modules(names: Collection[str]) -> Family:
    """The family that knows most of these names of modules, of any version of transformers."""

    def known(family):
        modules = {without_layer(name) for name in modules_of(family).values()}
        return sum(without_layer(family.canonical(name)) in modules for name in names)

    return max(FAMILIES.values(), key=known)


def without_layer(name: str) -> str:
    """A module's name with "{i}" in place of the number of its layer."""
    return ".".join("{i}" if word.isdigit() else word for word in name.split("."))


@functools.cache
def modules_of(family: Family) -> dict[lora_targets.Target, str]:
    """{what can be adapted: canonical name of the module that holds its weight}; "{i}" stands for the layer.

    Projections that our models keep in one kernel or in several have the same module in either form. Those whose module
    holds other leaves as well have none: it has one adapter for all of them.
    """
    return {
        target: row.name.removesuffix(".weight")
        for target in lora_targets.TARGETS
        for row in family.table({target.param})  # of the form that this leaf, being there, calls for
        if (row.path, row.index) == (target.param, target.index) and row.piece[1] == 1
    }


def in_style(family: Family, name: str, style: str) -> str:
    """A canonical name as the versions of transformers from `style` on have it."""
    first, dot, rest = name.partition(".")
    return f"{family.STYLES[style].get(first, first)}{dot}{rest}"
