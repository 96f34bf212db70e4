"""What tells attention where tokens are: rotary embeddings (RoPE) and ALiBi's biases.

RoPE is arXiv 2104.09864, with the two halves of a head's width as pairs; ALiBi is arXiv 2108.12409.

Axis letters: B batch, T positions, N heads, H width of a head.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np


def rope_angles(
    positions, head_dim: int, max_wavelength: float = 10_000, scale: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """int[B, T] positions → (cos, sin), each float32[B, T, 1, H / 2], for `apply_rope`.

    Args:
      max_wavelength: the base, "theta".
      scale: positions are divided by it (Gemma 3's global layers).
    """
    exponents = 2.0 * jnp.arange(head_dim // 2, dtype=jnp.float32) / head_dim
    positions = positions[..., None].astype(jnp.float32)
    if scale != 1:
        positions = positions / scale
    radians = positions / max_wavelength**exponents
    return jnp.cos(radians)[..., None, :], jnp.sin(radians)[..., None, :]


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates float[B, T, heads, H] in float32 by its positions' angles; the type of x is kept."""
    cos, sin = angles
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)


def alibi_slopes(num_heads: int) -> np.ndarray:
    """float32[N]: how fast each head's bias falls with distance.

    For n heads, a power of two, they are 2^(−8i/n), i = 1 … n. For other numbers, those of the next lower power n, then
    every second one of 2n heads' (transformers, models/bloom/modeling_bloom.py).
    """
    n = 2 ** math.floor(math.log2(num_heads))
    exponents = [8 * i / n for i in range(1, n + 1)] + [4 * i / n for i in range(1, 2 * (num_heads - n), 2)]
    return np.exp2(-np.array(exponents)).astype(np.float32)


def alibi_bias(keys, query, num_heads: int) -> jax.Array:
    """slope · (key − query): int[B, S] positions of keys, int[B, 1] of the query → float32[B, N, S].

    Softmax ignores what is added to a whole row, so one bias serves all queries of a pass. Which query it is counted
    from is free in exact numbers; in float32 small numbers round less, so count from where precision is wanted.
    """
    return alibi_slopes(num_heads)[:, None] * (keys - query)[:, None].astype(jnp.float32)
