"""The loss of given answers: how surprised a model is by each row's true answer.

It is the training loss, with nothing left out: no dropout, every supervised token, each row by itself.

Axis letters: B rows, T text positions.
"""

import functools

import jax
import jax.numpy as jnp

from paligemma_med.models import lean
from paligemma_med.models import loss as losses


@functools.partial(lean.jit, static_argnames=("model", "chunk"))
def answer_losses(model, params, batch, *, chunk=16) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each row's supervised tokens, in nats.

    Args:
      model: `vlm.Model`.
      params: its parameters.
      batch: as a training pp makes it: image float32[B, …], text, mask_ar and mask_loss int32[B, T + 1], image_at
        int32[B] if there is one; `_mask` bool[B], False for rows that only fill it up.
      chunk: positions whose logits exist at a time.

    Returns:
      (sums float32[B], tokens int32[B]): the sum of -log p(token), and how many tokens it is of. Both are 0 where
      `_mask` is False, whatever is in these rows.
    """
    mask_loss = batch["mask_loss"][:, 1:]
    positions, weights, _ = losses.supervised_positions(mask_loss, None)  # all, those with a loss first
    variables = {"params": params}
    x, _ = model.apply(
        variables,
        batch["image"],
        batch["text"][:, :-1],
        batch["mask_ar"][:, :-1],
        image_at=batch.get("image_at"),
        logit_positions=positions,
        pre_logits=True,
    )
    labels = jnp.take_along_axis(batch["text"][:, 1:], positions, axis=1)

    def compute_logits(x):
        return model.apply(variables, x, method="compute_logits")

    nll = losses.chunked_cross_entropy(compute_logits, x, labels, chunk)
    counted = weights > 0
    if "_mask" in batch:
        counted &= batch["_mask"][:, None]
    # Not by multiplication: an unsupervised position may be NaN.
    return jnp.where(counted, nll, 0.0).sum(axis=1), counted.sum(axis=1, dtype=jnp.int32)
