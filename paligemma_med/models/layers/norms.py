"""Normalisation of activations, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

KINDS = ("rms_plus_one", "rms", "layer")


class RMSNorm(nn.Module):
    """x / rms(x) · (1 + scale), or · scale; computed in float32, the type of x is kept.

    Attributes:
      eps: added to the mean square.
      plus_one: whether 1 is added to `scale` (Gemma) or not (LLaMA). The two aren't one with a shifted weight: near -1
        bfloat16 has steps of 1/256, several per cent of a small LLaMA scale.
    """

    eps: float = 1e-6
    plus_one: bool = True

    @nn.compact
    def __call__(self, x):
        init = nn.initializers.zeros_init() if self.plus_one else nn.initializers.ones_init()
        scale = self.param("scale", init, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        scale = scale.astype(jnp.float32)
        return (y * (1.0 + scale if self.plus_one else scale)).astype(x.dtype)


class LayerNorm(nn.Module):
    """(x − mean) / standard deviation · scale + bias; computed in float32, the type of x is kept."""

    eps: float = 1e-5

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.ones_init(), (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        # Not E[x²] − E[x]², which loses digits where the mean is large.
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def make(kind: str, eps: float, name: str | None = None) -> nn.Module:
    """The norm of a kind in KINDS.

    Raises:
      ValueError: an unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"norm is {kind!r}; expected one of {KINDS}.")
    if kind == "layer":
        return LayerNorm(eps, name=name)
    return RMSNorm(eps, kind == "rms_plus_one", name=name)
