"""Rollout of an answer's attention: `saliency.capture` against transformers' attentions.

    python -m tools.bench saliency --size=bench-s --peer=hf

The work is one teacher-forced pass over one image, question and answer that gives attention rollout (the
mean over heads) of both towers and the answer's log-probabilities. Ours streams it layer by layer
(`capture.streamed`). The peer does what tools for transformers do: eager attention,
`output_attentions=True`, then the product of the layers' matrices. Both have the same weights and
sequence and run in separate processes (`workers`), taking turns; before timing, the answer's rows of the
rollout and its log-probabilities are compared: in float32 they must be equal.

Figures are those of a training step; `of_peak` counts the pass without capture and rollout
(`flops.count_pass`). `tools.bench saliency_memory` measures what capture adds to a compiled program's
memory.
"""

import numpy as np

from tools.bench import sizes, turns

_SAME = 1e-4  # relative, of float32


def run(*, size, peer, dtype, rounds, steps, cores, weights=None) -> dict:
    """Measures both.

    Args:
      size: a name in `sizes.SIZES`, which gives the defaults of dtype and cores.
      peer: "hf" or "none".
      rounds, steps: turns of each side, and passes in a turn.
      weights: folder to keep weights in.

    Returns:
      dict: medians, `ratio` (the peer's seconds over ours), `cpu_ratio`, memory, achieved FLOP/s,
      `largest_difference` of rollout and of log-probabilities, the conditions of the measurement, and
      "row", a line of a Markdown table.

    Raises:
      ValueError: an unknown name, sides on different devices, or another rollout.
    """
    sizes.check(size, "lora", dtype)
    turns.check(peer, ("hf", "none"), rounds=rounds, steps=steps)
    settings = turns.model_settings(size, dtype, cores, scan=True)
    rows = dict.fromkeys(["ours"] + [peer] * (peer != "none"), 1)
    turns.bind(settings["cores"])
    with turns.weights(size, settings["dtype"], weights) as folder:
        made = {**settings, "work": "saliency", "weights": folder}
        with turns.sides(rows, made) as sides:
            found = {n: s.ask(do="result")["result"] for n, s in sides.items()}
            differ = check_results(found, settings["dtype"])
            for side in sides.values():
                side.ask(do="steps", n=1)
            found = turns.take(sides, rows, rounds, steps)
            about = [s.about for s in sides.values()]
    out = {
        "size": size,
        "dtype": settings["dtype"],
        "cores": settings["cores"],
        "parameters": about[0]["parameters"],
        "rounds": rounds,
        "steps_a_round": steps,
        "largest_difference": differ,
        "units": "answers",
        **found,
        **turns.surroundings(about),
    }
    return {**out, "row": turns.row(f"rollout, {size}, {settings['dtype']}", out, peer)}


def check_results(found, dtype) -> dict:
    """{what: {name: largest difference from ours, relative to our largest value}}; ValueError if one in
    float32 exceeds rounding. found: {name: {what: nested list}}."""
    out = {}
    for what, ours in found["ours"].items():
        ours = np.asarray(ours)
        out[what] = {}
        for name, theirs in found.items():
            theirs = np.asarray(theirs[what])
            if theirs.shape != ours.shape:
                raise ValueError(f"{what} of {name} has shape {theirs.shape}, that of ours {ours.shape}.")
            differ = float(np.max(np.abs(theirs - ours)) / np.max(np.abs(ours)))
            if dtype == "float32" and not differ <= _SAME:
                raise ValueError(f"{what} of {name} differs from ours by {differ:.2g} of it.")
            out[what][name] = float(f"{differ:.2g}")
    return out
