"""The distribution a token is drawn from, and the drawing.

Axis letter: V vocabulary.
"""

import math

import jax
import jax.numpy as jnp

from paligemma_med.models import lean


def temper(logits, temperature) -> jax.Array:
    """float32[..., V] over a temperature > 0, shifted so that the largest is 0: however small the
    temperature, nothing overflows."""
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def most_probable(logits, top_k) -> jax.Array:
    """float32[..., V] with -inf outside of the k largest and their equals."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= least_of_most_probable(logits, top_k), logits, -jnp.inf)


def nucleus(logits, top_p) -> jax.Array:
    """float32[..., V] with -inf outside of the nucleus, as `generate` defines it."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= least_of_nucleus(logits, top_p), logits, -jnp.inf)


def least_of_most_probable(logits, top_k) -> jax.Array:
    """The k-th largest of float32[..., V], float32[..., 1]."""
    return _cutoff(logits, lambda x: jnp.ones_like(x), top_k)


def least_of_nucleus(logits, top_p, least=-jnp.inf) -> jax.Array:
    """What the least logit of the nucleus is not below, and the next one is, float32[..., 1].

    Args:
      logits: float32[..., V]. top_p: as `generate` defines it.
      least: float32[..., 1], at most the largest logit; the distribution is that of the logits from here up.
    """
    largest = jnp.max(logits, axis=-1, keepdims=True)

    def weigh(x):
        return jnp.where(x >= least, jnp.exp(x - largest), 0.0)

    return jnp.maximum(_cutoff(logits, weigh, top_p * jnp.sum(weigh(logits), axis=-1, keepdims=True)), least)


def _cutoff(logits, weigh, limit):
    """The least x such that the logits above it weigh less than `limit`, float32[..., 1].

    A token is needed while those before it weigh too little, so it's those from x up that are;
    equals are treated alike. Found digit by digit among the integers that share the floats' bits, which lie in the
    order of the floats (below 0, in the reverse order): a few sums instead of sorting 257,152 logits.

    Args:
      logits: float32[..., V].
      weigh: logits → their weights. They are computed in each pass: to read them would take longer.
      limit: number, or float32[..., 1].
    """
    # What takes longest is reading the logits on a GPU, and comparing them on a CPU: so a GPU tells 8 digits apart in a
    # pass, by 7 sums at a time.
    bits = 1 if lean.is_for_cpu() else 3
    passes = -(-32 // bits)

    def flip(bits):
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def narrow(i, low):
        step = jnp.left_shift(jnp.int32(1), jnp.maximum(32 - bits * (i + 1), 0).astype(jnp.int32))
        bounds = [low + step * jnp.int32(n) for n in range(1, 2**bits)]
        # Sums of all bounds are one reduction, which reads the logits once.
        order, weights = flip(jax.lax.bitcast_convert_type(logits, jnp.int32)), weigh(logits)
        sums = jax.lax.reduce(
            [jnp.where(order >= bound, weights, 0.0) for bound in bounds],
            [jnp.float32(0.0)] * len(bounds),
            lambda a, b: [x + y for x, y in zip(a, b, strict=True)],
            (logits.ndim - 1,),
        )
        # Those from a bound up weigh enough: so x isn't below it.
        return low + step * sum((total[..., None] >= limit).astype(jnp.int32) for total in sums)

    low = jnp.full((*logits.shape[:-1], 1), jnp.iinfo(jnp.int32).min, jnp.int32)
    low = jax.lax.fori_loop(0, passes, narrow, low)
    # Below -inf are no numbers.
    low = jnp.maximum(low, flip(jnp.float32(-jnp.inf).view(jnp.int32)))
    return jax.lax.bitcast_convert_type(flip(low), jnp.float32)


def draw(key, logits) -> jax.Array:
    """One token of the distribution softmax(float32[V]), int32[].

    The vocabulary is cut into about sqrt(V) groups; first a group is drawn, then a token of it.
    That is the same distribution and needs 2·sqrt(V) random numbers instead of V, whose making
    would take longer than the rest of a step of a model that a CPU can run.
    """
    size = math.isqrt(logits.shape[0] - 1) + 1
    groups = jnp.pad(logits, (0, -logits.shape[0] % size), constant_values=-jnp.inf)
    groups = groups.reshape(-1, size)
    first, second = jax.random.split(key)
    group = jax.random.categorical(first, jax.nn.logsumexp(groups, axis=-1))
    return (group * size + jax.random.categorical(second, groups[group])).astype(jnp.int32)
