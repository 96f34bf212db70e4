"""Where activations lie on a mesh: names for their dimensions, which rules tie to mesh axes.

Without rules the compiler follows the weights and the batch, and where these contradict each other
its choice is seldom ours. `paligemma_med.parallel.sharding.rules` reads the rules from a config.
"""

import math

import flax.linen as nn
import jax
from jax.sharding import PartitionSpec

# The first three are big_vision's, and whole where no rule cuts them, as there. What the others
# name is cut as the weights are: without a rule, that remains the compiler's choice.
WHOLE_BY_DEFAULT = ("act_batch", "act_len", "act_emb")
NAMES = (*WHOLE_BY_DEFAULT, "act_heads", "act_mlp", "act_vocab")

# (mesh, ((name, mesh axis, axes or None), …)) or None. Part of the key of JAX's caches: a function
# that was traced under other rules is traced again.
active = jax.make_user_context(default_value=None)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out as the active rules say; `x` itself where there are none.

    Args:
      x: an array with a name of NAMES, or None, for each dimension. A rule whose axes don't divide
        its dimension is left out for it; where there is no name the compiler chooses.
    """
    if active.value is None:
        return x
    mesh, rules = active.value
    size = dict(zip(names, x.shape, strict=True))
    rules = [(n, axes) for n, axes in rules if n in size and size[n] % _parts(axes, mesh) == 0]
    known = {*WHOLE_BY_DEFAULT, *(n for n, _ in rules)}
    names = tuple(n if n in known else PartitionSpec.UNCONSTRAINED for n in names)
    # The one rule of no meaning is for flax, to whom no rules are no constraint.
    return nn.with_logical_constraint(x, names, rules=[*rules, ("", None)], mesh=mesh)


def _parts(axes, mesh):
    """How many parts a rule cuts a dimension into."""
    axes = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return math.prod(mesh.shape[a] for a in axes)
