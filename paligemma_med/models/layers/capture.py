"""How attention probabilities leave a tower, and how to differentiate with respect to them.

A tower's `capture_attention` is False, or True for the probabilities of all layers at once, or a *fold*,
which reads each layer's probabilities inside the layer, so that only one layer's are ever held. A fold is
a hashable object with

    init(batch, heads, length) -> state               any tree of arrays, carried over the layers
    step(state, probs float32[B, N, S, S]) -> (state, out)     outs are stacked along the layers

and the tower then returns (last state, stacked outs) instead of the probabilities.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads,
G query heads per key/value head (N = K·G).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def start_fold(capture, batch: int, heads: int, length: int) -> Any:
    """State of `capture_attention` before the first layer; None unless it is a fold."""
    return None if isinstance(capture, bool) else capture.init(batch, heads, length)


def fold_layer(capture, state, probs) -> tuple[Any, Any]:
    """(state, the layer's out to be stacked) from its probabilities float32[B, N, S, S] or None."""
    return (state, probs) if isinstance(capture, bool) else capture.step(state, probs)


def end_folds(capture, state, stacked) -> Any:
    """A tower's attention output after the last layer."""
    return stacked if isinstance(capture, bool) else (state, stacked)


@jax.custom_vjp
def weigh(probs: jax.Array, slot: jax.Array) -> jax.Array:
    """The probabilities float32[B, …, T, S] of heads on one or two axes, unchanged.

    Only the gradient with respect to `slot`, float32[B, T, S], is special: for a figure y it is the mean
    over heads of max(probs · ∂y/∂probs, 0), attention weighted by its gradient (arXiv 2103.15679, eq. 5).
    Heads are fused here, so that only one layer's heads are ever held.
    """
    del slot
    return probs


def _weigh_bwd(probs, grads):
    return grads, jnp.mean(jnp.maximum(probs * grads, 0), axis=tuple(range(1, probs.ndim - 2)))


weigh.defvjp(lambda probs, slot: (probs, probs), _weigh_bwd)


def perturbation(module: nn.Module) -> jax.Array | None:
    """The argument `perturb` of `attend`: the variable "probs" of the collection "perturbations" if the
    caller passed one (`vlm.perturbations`), else None. `init` never creates it."""
    if module.has_variable("perturbations", "probs"):
        return module.get_variable("perturbations", "probs")
    return None
