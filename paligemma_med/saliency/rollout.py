"""Attention rollout: from which input positions a position's content came, through all layers.

Abnar and Zuidema, arXiv 2005.00928, section 3: a layer mixes positions by its attention A and
keeps half by its residual, Ā = (A + I) / 2; the first l layers together mix by R_l = Ā_l R_{l-1},
R_0 = I. Row i of R says how much of each input position is in position i; rows sum to 1. (The other
order of the product, which some published tools use, follows tokens backwards through the layers.)

Axis letters: N heads, S positions (queries in front, keys behind), R rows of interest, P patches.
"""

import jax.numpy as jnp

FUSES = ("max", "mean", "min")  # over heads; functions of numpy and jax.numpy


def fused(probs, fuse="mean", discard=0.0) -> jnp.ndarray:
    """One layer's Ā from the probabilities of its heads.

    Args:
      probs: float[N, S, S], rows sum to 1.
      fuse: over the heads: "mean", "max" or "min".
      discard: share of a row's keys that are left out, smallest first. Keys of probability 0, which
        the query doesn't see, don't count, so that padding changes nothing. A row's largest key, keys
        equal to it, and the position itself always stay.

    Returns:
      float32[S, S], rows sum to 1: (F + I) / 2, where F are the fused rows, rescaled to sum to 1.

    Raises:
      ValueError: an unknown `fuse`, a `discard` outside [0, 1).
    """
    check_fuse(fuse)
    if not 0 <= discard < 1:
        raise ValueError(f"discard is {discard!r}; expected a share in [0, 1).")
    eye = jnp.eye(probs.shape[-1], dtype=jnp.float32)
    f = getattr(jnp, fuse)(jnp.asarray(probs, jnp.float32), axis=0)
    if discard:
        seen = jnp.sum(f > 0, axis=-1, keepdims=True)
        drop = jnp.floor(discard * seen).astype(jnp.int32)
        place = jnp.minimum(f.shape[-1] - seen + drop, f.shape[-1] - 1)
        least = jnp.take_along_axis(jnp.sort(f, axis=-1), place, axis=-1)
        f = jnp.where((f >= least) | (eye > 0), f, 0.0)
    total = jnp.sum(f, axis=-1, keepdims=True)
    # Under "min" a row is empty if no key is seen by all heads: only its residual is left.
    f = jnp.where(total > 0, f / jnp.where(total > 0, total, 1.0), eye)
    return (f + eye) / 2


def step(rolled, probs, fuse="mean", discard=0.0) -> jnp.ndarray:
    """R_l float32[S, S] from R_{l-1} and the layer's probabilities float[N, S, S]."""
    return jnp.matmul(fused(probs, fuse, discard), rolled, precision="highest")


def rollout(attn, fuse="mean", discard=0.0, start_layer=0) -> jnp.ndarray:
    """R through all layers.

    Args:
      attn: float[L, N, S, S].
      fuse, discard: as `fused` takes them.
      start_layer: layers before it are left out; 0 takes all.

    Returns:
      float32[S, S].
    """
    check_start_layer(start_layer, len(attn))
    rolled = jnp.eye(attn.shape[-1], dtype=jnp.float32)
    for probs in attn[start_layer:]:
        rolled = step(rolled, probs, fuse, discard)
    return rolled


def check_fuse(fuse) -> None:
    """Raises ValueError unless it is one of FUSES."""
    if fuse not in FUSES:
        raise ValueError(f"fuse is {fuse!r}; expected one of {list(FUSES)}.")


def check_start_layer(start_layer, layers) -> None:
    """Raises ValueError if no layer would be left."""
    if not 0 <= start_layer < layers:
        raise ValueError(f"start_layer is {start_layer!r}; expected 0 to {layers - 1}.")


def to_patches(cells, img_rollout) -> jnp.ndarray:
    """Carries shares of the image tower's tokens through the tower to the patches of pixels.

    Args:
      cells: float[..., P] shares of the tower's tokens, class tokens included.
      img_rollout: float[P, P], `rollout` of the tower.

    Returns:
      float32[..., P]; each row keeps its sum.
    """
    return jnp.matmul(jnp.asarray(cells, jnp.float32), img_rollout, precision="highest")
