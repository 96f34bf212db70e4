"""What may stand between the image tower and the language model.

Without a connector the tower's own `head` projects each of its tokens to the language model's width
(big_vision's `img/head`), and image tokens are the tower's tokens. A connector takes the head's
place, and may give another number of tokens.

Axis letters: B batch, P tokens of the tower, Q image tokens that the language model reads, D width
of the tower, E of the language model.
"""

from typing import Protocol

from paligemma_med.models import leaves

# Where shares of the image tokens come from, for `to_cells`.
RULES = ("raw", "rollout", "relevancy")


class Connector(Protocol):
    """What a kind must be: a linen module, made with E as `width`, the model's `dtype` and `lora`,
    and the keys of config.model.connector but `kind`.

    Attributes:
      leaves: the parameters that it has, without adapters.
      LEAVES: all that one of its kind can have.
    """

    leaves: tuple[leaves.Leaf, ...]
    LEAVES: tuple[leaves.Leaf, ...]

    def __call__(self, x, *, train=False, capture_attention=False):
        """float[B, P, D] → (float[B, Q, E], dict: with capture_attention, what `to_cells` reads)."""

    @staticmethod
    def tokens(kw: dict, patches: int) -> int:
        """Q for P tokens of the tower; kw as in config.model.connector.

        Raises:
          ValueError: where P tokens can't be connected so.
        """

    @staticmethod
    def to_cells(kw: dict, shares, out: dict, rule: str):
        """Carries shares of the image tokens back to the tower's tokens.

        Args:
          shares: float[…, Q].
          out: what the call gave, of one example.
          rule: one of RULES: how the shares came about. Where a connector has attention of its own,
            it is followed by the same rule: "raw" by its last attention alone, "rollout" with
            halves for residuals, "relevancy" with weighted attention added to them.

        Returns:
          float[…, P]. Under "raw" and "rollout" each row keeps its sum, but for what is left on
          learned constants.
        """


# Names that config.model.connector.kind may have.
KINDS: dict[str, type] = {}


def kind_of(kw) -> type | None:
    """The class of config.model.connector; None for no connector.

    Raises:
      ValueError: no such kind.
    """
    if not kw:
        return None
    if kw.get("kind") not in KINDS:
        raise ValueError(f"connector.kind is {kw.get('kind')!r}; expected one of {sorted(KINDS)}.")
    return KINDS[kw["kind"]]


def tokens(kw, patches: int) -> int:
    """Q, image tokens that the language model reads, for P of the tower."""
    kind = kind_of(kw)
    return patches if kind is None else kind.tokens(kw, patches)


def to_cells(kw, shares, out=None, *, rule="raw"):
    """Shares of image tokens float[…, Q] → of the tower's tokens float[…, P]; see `Connector`."""
    kind = kind_of(kw)
    return shares if kind is None else kind.to_cells(kw, shares, out or {}, rule)
