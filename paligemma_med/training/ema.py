"""An exponential moving average (EMA) of the trained weights: config.ema_decay.

The average is the state of the optimizer's last link. So all that holds for the optimizer's state holds for it: it is
cut over devices like the weights, is in every checkpoint, and isn't touched by a step that is skipped.
`checkpoints.workdir` reads it back as the run's weights.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class EmaState(NamedTuple):
    """Attributes:
    count: int32[], steps averaged so far.
    ema_params: {name: float32 array}, the average. `checkpoints.workdir.EMA` is this field's name.
    """

    count: jax.Array
    ema_params: dict[str, jax.Array]


def decay_at(count, decay: float) -> jax.Array:
    """The weight of the average so far, when the step after `count` others is added: float32[].

    It rises from 0.1 to `decay`, or what a short run ends with would be mostly what it began with. The rule is that
    of TensorFlow's ExponentialMovingAverage(num_updates=count).
    """
    count = jnp.asarray(count, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + count) / (10.0 + count))


def average_params(decay: float) -> optax.GradientTransformation:
    """Leaves updates as they are, and averages the parameters that they lead to; has to be the last of a chain."""

    def init(params):
        # Copies: a step gives up the buffers of parameters and state, which must not be the same.
        return EmaState(jnp.int32(0), {n: jnp.copy(x) for n, x in params.items()})

    def update(updates, state, params):
        share = 1.0 - decay_at(state.count, decay)
        new = {n: old + share * (params[n] + updates[n] - old) for n, old in state.ema_params.items()}
        return updates, EmaState(state.count + 1, new)

    return optax.GradientTransformation(init, update)


def averages(opt_state: Any) -> dict[str, jax.Array] | None:
    """{name: array} of the average in the state of a chain; None if it keeps none."""
    last = opt_state[-1] if isinstance(opt_state, tuple) and opt_state else None
    return last.ema_params if isinstance(last, EmaState) else None
