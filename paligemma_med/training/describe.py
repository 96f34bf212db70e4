"""The table that a run begins with: every leaf, its type, whether it is trained, and where it lies."""

import math

from paligemma_med import weights
from paligemma_med.experiment import make_mesh
from paligemma_med.models import parts
from paligemma_med.parallel import sharding
from paligemma_med.training import optim


def describe_params(config, abstract, trained, mesh=None):
    """A table of all leaves: name, shape, stored type, trained by which rule or frozen, along which
    axes of the mesh each dimension is cut (and what stayed whole although it was to be cut), bytes
    on each device; totals.

    Args:
      abstract: {name: array or jax.ShapeDtypeStruct}.
      mesh: by default that of config.mesh.
    """
    mesh = mesh or make_mesh(config)
    dtypes = weights.param_dtypes(config, abstract, trained)
    kinds = weights.param_kinds(config, abstract, trained)
    rules = optim.schedule_rules(config)
    matched = optim.match_names(abstract, rules, "config.schedule")
    leaves = parts.leaves_of(config.model)
    places = sharding.plan(abstract, weights.sharding_strategy(config), mesh, leaves)
    rows, totals = [], {"trained": [0, 0], "frozen": [0, 0]}
    for name, leaf in abstract.items():
        state = "trained" if name in trained else "frozen"
        place, note = places[name]
        stored = weights.stored_params({name: leaf}, dtypes, {name: place}, kinds, leaves)
        here = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in stored.values())
        totals[state][0] += leaf.size
        totals[state][1] += here
        shape = "×".join(map(str, leaf.shape))
        cut = sharding.short_spec(place) + (f" ({note})" if note else "")
        rule = rules[matched[name][0]][0]
        dtype = kinds.get(name) or str(dtypes[name])
        rows.append((name, shape, dtype, state, rule, cut, f"{here:,} B"))
    widths = [max(len(r[i]) for r in rows) for i in range(7)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    lines += [
        f"{n:>15,} parameters {state}, {size:,} bytes of them on each of {mesh.size} devices"
        for state, (n, size) in totals.items()
    ]
    return "\n".join(lines)
