"""A training step against that of transformers + peft, or of big_vision, on the same work.

    python -m tools.bench train_step --size=bench-s --peer=hf
    BIG_VISION_DIR=~/big_vision python -m tools.bench train_step --peer=big_vision
    python -m tools.bench train_step --size=3b-448 --peer=hf --batch_size=8

Both sides have the same weights, batch, trained parameters and optimizer; before timing they take a few
steps each, whose losses must be equal (in float32; in bfloat16 they are only reported). They run in
separate processes on the same cores (`workers`) and take turns, so that a busy machine slows both. A turn
ends when the last loss is known. Figures are medians over turns; compilation and first steps are left
out. `cpu_ratio` compares processor time.

The peer's batch size may differ (--peer_batch_size), for example if its memory allows less: `ratio`
compares seconds per example. `of_peak` is the achieved rate of the model's FLOPs
(`paligemma_med.models.flops`, 4N for adapters; logits at supervised positions) divided by that of the
fastest product of two large matrices, in the same type, that any side made in the same run.

On a shared machine PyTorch's threads busy-wait for each other, and the ratio grows. With --cores=1 there
is no such waiting, and `cpu_ratio` hardly depends on other load.
"""

from tools.bench import sizes, turns

_SAME = 1e-4  # of losses in float32, relative
_WARM_UP = 3  # steps; with fewer, the adapters' first factors have hardly changed


def run(
    *,
    size,
    peer,
    what,
    dtype,
    batch_size,
    peer_batch_size,
    rounds,
    steps,
    remat_policy,
    scan,
    attn_impl,
    frozen_dtype,
    cores,
    weights=None,
) -> dict:
    """Measures both.

    Args:
      size: a name in `sizes.SIZES`, which gives the defaults of dtype, batch_size and cores, and of our
        remat_policy and scan.
      peer: "hf", "big_vision" or "none".
      what: what is trained: "lora", "stage1" or "full".
      peer_batch_size: by default ours.
      rounds, steps: turns of each side, and steps in a turn.
      attn_impl: ours, in both towers.
      frozen_dtype: ours, "int8" or "nf4": how frozen weights are stored, instead of dtype. Losses are
        then not compared.
      weights: folder to keep weights in.

    Returns:
      dict: medians, `ratio` (the peer's seconds per example over ours), `cpu_ratio`, memory, achieved
      FLOP/s, the conditions of the measurement, and "row", a line of a Markdown table.

    Raises:
      ValueError: an unknown name, a peer that isn't installed, sides on different devices, or losses
        that differ.
    """
    sizes.check(size, what, dtype)
    turns.check(
        peer,
        ("hf", "big_vision", "none"),
        rounds=rounds,
        steps=steps,
        batch_size=batch_size,
        peer_batch_size=peer_batch_size,
    )
    settings = turns.model_settings(size, dtype, cores, remat_policy, scan, attn_impl)
    settings |= dict(work="train_step", what=what, frozen_dtype=frozen_dtype)
    if frozen_dtype not in (None, "int8", "nf4"):
        raise ValueError(f"--frozen_dtype is {frozen_dtype!r}; expected 'int8' or 'nf4'.")
    rows = {"ours": batch_size or sizes.SIZES[size].batch_size}
    if peer != "none":
        rows[peer] = peer_batch_size or rows["ours"]
    turns.bind(settings["cores"])
    with turns.weights(size, settings["dtype"], weights) as folder:
        with turns.sides(rows, {**settings, "weights": folder}) as sides:
            first = first_steps(sides, rows, settings)
            found = turns.take(sides, rows, rounds, steps)
            about = {n: s.about for n, s in sides.items()}
    out = {
        "size": size,
        "what": what,
        "dtype": settings["dtype"],
        "batch_size": rows,
        "parameters": about["ours"]["parameters"],
        "trained": about["ours"]["trained"],
        "rounds": rounds,
        "steps_a_round": steps,
        "ours": {k: settings[k] for k in ("remat_policy", "scan", "attn_impl", "frozen_dtype")},
        "losses": first,
        "units": "examples",
        **found,
        **turns.surroundings(list(about.values())),
    }
    dtype = settings["dtype"] + (f", frozen {frozen_dtype}" if frozen_dtype else "")
    work = f"{what}, {size}, {dtype}, batch {rows['ours']}"
    if peer != "none" and rows[peer] != rows["ours"]:
        work += f" and {rows[peer]}"
    return {**out, "row": turns.row(work, out, peer)}


def first_steps(sides, rows, settings):
    """{name: losses}; ValueError if the sides don't do the same work."""
    trained = {n: s.about["trained"] for n, s in sides.items()}
    if len(set(trained.values())) > 1:
        raise ValueError(f"the sides train different numbers of parameters: {trained}.")
    first = {n: s.ask(do="steps", n=_WARM_UP)["values"] for n, s in sides.items()}
    # With different batches the work differs, and with quantised weights the weights do.
    if len(set(rows.values())) == 1 and not settings["frozen_dtype"]:
        check_losses(first, settings["dtype"], "ours")
    return first


def check_losses(losses, dtype, one) -> None:
    """Raises ValueError unless all sides have the losses of side `one`, as the same work must. In bfloat16
    sides round differently, and nothing is checked."""
    if dtype == "float32":
        turns.same(losses, one, _SAME, "loss of {} at step")
