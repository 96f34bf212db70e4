"""Rotary position embeddings against their definition in float64."""

import jax.numpy as jnp
import numpy as np

from paligemma_med.models.layers.positions import apply_rope, rope_angles

BF16_HALF_STEP = 2.0**-8  # rounding to bfloat16 moves a number by at most this part of it


def rope_by_definition(x, positions, head_dim):
    """Pairs (i, i + H/2) as complex numbers turned by position / 10000^(2i/H), in float64."""
    x = np.asarray(x, np.float64)
    half = head_dim // 2
    turn = positions[..., None] / 10_000.0 ** (2 * np.arange(half) / head_dim)
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * turn)[..., None, :]
    return np.concatenate([z.real, z.imag], axis=-1)


def test_rope_of_bfloat16_at_large_positions_is_computed_in_float32():
    rng = np.random.default_rng(1)
    positions = np.array([[0, 1, 255, 1100, 4095]])
    x = jnp.asarray(rng.normal(size=(1, 5, 3, 256)), jnp.bfloat16)
    got = apply_rope(x, rope_angles(positions, 256))
    want = rope_by_definition(np.float32(x), positions, 256)
    assert got.dtype == jnp.bfloat16
    # A float32 angle of 4,095 rad is off by up to 2.5e-4; a bfloat16 one by 8 rad.
    np.testing.assert_allclose(np.float64(np.float32(got)), want, rtol=1.01 * BF16_HALF_STEP, atol=2e-3)
    exact = apply_rope(jnp.float32(x), rope_angles(positions, 256))
    np.testing.assert_allclose(exact, want, atol=2e-3)
    np.testing.assert_allclose(exact[:, :3], want[:, :3], atol=1e-4)


def test_rope_depends_on_distance_only():
    """Hugging Face counts PaliGemma's positions from 1, big_vision from 0: the same thing."""
    q, k = np.random.default_rng(2).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def dot(at_q, at_k):
        turned = (apply_rope(x, rope_angles(np.array([[at]]), 16)) for x, at in ((q, at_q), (k, at_k)))
        return np.sum(next(turned) * next(turned))

    np.testing.assert_allclose(dot(7, 3), dot(107, 103), atol=1e-4)
    assert abs(dot(7, 3) - dot(3, 7)) > 1e-2
