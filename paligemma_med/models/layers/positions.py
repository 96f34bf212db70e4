"""Rotary position embeddings (RoPE, arXiv 2104.09864), the two halves of a head's width as pairs.

Axis letters: B batch, T positions, H width of a head.
"""

import jax
import jax.numpy as jnp


def rope_angles(positions, head_dim: int, max_wavelength: float = 10_000) -> tuple[jax.Array, jax.Array]:
    """int[B, T] positions → (cos, sin), each float32[B, T, 1, H / 2], for `apply_rope`."""
    exponents = 2.0 * jnp.arange(head_dim // 2, dtype=jnp.float32) / head_dim
    radians = positions[..., None].astype(jnp.float32) / max_wavelength**exponents
    return jnp.cos(radians)[..., None, :], jnp.sin(radians)[..., None, :]


def apply_rope(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates float[B, T, heads, H] in float32 by its positions' angles; the type of x is kept."""
    cos, sin = angles
    x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
