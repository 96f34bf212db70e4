"""What a run begins with: a table of every leaf, its type, whether it is trained, and its sharding; config.notes."""

import math

from paligemma_med import weights
from paligemma_med.parallel import sharding
from paligemma_med.setup import Setup
from paligemma_med.training import optim


def start(setup: Setup) -> str:
    """The table of `parameters`, and below it config.notes: what of a recipe isn't from its paper, for one."""
    notes = (setup.config.get("notes") or "").strip()
    return parameters(setup) + (f"\n\n{notes}\n" if notes else "")


def parameters(setup: Setup) -> str:
    """A table of all leaves: name, shape, stored type, frozen or trained by which rule, along which axes of the
    mesh each dimension is cut (and what stayed whole against its rule), bytes per device; totals."""
    rules = optim.schedule_rules(setup.config)
    matched = optim.match_names(setup.abstract, rules, "config.schedule")
    trained = set(setup.trained_names)
    rows, totals = [], {"trained": [0, 0], "frozen": [0, 0]}
    for name, leaf in setup.abstract.items():
        state = "trained" if name in trained else "frozen"
        place, note = setup.placement[name]
        stored = weights.stored_params({name: leaf}, setup).values()
        size = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in stored)
        totals[state][0] += leaf.size
        totals[state][1] += size
        shape = "×".join(map(str, leaf.shape))
        cut = sharding.short_spec(place) + (f" ({note})" if note else "")
        rule = rules[matched[name][0]][0]
        dtype = setup.kinds.get(name) or str(setup.dtypes[name])
        rows.append((name, shape, dtype, state, rule, cut, f"{size:,} B"))
    widths = [max(len(r[i]) for r in rows) for i in range(7)]
    lines = ["  ".join(c.ljust(w) for c, w in zip(r, widths)).rstrip() for r in rows]
    lines += [
        f"{n:>15,} parameters {state}, {size:,} bytes of them on each of {setup.mesh.size} devices"
        for state, (n, size) in totals.items()
    ]
    return "\n".join(lines)
