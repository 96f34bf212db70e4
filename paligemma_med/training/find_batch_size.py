"""Finds how many examples fit on a device at a time, by compiling instead of crashing.

    python -m paligemma_med.train --config=configs/stage2_rocov2.py --find_batch_size --hbm_gib=24

The memory of each batch size is predicted as in `dry_run`, so that no device of that size, no weights and
no data are needed. Memory grows almost linearly with the number of examples, so five to seven compilations
are enough. A config that accumulates gradients keeps its batch size, as far as it divides, and only its
micro-batches change; otherwise the batch itself grows or shrinks.
"""

import dataclasses
import math

import jax

from paligemma_med import quantise
from paligemma_med.parallel import notes, sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run

_MOST = 4096  # examples at a time on a device; more don't make a chip faster


def find_batch_size(config, hbm_gib) -> dict:
    """Prints how many examples at a time fit, and the flags that set it.

    Args:
      config: any training config.
      hbm_gib: memory of a device, in GiB. On a CPU it means that of a GPU or TPU, and an upper bound on
        bfloat16's memory there is used (`dry_run`).

    Returns:
      dict: rows, the maximum of examples at a time on a device; peaks, {examples at a time: GiB} of every
      compilation; batch_size and grad_accum_steps for the config's own batch, cut into equal parts that fit
      (rows_of_own examples at a time, peak_of_own GiB).

    Raises:
      ValueError: the config can't train, or not even one example fits.
    """
    setup = TrainingSetup.without_data(config)
    config = setup.config
    # By rows and accumulated steps, since the config's own batch may be cut otherwise.
    known = {}

    def peak(rows, accum):
        if (rows, accum) not in known:
            with notes.stage("compiling the train step"):
                known[rows, accum] = _parts(_resized(setup, rows, accum))
            parts = known[rows, accum]
            size = sum(parts.values()) / 2**30
            what = "example" if rows == 1 else "examples"
            print(f"{rows:5d} {what} at a time on each device, {accum} times a step: {size:.2f} GiB", flush=True)
        return sum(known[rows, accum].values()) / 2**30

    shards = setup.batch_sharding.mesh.shape[sharding.DATA_AXIS]
    whole = config.input.batch_size // shards
    accumulates = (config.get("grad_accum_steps") or 1) > 1

    def steps_of(rows):
        return max(1, whole // rows) if accumulates else 1

    rows = search(lambda n: peak(n, steps_of(n)), hbm_gib, _MOST)
    if not rows:
        dry_run.check_fit(known[1, steps_of(1)], hbm_gib, setup)
    out = dict(rows=rows, peaks={n: peak(n, k) for n, k in sorted(known)})
    where = f"each of {shards} devices" if shards > 1 else "the device"
    print(f"Fits into {hbm_gib:.4g} GiB: {rows} at a time on {where}, {out['peaks'][rows]:.2f} GiB.")
    if not accumulates:
        print(f"As one batch: --config.input.batch_size={rows * shards}")
    # Equal parts only; since accumulating also needs memory, the largest may not fit after all.
    for own in (n for n in range(min(rows, whole), 0, -1) if whole % n == 0):
        if peak(own, whole // own) <= hbm_gib:
            break
    else:
        return out
    out |= dict(batch_size=whole * shards, grad_accum_steps=whole // own, rows_of_own=own)
    out["peak_of_own"] = peak(own, whole // own)
    print(
        f"For the config's {whole * shards} examples a step: --config.grad_accum_steps="
        f"{whole // own} ({own} at a time, {out['peak_of_own']:.2f} GiB)"
    )
    return out


def search(peak, limit, most) -> int:
    """The largest n from 1 to `most` with peak(n) ≤ limit, or 0.

    Args:
      peak: an increasing function of n. It is called a few times if it is almost linear, and about
        2 · log2(n) times at worst.
    """
    known = {}
    low, high, n = 0, most + 1, 1
    halve = False
    while high - low > 1:
        before = high - low
        known[n] = peak(n)
        low, high = (n, high) if known[n] <= limit else (low, n)
        if not low:
            break
        # By the line through both ends, or through the last two points while there is no upper end; by halving
        # if that gained little, since on a curve such guesses may converge slowly.
        a, b = (low, high) if high in known else (sorted(known) * 2)[-2:]
        rise = known[b] - known[a]
        if high in known and halve or rise <= 0:
            guess = (low + high) // 2 if high in known else 2 * low
        else:
            guess = min(math.floor(a + (limit - known[a]) * ((b - a) / rise)), most)
        halve = high in known and not halve and high - low > before // 2
        n = min(max(guess, low + 1), high - 1)
    return low


def _resized(setup, rows, accum):
    """The same with so many examples at a time on a device, so many times a step."""
    config = setup.config.copy_and_resolve_references()
    with config.unlocked():
        config.input.batch_size = rows * accum * setup.mesh.shape[sharding.DATA_AXIS]
        config.grad_accum_steps = accum
    return TrainingSetup.without_data(config)


def _parts(setup):
    """`dry_run.memory`; on a CPU, of a GPU or TPU as far as that can be known."""
    elsewhere = dry_run.float32_twin(setup)
    if elsewhere is None:
        return dry_run.memory(dry_run.compile_step(setup))
    step = dry_run.compile_step(elsewhere)
    dtype = setup.config.get("frozen_dtype", "float32")
    if dtype in quantise.KINDS:
        return dry_run.memory(step)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), step.state.frozen)
    return dry_run.memory(dataclasses.replace(step, state=dataclasses.replace(step.state, frozen=frozen)))
