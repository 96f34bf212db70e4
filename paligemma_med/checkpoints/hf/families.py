"""The families of models that can be read and written, one module each.

A new family is a module with the interface `Family`, and a line in FAMILIES. What it shares with others is in the
modules of the towers and decoders (`siglip`, `gemma`).
"""

import functools
from collections.abc import Collection, Mapping
from typing import Any, Protocol

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import bloom, gemma3, gemma3_text, llama, paligemma, vit
from paligemma_med.checkpoints.hf.config import Described
from paligemma_med.checkpoints.hf.layout import Row, Sizes
from paligemma_med.models import decoder, lora_targets


class Family(Protocol):
    """The interface of a family's module.

    Canonical names of tensors and modules leave out what differs between versions of transformers.

    Attributes:
      MODEL_TYPE: the model_type of its config.json.
      NAME: its usual name.
      EMBEDDING, HEAD: canonical names of the vocabulary table and of the logits' table, which counts as a copy of the
        former unless `table` has a row for it.
      PADDING: how many rows are appended to our table when it is written, as copies of the first.
      BUFFERS: regexes of canonical names that hold nothing learned.
      UNREAD: regexes of those that ours has no place for, though they are learned.
      STYLES: {version of transformers: {first word of canonical names: what that version has instead}}. A family that
        renamed more has a function in_style(canonical name, style), too.
      PUBLISHED: which of STYLES is written.
    """

    MODEL_TYPE: str
    NAME: str
    EMBEDDING: str
    HEAD: str
    PADDING: int
    BUFFERS: tuple[str, ...]
    UNREAD: tuple[str, ...]
    STYLES: Mapping[str, Mapping[str, str]]
    PUBLISHED: str

    def table(self, paths: Collection[str]) -> tuple[Row, ...]:
        """All rows of a model whose leaves have these paths, including rows of leaves that it should have but lacks."""

    def canonical(self, name: str) -> str:
        """The canonical name of a tensor or module."""

    def describe(self, whole: Mapping[str, Any], path: str) -> Described:
        """The model of the config.json at `path`. CheckpointError if ours can't represent it."""

    def make_config(
        self,
        sizes: Sizes,
        paths: Collection[str],
        img: Mapping | None,
        llm: Mapping | None,
        connector: Mapping | None,
    ) -> dict:
        """The config.json of a model, without torch_dtype, which is added later. CheckpointError if theirs can't
        represent it, or a dict contradicts the sizes.

        Args:
          sizes, paths: of our leaves, sizes from `layout.measure`.
          img, llm, connector: our dicts, for what shapes don't determine; None means unknown.
        """

    def make_processor(self, sizes: Sizes) -> dict | None:
        """The preprocessor_config.json of a model: with it their processor makes the pixels that ours makes. None for a
        model that reads no images."""


FAMILIES: dict[str, Family] = {
    family.MODEL_TYPE: family for family in (paligemma, gemma3, gemma3_text, llama, bloom, vit)
}


def of_config(whole: Mapping[str, Any], path: str) -> Family:
    """The family of a config.json. CheckpointError if none here has its model_type."""
    kind = whole.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"{path} has model_type {kind!r}: expected {' or '.join(map(repr, sorted(FAMILIES)))}")
    return FAMILIES[kind]


def of_paths(paths: Collection[str]) -> Family:
    """The family whose table best fits leaves with these paths, for weights without a config; PaliGemma if none has
    any of them."""

    def misfits(family):
        return len({row.path for row in family.table(paths)} ^ {*paths})

    known = [f for f in FAMILIES.values() if {row.path for row in f.table(paths)} & {*paths}]
    return min(known, key=misfits, default=paligemma)


def of_model(paths: Collection[str], llm: Mapping[str, Any] | None = None) -> Family | None:
    """The family that a model with these leaves is written as; None if transformers has no class for the whole of it,
    so that it is written as its parts (`checkpoints.in_parts`).

    Args:
      llm: our dict of the decoder, which tells those apart that have leaves of the same names; or None.
    """
    text = language_model_of(paths, llm)
    parts = {path.partition("/")[0] for path in paths}
    if parts == {"img"} and "img/head/kernel" not in paths:
        return of_parts(paths).get("img") or of_paths(paths)
    if text is None:
        return of_paths(paths)
    if parts == {"llm"}:
        return text
    is_whole = text is gemma3_text and "connector/norm/scale" in paths and "img/cls" not in paths
    return gemma3 if is_whole else None


def of_parts(paths: Collection[str], llm: Mapping[str, Any] | None = None) -> dict[str, Family]:
    """{"llm": family of the decoder by itself, "img": family of the tower}, those that there are of a model with these
    leaves; arguments are those of `of_model`."""
    attention = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0"
    tower = vit if {"img/cls", f"{attention}/key/bias"} <= {*paths} else None
    found = dict(img=tower, llm=language_model_of(paths, llm))
    return {part: family for part, family in found.items() if family is not None}


def language_model_of(paths: Collection[str], llm: Mapping[str, Any] | None = None) -> Family | None:
    """The family of a model's decoder by itself; None: Gemma 1 or 2, which are PaliGemma's."""
    at, llm = "llm/layers/attn", llm or {}
    llm = {**decoder.VARIANTS.get(llm.get("variant"), {}), **llm}
    if f"{at}/qkv/kernel" in paths:
        return bloom
    if f"{at}/q_norm/scale" in paths:
        return gemma3_text
    return llama if "llm/embedder/output_embedding" in paths or llm.get("norm") == "rms" else None


def of_modules(names: Collection[str]) -> Family:
    """The family that knows most of these modules' names, in any version of transformers."""

    def known(family):
        modules = {without_layer(name) for name in modules_of(family).values()}
        return sum(without_layer(family.canonical(name)) in modules for name in names)

    return max(FAMILIES.values(), key=known)


def without_layer(name: str) -> str:
    """A module's name with "{i}" for the number of its layer."""
    return ".".join("{i}" if word.isdigit() else word for word in name.split("."))


@functools.cache
def modules_of(family: Family) -> dict[lora_targets.Target, str]:
    """{target of an adapter: canonical name of the module that holds its weight}; "{i}" stands for the layer.

    Projections that our models keep in one kernel or in several have the same module in both forms. Targets whose
    module also holds other leaves are left out: such a module has one adapter for all of them. So are weights that are
    no module's `weight`, which PEFT can't adapt.
    """
    return {
        target: row.name.removesuffix(".weight")
        for target in lora_targets.TARGETS
        for row in family.table({target.param})  # the table of the form that has this leaf
        if (row.path, row.index) == (target.param, target.index) and row.piece[1] == 1 and row.name.endswith(".weight")
    }


def in_style(family: Family, name: str, style: str) -> str:
    """A canonical name as versions of transformers from `style` on write it."""
    if rename := getattr(family, "in_style", None):  # for those that renamed more than the first word
        return rename(name, style)
    first, dot, rest = name.partition(".")
    return f"{family.STYLES[style].get(first, first)}{dot}{rest}"


def style_of(family: Family, version: str) -> str:
    """The style of a family that a version of transformers has: its newest that isn't newer."""

    def number(style):
        return [int(n) for n in style.split(".")]

    return max((s for s in family.STYLES if number(s) <= number(version)), key=number)
