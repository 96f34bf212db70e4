"""Where the time of a training step goes: its operations, grouped by purpose.

The step is that of the benchmark `train_step`, in this process; JAX's profiler times each operation of
the compiled program, whose metadata says which line of the model it came from. On a CPU everything runs
on one core, since operations that share cores can't be timed separately. A fused operation counts in the
group of its matrix product, or else in the group that its name gives.

    python -m tools.bench profile --size=bench-s
"""

import collections
import functools
import glob
import os
import re
import tempfile
import time

from paligemma_med.pp import markdown
from tools.bench import machine, sizes, turns

_STEPS = 3


def run(*, size, what, dtype, batch_size, remat_policy, scan, attn_impl, top, weights=None) -> dict:
    """Profiles the step.

    Args:
      size, what, dtype, batch_size, remat_policy, scan, attn_impl, weights: as in `train_speed`.
      top: how many single operations to list.

    Returns:
      dict: `milliseconds` per step by group, `operations` (the longest), the sum, the step's time without
      the profiler, and "row", a Markdown table.

    Raises:
      ValueError: an unknown name, or a profile without operations.
    """
    sizes.check(size, what, dtype)
    if os.environ.get("JAX_PLATFORMS", "cpu") == "cpu":
        turns.bind(1)
    import jax

    from tools.bench import peers_ours

    settings = turns.model_settings(size, dtype, None, remat_policy, scan, attn_impl)
    settings |= dict(what=what, rows=batch_size or sizes.SIZES[size].batch_size)
    with (
        turns.weights(size, settings["dtype"], weights) as drawn,
        tempfile.TemporaryDirectory() as to,
    ):
        side = peers_ours.build({**settings, "weights": drawn})
        for _ in range(2):
            side.value(side.step())
        watch = machine.Watch()
        start = time.perf_counter()
        for _ in range(_STEPS):
            side.value(side.step())
        seconds = (time.perf_counter() - start) / _STEPS
        with jax.profiler.trace(to):
            for _ in range(_STEPS):
                side.value(side.step())
        others = watch.found()
        (path,) = glob.glob(f"{to}/**/*.xplane.pb", recursive=True)
        events = _events(path)
    client = jax.devices()[0].client
    modules = [m for x in client.live_executables() for m in x.hlo_modules()]
    known = operations(next(m.to_string() for m in modules if m.name.startswith("jit_step")))
    times = collections.Counter()
    for name, ns in events.items():
        if name in known:
            times[name] += ns / _STEPS / 1e6
    if not times:
        raise ValueError("the profiler saw no operation of the step.")
    groups = collections.Counter()
    for name, ms in times.items():
        groups[group(*known[name])] += ms
    total = sum(times.values())
    table = markdown.head(["part of a step", "ms", "share"]).splitlines()
    table += [markdown.row([k, f"{v:.0f}", f"{v / total:.0%}"]) for k, v in groups.most_common()]
    return {
        **settings,
        **others,
        **turns.surroundings([{**side.about, **peers_ours.device()}]),
        "seconds_a_step": round(seconds, 3),
        "milliseconds": round(total, 1),
        "groups": {k: round(v, 1) for k, v in groups.most_common()},
        "operations": [f"{ms:.1f} ms {name} {known[name][1][-90:]}" for name, ms in times.most_common(top)],
        "row": "\n".join(table),
    }


def _events(path):
    """{name: total nanoseconds} of a trace."""
    import jax

    found = collections.Counter()
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        for line in plane.lines:
            for event in line.events:
                found[event.name] += event.duration_ns
    return found


def operations(hlo) -> dict:
    """{instruction: (whether it holds a matrix product, its op_name)} of a compiled module's text.

    Loops and calls are left out, since the profiler also lists what they run.
    """
    found, products, inner, name = {}, set(), {}, ""
    for line in hlo.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name = head[1]
        elif m := re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*)", line):
            text = m[2]
            product = " dot(" in text or " convolution(" in text or "__cublas" in text
            if product:
                products.add(name)
            if " while(" in text or " call(" in text or " conditional(" in text:
                continue
            calls = re.search(r"calls=%?([\w.\-]+)", text)
            inner[m[1]] = calls[1] if calls else None
            op = re.search(r'op_name="([^"]*)"', text)
            found[m[1]] = (product, op[1] if op else "")
    return {k: (p or inner[k] in products, op) for k, (p, op) in found.items()}


@functools.cache
def _groups():
    """((regex, purpose), …) for matrix products, and for other operations; the first that matches an
    operation's name counts. Modules have the names that their families give them."""
    from paligemma_med.models import decoder, leaves, vit

    mlps, attentions, projections = [], [], []
    for table in (vit.LEAVES, decoder.LEAVES):
        kernels = [leaf for leaf in table if leaf.stacked and leaf.role == "product"]
        heads = [leaf for leaf in kernels if "H" in leaf.letters]
        mlps.append(leaves.stack_of(leaf for leaf in kernels if leaf not in heads))
        attentions.append(leaves.stack_of(heads))
        projections += [leaf.folder for leaf in heads]

    def modules(folders):
        return "|".join(f"/{re.escape(os.path.basename(folder))}/" for folder in folders)

    products = (
        (r"lora", "adapters: products"),
        (modules(mlps), "MLPs: products"),
        (modules(projections), "attention: projections"),
        (modules(attentions), "attention: scores and values"),
        (r"decode|compute_logits", "logits: products"),
    )
    others = (
        (modules(attentions), "attention: the rest"),
        (modules(mlps), "MLPs: the rest"),
        (r"dynamic_(update|index|slice)|^$|broadcast_in_dim$", "layers: what is kept, taken, cleared"),
    )
    return products, others


def group(product, op) -> str:
    """The purpose of an operation."""
    for regex, what in _groups()[0 if product else 1]:
        if re.search(regex, op):
            return what
    return "other products" if product else "all else"
