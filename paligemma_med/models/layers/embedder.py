"""The vocabulary table: tokens in, logits out."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models.layers import quantised
from paligemma_med.models.layers.activations import constrain


class Embedder(nn.Module):
    """The table that embeds tokens and, transposed, gives logits."""

    vocab_size: int
    width: int
    dtype: str

    def setup(self) -> None:
        self.table = quantised.param(
            self,
            "input_embedding",
            nn.initializers.normal(stddev=self.width**-0.5),
            (self.vocab_size, self.width),
        )

    def encode(self, tokens: jax.Array) -> jax.Array:
        x = quantised.rows(self.table, tokens, self.dtype)
        x = x * jnp.asarray(self.width**0.5, self.dtype)
        return constrain(x, "act_batch", "act_len", "act_emb")

    def decode(self, x: jax.Array) -> jax.Array:
        return quantised.logits(x, self.table)
