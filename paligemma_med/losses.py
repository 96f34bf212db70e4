"""The training loss: cross-entropy on the answer's tokens, averaged as big_vision averages it.

Axis letters: B batch, T text positions, P supervised positions that are looked at, V vocabulary.
"""

import jax
import jax.numpy as jnp

NORMS = ("example", "token")


def supervised_positions(mask_loss, length):
    """The first `length` supervised positions of each row, so that logits are computed only there.

    Args:
      mask_loss: [B, T], nonzero where a token is supervised.
      length: P, how many positions to give; None gives all T.

    Returns:
      (positions int32[B, P], weights float32[B, P] that are 0 where a row has fewer, and the number
      of supervised positions, int32[], that P is too small for).
    """
    mask = (mask_loss > 0).astype(jnp.int32)
    length = mask.shape[1] if length is None else min(length, mask.shape[1])
    positions = jnp.argsort(-mask, axis=1, stable=True)[:, :length]
    kept = jnp.take_along_axis(mask, positions, axis=1)
    return positions, kept.astype(jnp.float32), mask.sum() - kept.sum()


def cross_entropy(logits, labels, label_smoothing=0.0):
    """-log p(label), in float32, without a one-hot array.

    With smoothing ε the target is 1 - ε on the label and ε / (V - 1) on every other token, as in
    big_vision's `utils.weighted_softmax_xent`.

    Args:
      logits: float[B, P, V].
      labels: int32[B, P].

    Returns:
      float32[B, P].
    """
    logits = logits.astype(jnp.float32)
    lse = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return lse - right
    others = (jnp.sum(logits, axis=-1) - right) / (logits.shape[-1] - 1)
    return lse - (1.0 - label_smoothing) * right - label_smoothing * others


def row_weights(mask_loss, loss_norm):
    """What each supervised token counts, so that the sum over a batch is the loss.

    "example" is big_vision's: the mean over examples of each example's mean over tokens. "token" is
    the mean over all supervised tokens of the batch, as in Hugging Face's trainer; long answers
    count more. Weights come from the whole batch, so that sums over microbatches are exact.

    Args:
      mask_loss: [B, T] of the whole batch.

    Returns:
      float32[B].
    """
    count = jnp.sum(mask_loss > 0, axis=1).astype(jnp.float32)
    if loss_norm == "example":
        return 1.0 / (count.shape[0] * jnp.maximum(count, 1.0))
    if loss_norm == "token":
        return jnp.broadcast_to(1.0 / jnp.maximum(jnp.sum(count), 1.0), count.shape)
    raise ValueError(f"loss_norm is {loss_norm!r}; expected one of {NORMS}.")
