"""Frozen weights in 8 or 4 bits, as layers read them. `paligemma_med.quantise` makes them.

A kernel `w` is stored as codes under its own name, with its scales as `w_scale`. Codes of int8 are whole
numbers; codes of uint8 are pairs of nf4, QLoRA's 16 quantiles of the normal distribution (arXiv
2305.14314, appendix E). Scales have the kernel's axes, each as long as the kernel's or dividing it into
blocks.

Each layer computes its own dense weight from the codes, so that only one layer's exists at a time. The
backward pass computes it again instead of keeping it (`product`).

Axis letters: V vocabulary, D width of the language model; rows of the table are G groups of C rows
in each of P parts.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import lean

SCALE = "_scale"  # suffix to the name of what it scales
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclasses.dataclass(frozen=True)
class Weight:
    """A parameter as it is stored.

    Attributes:
      value: float[shape], or codes.
      scale: None, or the codes' scales.
      shape: of the dense weight.
    """

    value: jax.Array
    scale: jax.Array | None
    shape: tuple[int, ...]


def param(module: nn.Module, name: str, init, shape) -> Weight:
    """The parameter `name` of `module` as a Weight; `init(key, shape, dtype)` makes a dense one."""
    if module.has_variable("params", name + SCALE):
        value, scale = (module.get_variable("params", n) for n in (name, name + SCALE))
        return Weight(value, scale, tuple(shape))
    return Weight(module.param(name, init, shape, jnp.float32), None, tuple(shape))


def product(f: Callable, x: jax.Array, weight: Weight) -> Any:
    """f(x, w) with the Weight cast to the type of x.

    If that needs a copy, it isn't kept for the backward pass under any remat policy: a loop over layers
    would keep the copies of all layers.
    """
    if weight.scale is None and weight.value.dtype == x.dtype:
        return f(x, weight.value)

    def run(x, value, scale):
        return f(x, _dense(value, scale, weight.shape, x.dtype))

    return jax.checkpoint(run, prevent_cse=False)(x, weight.value, weight.scale)


def _dense(value, scale, shape, dtype):
    if scale is None:
        return value.astype(dtype)
    codes = _unpacked(value, shape) if value.dtype == jnp.uint8 else value.astype(jnp.float32)
    return _scaled(codes, scale).astype(dtype)


def _unpacked(pairs, shape):
    """uint8 of two codes each → float32[shape] of their quantiles."""
    axis = next(i for i, (a, b) in enumerate(zip(pairs.shape, shape)) if a != b)
    codes = jnp.stack([pairs & 15, pairs >> 4], axis + 1).reshape(shape)
    # Four choices between neighbours, one per bit: a look-up would be a gather, slow on some devices.
    values = list(map(jnp.float32, NF4))
    for bit in range(4):
        one = (codes >> bit) & 1 != 0
        values = [jnp.where(one, b, a) for a, b in zip(values[::2], values[1::2])]
    return values[0]


def _scaled(x, scale):
    """x · scale, each of whose axes is as long as x's, or divides it into blocks."""
    split = [(s, n // s) for n, s in zip(x.shape, scale.shape)]
    blocks = x.reshape([n for pair in split for n in pair])
    each = scale.astype(jnp.float32).reshape([n for s, _ in split for n in (s, 1)])
    return (blocks * each).reshape(x.shape)


# --- The vocabulary table ---

_COPY = 2**26  # size of a dense part: as many numbers as in a layer's largest kernel in Gemma 2B
_GROUPS = 64
# A CPU multiplies this many rows and more by a table in bfloat16 as it is. For fewer it casts the whole table first.
_FEWEST = 4


def rows(table: Weight, tokens: jax.Array, dtype) -> jax.Array:
    """dtype[…, D]: rows of the table, a Weight [V, D], for int32[…] tokens."""
    x = jnp.take(table.value, tokens, axis=0)
    if table.scale is not None:
        x = x.astype(jnp.float32) * jnp.take(table.scale, tokens, axis=0)
    return x.astype(dtype)


def logits(x: jax.Array, table: Weight) -> jax.Array:
    """float32[…, V] = x · tableᵀ for float[…, D] and a Weight [V, D]."""
    shape = x.shape[:-1]
    if table.scale is not None and _parts(table.shape)[1] > 1 and _few(x):
        return _logits_by_parts(x, table.value, table.scale)
    rows = math.prod(x.shape[:-1])
    if lean.is_for_large_weights_on_cpu() and rows < _FEWEST:
        x = jnp.pad(x.reshape(rows, -1), ((0, _FEWEST - rows), (0, 0)))
        return logits(x, table)[:rows].reshape(*shape, -1)
    return product(_by_table, x, table)


@jax.custom_vjp
def _by_table(x, table):
    """float32[…, V] = x · tableᵀ for float[…, D] and float[V, D] of one type.

    Its products have factors of that type and float32 sums, backward as well. JAX's own gradient would multiply the
    logits' gradient, float32 as they are, by the table made float32: at half the speed or less on a GPU, for a result
    that is rounded to the type of x in any case.
    """
    return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)


def _by_table_forward(x, table):
    # Only what is needed is kept, and computed: a frozen table has no gradient, not even one that XLA would drop.
    kept = x.value if table.perturbed else None, table.value if x.perturbed else None
    return _by_table(x.value, table.value), kept


def _by_table_backward(kept, g):
    x, table = kept
    g = g.astype((table if x is None else x).dtype)
    f32 = dict(preferred_element_type=jnp.float32)
    by_x = None if table is None else jnp.einsum("...V,VD->...D", g, table, **f32).astype(g.dtype)
    by_table = None if x is None else jnp.einsum("...V,...D->VD", g, x, **f32).astype(g.dtype)
    return by_x, by_table


_by_table.defvjp(_by_table_forward, _by_table_backward, symbolic_zeros=True)


def _few(x):
    """Whether a row of the table in the type of x takes more memory than its logits. Otherwise the loop
    isn't worth it, since XLA holds the logits twice for it."""
    return 4 * math.prod(x.shape[:-1]) < x.dtype.itemsize * x.shape[-1]


@jax.custom_vjp
def _logits_by_parts(x, codes, scale):
    """`logits` of a quantised table, with one dense part at a time. It has its own gradient, since JAX's
    would hold the logits' gradient twice."""
    groups, parts = _parts(codes.shape)
    size = codes.shape[0] // (groups * parts)

    def put(i, out):
        part = jnp.einsum(
            "...D,GCD->...GC",
            x,
            _part(codes, scale, i, x.dtype),
            preferred_element_type=jnp.float32,
        )
        return jax.lax.dynamic_update_index_in_dim(out, part, i, out.ndim - 2)

    out = jnp.zeros((*x.shape[:-1], groups, parts, size), jnp.float32)
    return jax.lax.fori_loop(0, parts, put, out).reshape(*x.shape[:-1], -1)


def _forward(x, codes, scale):
    return _logits_by_parts(x, codes, scale), (jnp.zeros((), x.dtype), codes, scale)


def _backward(kept, g):
    like, codes, scale = kept
    groups, parts = _parts(codes.shape)
    g = g.reshape(*g.shape[:-1], groups, parts, -1)

    def add(i, total):
        of_part = jax.lax.dynamic_index_in_dim(g, i, g.ndim - 2, keepdims=False)
        return total + jnp.einsum(
            "...GC,GCD->...D",
            of_part.astype(like.dtype),
            _part(codes, scale, i, like.dtype),
            preferred_element_type=jnp.float32,
        )

    total = jnp.zeros((*g.shape[:-3], codes.shape[1]), jnp.float32)
    total = jax.lax.fori_loop(0, parts, add, total).astype(like.dtype)
    return total, np.zeros(codes.shape, jax.dtypes.float0), jnp.zeros_like(scale)


_logits_by_parts.defvjp(_forward, _backward)


def _parts(shape):
    """(G, P): a table's rows are viewed as [G, P, C], in which a part [:, i] has at most _COPY numbers. If the
    table is cut over a number of devices that divides G, each device has rows of every part."""
    groups = math.gcd(shape[0], _GROUPS)
    rows = shape[0] // groups
    least = math.ceil(math.prod(shape) / _COPY)
    return groups, next(n for n in range(max(1, min(least, rows)), rows + 1) if rows % n == 0)


def _part(codes, scale, i, dtype):
    """dtype[G, C, D] of a part of the table."""
    groups, parts = _parts(codes.shape)
    codes, scale = (
        jax.lax.dynamic_index_in_dim(a.reshape(groups, parts, -1, a.shape[1]), i, 1, keepdims=False)
        for a in (codes, scale)
    )
    return _dense(codes, scale, codes.shape, dtype)
