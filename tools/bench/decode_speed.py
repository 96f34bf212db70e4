"""Sampled answers to questions: `decode.generate` against transformers' `generate` on the same work.

    python -m tools.bench decode --size=bench-s --peer=hf
    python -m tools.bench decode --size=3b-448 --peer=hf --batch_size=8

Both sides have the same random weights, images, prompts and number type, run in separate processes on
the same cores (`workers`), and draw `samples` answers of exactly `tokens` tokens to each question at
temperature 1: no token is an EOS, so that neither side can stop early. The peer is called in the usual
way, with `num_return_sequences=samples`; it pads on the left to the longest prompt. Before timing, the
greedy answers of both are compared: in float32 they must be equal (in bfloat16 the equal share is
reported). Compilation (ours) and a first call (theirs) are left out; turns alternate. On a shared
machine `cpu_ratio` (processor time of all threads) is the steadier figure.

What the ratio depends on: the peer reads a prompt once per sample, we once. With N prefill positions
and M new tokens the largest possible gain is samples·(N + M) / (N + samples·M), reduced because a decoding
step with few rows costs more than a position of a prefill. `of_peak` counts for both sides what ours must
compute (`flops.count_answers`).
"""

import numpy as np

from tools.bench import sizes, turns


def run(*, size, peer, dtype, batch_size, rounds, samples, tokens, scan, attn_impl, cores, weights=None) -> dict:
    """Measures both.

    Args:
      size: a name in `sizes.SIZES`, which gives the defaults of dtype, batch_size (questions), cores
        and our `scan`.
      peer: "hf" or "none".
      rounds: turns of each side, with one call in each.
      attn_impl: ours, in both towers.
      weights: folder to keep weights in.

    Returns:
      dict: medians, `ratio` (the peer's seconds over ours), `cpu_ratio`, memory, achieved FLOP/s, the
      conditions of the measurement, and "row", a line of a Markdown table.

    Raises:
      ValueError: an unknown name, sides on different devices, or other greedy answers.
    """
    sizes.check(size, "lora", dtype)
    turns.check(peer, ("hf", "none"), rounds=rounds, samples=samples, tokens=tokens, batch_size=batch_size)
    settings = turns.model_settings(size, dtype, cores, scan=scan, attn_impl=attn_impl)
    settings |= dict(work="decode", samples=samples, tokens=tokens)
    rows = batch_size or sizes.SIZES[size].batch_size
    names = ["ours"] + [peer] * (peer != "none")
    turns.bind(settings["cores"])
    with turns.weights(size, settings["dtype"], weights) as folder:
        with turns.sides(dict.fromkeys(names, rows), {**settings, "weights": folder}) as sides:
            same = check_answers({n: s.ask(do="result")["result"] for n, s in sides.items()}, settings["dtype"])
            for name, side in sides.items():
                drawn = side.ask(do="steps", n=1)["values"][0]
                if drawn != rows * samples * tokens:
                    raise ValueError(
                        f"{name} drew {drawn:.0f} tokens; expected {rows} questions × {samples} answers × {tokens}."
                    )
            found = turns.take(sides, dict.fromkeys(names, rows * samples), rounds, 1)
            about = [s.about for s in sides.values()]
    out = {
        "size": size,
        "dtype": settings["dtype"],
        "batch_size": rows,
        "samples": samples,
        "tokens": tokens,
        "cores": settings["cores"],
        "parameters": about[0]["parameters"],
        "rounds": rounds,
        "ours": {k: settings[k] for k in ("scan", "attn_impl")},
        "same_greedy_tokens": same,
        "units": "answers",
        **found,
        **turns.surroundings(about),
    }
    work = f"{rows} × {samples} answers of {tokens}, {size}, {settings['dtype']}"
    return {**out, "row": turns.row(work, out, peer)}


def check_answers(greedy, dtype) -> dict[str, float]:
    """{name: share of its greedy tokens that equal ours}; ValueError if some in float32 don't. In bfloat16
    the sides round differently, and one different token changes all later ones."""
    ours = np.asarray(greedy["ours"])
    same = {}
    for name, found in greedy.items():
        if np.shape(found) != ours.shape:
            raise ValueError(f"greedy answers of {name} have shape {np.shape(found)}, ours {ours.shape}.")
        same[name] = round(float(np.mean(np.asarray(found) == ours)), 4)
        if dtype == "float32" and not np.array_equal(found, ours):
            raise ValueError(f"greedy answers of {name} differ from ours: {same[name]:.1%} are the same.")
    return same
