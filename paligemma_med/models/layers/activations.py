"""How activations are laid out on a mesh: their dimensions have names, which rules map to mesh axes.

Without rules the compiler infers layouts from the weights and the batch; if those conflict, it rarely
chooses what we want. `paligemma_med.parallel.sharding.rules` reads the rules from a config.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

# The first three are big_vision's; without a rule they stay whole, as in big_vision. For the other names,
# whose dimensions follow the weights, the compiler decides without a rule.
WHOLE_BY_DEFAULT = ("act_batch", "act_len", "act_emb")
NAMES = (*WHOLE_BY_DEFAULT, "act_heads", "act_mlp", "act_vocab")

# (mesh, ((name, mesh axis, axes or None), …)) or None. Part of the key of JAX's caches: a function
# that was traced under other rules is traced again.
active = jax.make_user_context(default_value=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out as the active rules say; `x` itself where there are none.

    Args:
      x: an array with a name of NAMES, or None, for each dimension. A rule whose axes don't divide
        its dimension is skipped there; a dimension without a name is left to the compiler.
    """
    if active.value is None:
        return x
    mesh, rules = active.value
    size = dict(zip(names, x.shape, strict=True))
    rules = [(n, axes) for n, axes in rules if n in size and size[n] % _parts(axes, mesh) == 0]
    known = {*WHOLE_BY_DEFAULT, *(n for n, _ in rules)}
    names = tuple(n if n in known else PartitionSpec.UNCONSTRAINED for n in names)
    # flax applies no constraint at all for an empty list of rules; the last rule matches nothing.
    return nn.with_logical_constraint(x, names, rules=[*rules, ("", None)], mesh=mesh)


def _parts(axes, mesh):
    """Into how many parts a rule cuts a dimension."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[a] for a in axes)
