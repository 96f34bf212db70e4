"""Log-probabilities of tokens, and the training loss: cross-entropy on the answer's tokens, averaged as in
big_vision.

Axis letters: B batch, T text positions, P supervised positions used, D width of the language model, V
vocabulary.
"""

import functools

import jax
import jax.numpy as jnp

NORMS = ("example", "token")


def supervised_positions(mask_loss, length: int | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The first `length` supervised positions of each row, so that logits are computed only there.

    Args:
      mask_loss: [B, T], nonzero where a token is supervised.
      length: P, how many positions to return; None returns all T.

    Returns:
      (positions int32[B, P], weights float32[B, P] that are 0 where a row has fewer, and the number of
      supervised positions, int32[], that didn't fit into P).
    """
    mask = (mask_loss > 0).astype(jnp.int32)
    length = mask.shape[1] if length is None else min(length, mask.shape[1])
    positions = jnp.argsort(-mask, axis=1, stable=True)[:, :length]
    kept = jnp.take_along_axis(mask, positions, axis=1)
    return positions, kept.astype(jnp.float32), mask.sum(dtype=jnp.int32) - kept.sum(dtype=jnp.int32)


def token_logprobs(logits, tokens) -> jax.Array:
    """Log-probabilities of chosen tokens: float32[…, V], int[…] → float32[…]."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def cross_entropy(logits, labels, label_smoothing: float = 0.0) -> jax.Array:
    """-log p(label), in float32, without a one-hot array.

    With smoothing ε the target is 1 - ε on the label and ε / (V - 1) on every other token, as in
    big_vision's `utils.weighted_softmax_xent`.

    Args:
      logits: float[B, P, V].
      labels: int32[B, P].

    Returns:
      float32[B, P].
    """
    return _cross_entropy(logits.astype(jnp.float32), labels, label_smoothing)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _cross_entropy(logits, labels, smoothing):
    """`cross_entropy` with its gradient written out: JAX's own goes through further arrays of their size."""
    return _cross_entropy_forward(logits, labels, smoothing)[0]


def _cross_entropy_forward(logits, labels, smoothing):
    lse = jax.nn.logsumexp(logits, axis=-1)
    right = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    loss = lse - (1.0 - smoothing) * right
    if smoothing:
        loss -= smoothing * (jnp.sum(logits, axis=-1) - right) / (logits.shape[-1] - 1)
    return loss, (logits, labels, lse)


def _cross_entropy_backward(smoothing, kept, g):
    logits, labels, lse = kept
    is_label = jax.lax.broadcasted_iota(labels.dtype, logits.shape, logits.ndim - 1) == labels[..., None]
    target = jnp.where(is_label, jnp.float32(1.0 - smoothing), jnp.float32(smoothing / (logits.shape[-1] - 1)))
    return g[..., None] * (jnp.exp(logits - lse[..., None]) - target), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def chunked_cross_entropy(
    compute_logits, x, labels, chunk: int | None = None, label_smoothing: float = 0.0
) -> jax.Array:
    """`cross_entropy(compute_logits(x), labels)`, with logits of few positions at a time.

    The backward pass computes them again, so that at most B · chunk · V logits, and as many gradients,
    exist at a time. Value and gradient are the same except for the order of sums. big_vision and Hugging
    Face hold all B · P · V.

    Args:
      compute_logits: float[B, p, D] → float[B, p, V], each position independently.
      x: float[B, P, D].
      labels: int32[B, P].
      chunk: the maximum of positions in a row at a time, 1 or more; None, or P or more: all at once.

    Returns:
      float32[B, P].
    """
    rows, length = labels.shape
    if chunk is None or chunk >= length:
        return cross_entropy(compute_logits(x), labels, label_smoothing)
    parts = -(-length // chunk)
    size = -(-length // parts)  # of nearly equal size, or the last might be all padding

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, parts * size - length), *((0, 0),) * (a.ndim - 2)))
        return a.reshape(rows, parts, size, *a.shape[2:]).swapaxes(0, 1)

    def one(part):
        return cross_entropy(compute_logits(part[0]), part[1], label_smoothing)

    # Without prevent_cse, since XLA doesn't merge a loop's body with that of the backward pass.
    out = jax.lax.map(jax.checkpoint(one, prevent_cse=False), (cut(x), cut(labels)))
    return out.swapaxes(0, 1).reshape(rows, -1)[:, :length]


def row_weights(mask_loss, loss_norm: str) -> jax.Array:
    """The weight of each supervised token, such that the weighted sum over a batch is the loss.

    "example" is big_vision's: the mean over examples of each example's mean over tokens. "token" is the
    mean over all supervised tokens of the batch, as in Hugging Face's trainer; long answers count more.
    Weights come from the whole batch, so that sums over micro-batches are exact.

    Args:
      mask_loss: [B, T], for the whole batch.

    Returns:
      float32[B].
    """
    count = jnp.sum(mask_loss > 0, axis=1).astype(jnp.float32)
    if loss_norm == "example":
        return 1.0 / (count.shape[0] * jnp.maximum(count, 1.0))
    if loss_norm == "token":
        return jnp.broadcast_to(1.0 / jnp.maximum(jnp.sum(count), 1.0), count.shape)
    raise ValueError(f"loss_norm is {loss_norm!r}; expected one of {NORMS}.")
