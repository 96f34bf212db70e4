"""Connectors between the image tower and the language model.

Without a connector the tower's own `head` projects each of its tokens to the language model's width
(big_vision's `img/head`), and image tokens are the tower's tokens. A connector replaces the head, and may
change the number of tokens.

Axis letters: B batch, P tokens of the tower, Q image tokens that the language model reads, D width
of the tower, E of the language model.
"""

import dataclasses
from typing import Protocol

import jax

from paligemma_med.models import leaves, projector, qformer

# How the shares of image tokens that `to_cells` carries back were computed.
RULES = ("raw", "rollout", "relevancy")


class Connector(Protocol):
    """The interface of a kind: a linen module, constructed with E as `width`, the model's `dtype` and `lora`,
    and the keys of config.model.connector except `kind`.

    Attributes:
      leaves: its parameters, without adapters.
      LEAVES: all parameters that a connector of this kind can have.
      READ_TOWER: folders of the kernels whose products read the tower's tokens; all others read what became of them, as
        many as `tokens` says.
    """

    leaves: tuple[leaves.Leaf, ...]
    LEAVES: tuple[leaves.Leaf, ...]
    READ_TOWER: tuple[str, ...]

    def __call__(self, x, *, train=False, capture_attention=False):
        """float[B, P, D] → (float[B, Q, E], dict: with capture_attention, what `to_cells` reads)."""

    @staticmethod
    def tokens(kw: dict, patches: int) -> int:
        """Q for P tokens of the tower; kw as in config.model.connector.

        Raises:
          ValueError: P tokens can't be connected in this way.
        """

    @staticmethod
    def to_cells(kw: dict, shares, out: dict, rule: str) -> jax.Array:
        """Carries shares of the image tokens back to the tower's tokens.

        Args:
          shares: float[…, Q].
          out: the call's dict, for one example.
          rule: one of RULES: how the shares were computed. A connector with attention follows it by the
            same rule: "raw" uses only its last attention, "rollout" halves for residuals, "relevancy"
            adds weighted attention to them.

        Returns:
          float[…, P]. Under "raw" and "rollout" each row keeps its sum, except for shares of learned
          constants.
        """

    @staticmethod
    def slots(kw: dict, patches: int) -> dict[str, tuple[int, ...]]:
        """Shapes of its layers' attention for one example, fused over heads, by the modules that compute it: slots of
        `vlm.perturbations`. Empty for a connector without attention."""

    @staticmethod
    def weighted(slots: dict) -> dict:
        """What `to_cells` reads under "relevancy", from the gradients with respect to the slots."""


# The values of config.model.connector.kind.
KINDS: dict[str, type] = {"projector": projector.Projector, "qformer": qformer.QFormer}


def kind_of(kw) -> type | None:
    """The class of config.model.connector; None for no connector.

    Raises:
      ValueError: an unknown kind.
    """
    if not kw:
        return None
    if not isinstance(kw.get("kind"), str) or kw["kind"] not in KINDS:
        raise ValueError(f"connector.kind is {kw.get('kind')!r}; expected one of {sorted(KINDS)}.")
    return KINDS[kw["kind"]]


def keys(kind: type) -> frozenset[str]:
    """The keys that config.model.connector can have for a kind."""
    return frozenset(f.name for f in dataclasses.fields(kind)) - {"parent", "name", "width", "lora"} | {"kind"}


def tokens(kw, patches: int) -> int:
    """Q, the number of image tokens that the language model reads, for P of the tower."""
    kind = kind_of(kw)
    return patches if kind is None else kind.tokens(kw, patches)


def slots(kw, patches: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a connector's attention for P tokens of the tower; see `Connector`."""
    kind = kind_of(kw)
    return {} if kind is None else kind.slots(kw, patches)


def weighted(kw, gradients: dict) -> dict:
    """`to_cells`' dict for "relevancy"; see `Connector`."""
    kind = kind_of(kw)
    return {} if kind is None else kind.weighted(gradients)


def to_cells(kw, shares, out=None, *, rule="raw") -> jax.Array:
    """Shares of image tokens float[…, Q] → of the tower's tokens float[…, P]; see `Connector`."""
    kind = kind_of(kw)
    return shares if kind is None else kind.to_cells(kw, shares, out or {}, rule)
