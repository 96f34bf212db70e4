"""The distribution a token is drawn from, and the drawing.

Axis letter: V vocabulary.
"""

import math

import jax
import jax.numpy as jnp


def temper(logits, temperature) -> jax.Array:
    """float32[..., V] over a temperature > 0, shifted so that the largest is 0: however small the
    temperature, nothing overflows."""
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def most_probable(logits, top_k) -> jax.Array:
    """float32[..., V] with -inf outside of the k largest and their equals."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= _cutoff(logits, jnp.ones_like(logits), top_k), logits, -jnp.inf)


def nucleus(logits, top_p) -> jax.Array:
    """float32[..., V] with -inf outside of the nucleus, as `generate` defines it."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= _cutoff(logits, jax.nn.softmax(logits), top_p), logits, -jnp.inf)


def _cutoff(logits, weights, limit):
    """The least x such that the logits above it weigh less than `limit`, float32[..., 1].

    A token is needed while those before it weigh too little, so it's those from x up that are;
    equals are treated alike. Found by halving the range of floats, which lie in the order of the
    integers that share their bits (below 0, in the reverse order): 32 sums instead of sorting
    257,152 logits.
    """

    def flip(bits):
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    order = flip(jax.lax.bitcast_convert_type(logits, jnp.int32))

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # of the two, without overflow
        above = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    high = jnp.max(order, axis=-1, keepdims=True)
    low = jnp.full_like(high, flip(jnp.float32(-jnp.inf).view(jnp.int32)))
    _, bits = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(flip(bits), jnp.float32)


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
