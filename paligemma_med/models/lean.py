"""How XLA is kept from holding float32 copies of all 16-bit weights on a CPU.

A CPU has no operations on bfloat16 but casts: XLA slices a stack of layers in float32, so that the cast of the whole
stack doesn't change within the loop over layers, and moves it out of the loop. For the 3B model that takes 11 GiB
beside weights of 5.4. `jit` compiles programs with large weights without the passes that move it; then each layer is
cast on its own. Small models keep them: their copies are small, and save a cast of each layer for each token.

GPUs and TPUs multiply in bfloat16. Their programs are the same as by `jax.jit`.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np

# Weights that take less than this have copies of at most twice as much.
LARGE = 2**30  # bytes

_OPTIONS = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion,while-loop-expensive-invariant-code-motion",
}
_ARRAYS = (jax.Array, np.ndarray, jax.ShapeDtypeStruct)
_SHORT = (jnp.dtype("bfloat16"), jnp.dtype("float16"))

# What is being traced: "cpu", a program for a CPU; "large", one with large weights; None, any other. Part of the key of
# JAX's caches.
_traced = jax.make_user_context(default_value=None)


def is_for_cpu() -> bool:
    """Whether what is being traced was jitted by `jit` for a CPU."""
    return _traced.value is not None


def is_for_large_weights_on_cpu() -> bool:
    """Whether it also has large weights in 16 bits."""
    return _traced.value == "large"


class jit:  # noqa: N801 (it stands for jax.jit)
    """`jax.jit`, but see this file's docstring. What it can do besides calls: `lower` and `trace`.

    Within another traced function it is the same as `jax.jit`.
    """

    def __init__(self, function, *, large: int | None = None, **kw):
        """
        Args:
          large: arguments with so many bytes of 16-bit floats are large; by default LARGE.
          **kw: of `jax.jit`.
        """
        self._large = large
        self._plain = jax.jit(function, **kw)
        self._lean = jax.jit(function, compiler_options=_OPTIONS, **kw)
        functools.update_wrapper(self, function)

    def __call__(self, *args, **kw):
        with self._chosen(args, kw) as jitted:
            return jitted(*args, **kw)

    def lower(self, *args, **kw) -> jax.stages.Lowered:
        """As that of a jitted function."""
        with self._chosen(args, kw) as jitted:
            return jitted.lower(*args, **kw)

    def trace(self, *args, **kw) -> jax.stages.Traced:
        """As that of a jitted function."""
        with self._chosen(args, kw) as jitted:
            return jitted.trace(*args, **kw)

    def _cache_size(self):
        """As that of a jitted function: how many programs calls have compiled."""
        return self._plain._cache_size() + self._lean._cache_size()

    @contextlib.contextmanager
    def _chosen(self, args, kw):
        found = _short_bytes_on_cpu((args, kw))
        if found is None:
            yield self._plain
        elif found < (LARGE if self._large is None else self._large):
            with _traced("cpu"):
                yield self._plain
        else:
            with _traced("large"):
                yield self._lean


def _short_bytes_on_cpu(tree):
    """Bytes of the 16-bit floats in `tree` that a CPU holds, or will hold; None where no CPU computes, and within
    another traced function, which is compiled as a whole."""
    if jax.default_backend() != "cpu":
        return None
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, _ARRAYS)]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return None
    short = [x for x in arrays if x.dtype in _SHORT]
    if not all(map(_may_be_on_cpu, short or arrays[:1])):
        return None
    return sum(2 * x.size for x in short)


def _may_be_on_cpu(x):
    where = getattr(x, "sharding", None)  # none: on the host, or abstract
    return where is None or all(d.platform == "cpu" for d in where.device_set)
