"""Connectors without attention: fewer tokens or not, a norm or not, one or two linear layers.

MedGemma takes the mean of 4×4 squares, an RMSNorm and a linear map without bias (transformers,
models/gemma3/modeling_gemma3.py); MiniGPT-v2 and PeFoMed put four neighbours side by side
(minigpt4/models/minigpt_v2.py); LLaVA-1.5 has two linear layers with a GELU between.

Axis letters: B batch, P tokens of the tower, Q image tokens that the language model reads, D width
of a reduced token, E of the language model, W of what the last layer reads.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models import leaves
from paligemma_med.models.layers import lora, norms

REDUCTIONS = ("none", "pool", "group")


def _leaves():
    yield leaves.Leaf("norm/scale", "D", role="norm", when="norm")
    yield leaves.Leaf("hidden/kernel", "DW", "D", when="hidden")
    yield leaves.Leaf("hidden/bias", "W", role="bias", when="hidden")
    yield leaves.Leaf("proj/kernel", "WE", "W")
    yield leaves.Leaf("proj/bias", "E", role="bias", when="bias")


class Projector(nn.Module):
    """See `connector.Connector`.

    Attributes:
      reduce: "none"; "pool", the mean of each square of factor × factor tokens of a square image; "group", each
        `factor` neighbours in a row of the raster side by side, as one token of width D · factor.
      norm: RMSNorm with (1 + scale) after it.
      hidden: width W of a hidden layer with GELU; None: one linear layer.
      bias: of the last layer.
    """

    LEAVES = tuple(_leaves())
    READ_TOWER = ()

    width: int
    dtype: str = "float32"
    lora: tuple = ()
    reduce: str = "none"
    factor: int = 1
    norm: bool = False
    hidden: int | None = None
    bias: bool = True

    @property
    def leaves(self) -> tuple[leaves.Leaf, ...]:
        return leaves.of_module(self.LEAVES, self)

    @nn.compact
    def __call__(self, x, *, train=False, capture_attention=False):
        count = self.tokens(dict(reduce=self.reduce, factor=self.factor), x.shape[1])
        if self.reduce == "pool":
            side = math.isqrt(count)
            x = x.reshape(x.shape[0], side, self.factor, side, self.factor, x.shape[-1]).mean((2, 4))
        x = x.reshape(x.shape[0], count, -1)
        if self.norm:
            x = norms.RMSNorm(name="norm")(x)
        kw = dict(dtype=self.dtype, lora=self.lora, deterministic=not train)
        if self.hidden:
            x = nn.gelu(lora.Dense(self.hidden, name="hidden", **kw)(x), approximate=False)
        return lora.Dense(self.width, bias=self.bias, name="proj", **kw)(x), {}

    @staticmethod
    def tokens(kw: dict, patches: int) -> int:
        """Q for P tokens of the tower; kw as in config.model.connector.

        Raises:
          ValueError: P tokens can't be reduced like this.
        """
        reduce, factor = kw.get("reduce", "none"), kw.get("factor", 1)
        if reduce not in REDUCTIONS:
            raise ValueError(f"connector.reduce is {reduce!r}; expected one of {REDUCTIONS}.")
        if reduce == "none":
            return patches
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"connector.factor is {factor!r}; expected a whole number, 1 or more.")
        side = math.isqrt(patches)
        if side * side != patches or side % factor:
            raise ValueError(f"connector: {patches} tokens are no square whose side {factor} divides.")
        return patches // factor ** (2 if reduce == "pool" else 1)

    @staticmethod
    def slots(kw: dict, patches: int) -> dict[str, tuple[int, ...]]:
        """None: there is no attention."""
        del kw, patches
        return {}

    @staticmethod
    def weighted(slots: dict) -> dict:
        """Nothing."""
        return slots

    @staticmethod
    def to_cells(kw: dict, shares, out: dict, rule: str) -> jax.Array:
        """float[…, Q] → float[…, P]: a token's share in equal parts to those that it was made of."""
        reduce, factor = kw.get("reduce", "none"), kw.get("factor", 1)
        shares = jnp.asarray(shares)
        if reduce == "group":
            return jnp.repeat(shares / factor, factor, axis=-1)
        if reduce == "pool":
            side = math.isqrt(shares.shape[-1])
            x = (shares / factor**2).reshape(*shares.shape[:-1], side, side)
            x = jnp.repeat(jnp.repeat(x, factor, axis=-1), factor, axis=-2)
            return x.reshape(*shares.shape[:-1], -1)
        return shares
