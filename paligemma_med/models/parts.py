"""The parts that a model is made of: their interfaces, and their names in configs.

A part is a linen module made by its family, a module of Python. `model.img_model` names the family
of the image tower and `model.llm_model` that of the language model, as in big_vision; `model.img`
and `model.llm` are the part's arguments. A new family is its file in models/, an entry here, and a
table of names in checkpoints/hf for each format that it can be read from. For what can be between the two
see `connector`.
"""

import types
from collections.abc import Mapping
from typing import Any, Protocol

import jax

from paligemma_med.models import connector, decoder, leaves, vit


class Family(Protocol):
    """A module of Python that makes parts of one kind.

    Attributes:
      LEAVES: all parameters that a part of the family can have, in the order of the computation.
      KEYS: the arguments of `Model` that a config may give.
      DEFAULT_VARIANT: the default of `variant`; None for a family without variants.
    """

    LEAVES: tuple[leaves.Leaf, ...]
    KEYS: frozenset[str]
    DEFAULT_VARIANT: str | None

    def Model(self, **kw) -> Any:  # noqa: N802 (a factory, named as in big_vision)
        """The part. It takes what KEYS name, and `dtype`, `attn_impl`, `lora`, `name` and `parent`."""


class Part(Protocol):
    """What every part says about itself, whether bound to parameters or not.

    Attributes:
      leaves: its parameters, a selection of its family's, without adapters.
      depth, num_heads: layers, and attention heads of each.
      remat_policy: what is kept of a layer for the backward pass.
      probs_path: where in the part a layer's attention looks for the perturbation of its probabilities
        (`capture.perturbation`).
    """

    leaves: tuple[leaves.Leaf, ...]
    depth: int
    num_heads: int
    remat_policy: str
    probs_path: str


class Tower(Part, Protocol):
    """An image tower. Its family's `Model` also takes `num_classes`, the width of the tokens.

    Attributes:
      class_tokens: how many tokens stand in front of the patches in its layers, and how many of them it returns in
        front of the patches.
    """

    class_tokens: tuple[int, int]

    def __call__(self, image, *, train=False, capture_attention=False):
        """float[B, height, width, 3] in [-1, 1] → (float[B, tokens, num_classes], out-dict)."""

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of that many pixels."""


class Decoder(Part, Protocol):
    """A language model; `decoder._Model` documents the methods.

    Attributes:
      width: of the embedded sequence that it reads.
      vocab_size: size of its vocabulary.
      attn_impl: "xla" or "cudnn".
    """

    width: int
    vocab_size: int
    attn_impl: str

    def embed_tokens(self, tokens) -> jax.Array:
        """int32[B, T] → float[B, T, width]."""

    def __call__(self, x, mask, *, train=False, capture_attention=False):
        """(float[B, T, width], bool[B, T, T]) → (float[B, T, width], probabilities or None)."""

    def compute_logits(self, pre_logits) -> jax.Array:
        """float[B, T, width] → float32[B, T, vocab_size]."""

    def prefill_cache(self, x, input_mask, attn_mask, *, cache_size, num_samples=1) -> jax.Array:
        """Reads prompts; float32[B, 1, vocab_size] after the last token of each."""

    def extend_cache(self, x) -> jax.Array:
        """float[B·samples, 1, width] → float32[B·samples, 1, vocab_size]."""


# Part → its families' names in configs, the default first.
FAMILIES: dict[str, dict[str, types.ModuleType]] = {
    "img": {"vit": vit},
    "llm": {"proj.paligemma.gemma_bv": decoder},
}


def default_name(part: str) -> str:
    """The family's default name."""
    return next(iter(FAMILIES[part]))


def family(part: str, name: str | None = None) -> Family:
    """The family that a config calls `name`, of the part "img" or "llm".

    Raises:
      ValueError: an unknown name.
    """
    name = default_name(part) if name is None else name
    if not isinstance(name, str) or name not in FAMILIES[part]:
        known = ", ".join(map(repr, FAMILIES[part]))
        raise ValueError(f"model.{part}_model is {name!r}; expected one of {known}.")
    return FAMILIES[part][name]


def leaves_of(model: Mapping | None = None) -> dict[str, leaves.Leaf]:
    """{"img/head/kernel": Leaf, …}: all parameters that a model of these families may have.

    For code that has a config or bare parameters; a model has its own (`vlm.Model.leaves`).

    Args:
      model: config.model; by default PaliGemma's.
    """
    model = model or {}
    tables = {part: family(part, model.get(f"{part}_model")).LEAVES for part in FAMILIES}
    if kind := connector.kind_of(model.get("connector")):
        tables = {"img": tables["img"], "connector": kind.LEAVES, "llm": tables["llm"]}
    return leaves.join(**tables)


def _all_leaves():
    img, llm = ([leaf for family in FAMILIES[part].values() for leaf in family.LEAVES] for part in ("img", "llm"))
    between = [leaf for kind in connector.KINDS.values() for leaf in kind.LEAVES]
    return leaves.join(img=img, connector=between, llm=llm)


# The leaves of all families and connectors, for code that has parameters but no model. A path means the
# same in all of them.
LEAVES = _all_leaves()
