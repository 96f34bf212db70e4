"""Norms against their definition in float64."""

import jax.numpy as jnp
import numpy as np

from paligemma_med.models.layers.norms import RMSNorm

BF16_HALF_STEP = 2.0**-8  # rounding to bfloat16 moves a number by at most this part of it


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    """2,048 numbers around 100: their squares don't add up in bfloat16."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(100 + 30 * rng.normal(size=(3, 2048)), jnp.bfloat16)
    scale = rng.normal(size=2048).astype(np.float32)
    got = RMSNorm().apply({"params": {"scale": scale}}, x)
    x64 = np.float64(np.float32(x))
    want = x64 / np.sqrt(np.mean(x64**2, axis=-1, keepdims=True) + 1e-6) * (1 + np.float64(scale))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float64(np.float32(got)), want, rtol=1.01 * BF16_HALF_STEP)


def test_rms_norm_counts_its_epsilon():
    got = RMSNorm().apply({"params": {"scale": np.zeros(4)}}, np.full((1, 4), 1e-3, np.float32))
    np.testing.assert_allclose(got, np.full((1, 4), 1e-3 / np.sqrt(2e-6)), rtol=1e-5)
