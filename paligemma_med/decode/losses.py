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
    length = -(-mask_loss.shape[1] // chunk) * chunk
    positions, weights, _ = losses.supervised_positions(mask_loss, None)  # all, those with a loss first
    counted = weights > 0
    if "_mask" in batch:
        counted &= batch["_mask"][:, None]
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
    x, labels, used = (
        jnp.pad(a, ((0, 0), (0, length - a.shape[1]), *((0, 0),) * (a.ndim - 2))) for a in (x, labels, counted)
    )

    def add(i, sums):
        part = [jax.lax.dynamic_slice_in_dim(a, i * chunk, chunk, axis=1) for a in (x, labels, used)]
        logits = model.apply(variables, part[0], method="compute_logits")
        # Not by multiplication: a position that doesn't count may be NaN.
        return sums + jnp.where(part[2], losses.cross_entropy(logits, part[1]), 0.0).sum(axis=1)

    counts = counted.sum(axis=1, dtype=jnp.int32)
    # As many positions as the longest answer needs: most are short, and a vocabulary is long.
    chunks = -(-jnp.max(counts) // chunk)
    return jax.lax.fori_loop(0, chunks, add, jnp.zeros(len(counts), jnp.float32)), counts
