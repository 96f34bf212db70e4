"""The vocabulary table: tokens in, logits out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models.layers import quantised
from paligemma_med.models.layers.activations import constrain


class Embedder(nn.Module):
    """The table that embeds tokens and, transposed, gives logits, unless a second one does.

    Attributes:
      scaled: whether embeddings are multiplied by sqrt(width).
      tied: whether one table serves both.
    """

    vocab_size: int
    width: int
    dtype: str
    scaled: bool = True
    tied: bool = True

    def setup(self) -> None:
        self.table = self._table("input_embedding")
        self.output = self.table if self.tied else self._table("output_embedding")

    def _table(self, name):
        init = nn.initializers.normal(stddev=self.width**-0.5)
        return quantised.param(self, name, init, (self.vocab_size, self.width))

    def encode(self, tokens: jax.Array) -> jax.Array:
        x = quantised.rows(self.table, tokens, self.dtype)
        if self.scaled:
            x = x * jnp.asarray(self.width**0.5, self.dtype)
        return constrain(x, "act_batch", "act_len", "act_emb")

    def decode(self, x: jax.Array) -> jax.Array:
        return quantised.logits(x, self.output)
