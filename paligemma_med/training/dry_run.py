"""What a training run would need, without running it: the train step is compiled on abstract arrays.

No data and no weights are read (except for config.adapter_init without config.lora, whose ranks are needed). All
figures are per device of the config's mesh, which consists of this machine's devices, or of chips that aren't here
(`parallel.chips`), for which the step is then compiled.

"temporary" holds only for the kind of device that the step was compiled for. A CPU multiplies in float32,
for which XLA allocates casts of bfloat16 weights, which a GPU or TPU doesn't need. So on a CPU a bfloat16
config is compiled a second time in float32 throughout: its temporary memory is an upper bound on what bfloat16
needs elsewhere.

A start needs memory, too, before the first step: weights are read and placed one after the other, and their
fingerprints taken (`start`).
"""

import dataclasses
import math
import time

import jax
from jax.extend import core

from paligemma_med import quantise, weights
from paligemma_med.checkpoints import fingerprint
from paligemma_med.models import flops
from paligemma_med.parallel import chips, compiled, hlo, notes, sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import describe
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step

# To keep the device busy, one step runs and another waits, each with its batch, and one more batch is prefetched.
_BATCHES_IN_USE = 3


@dataclasses.dataclass
class Traced:
    """A train step before compilation, and its arguments.

    Attributes:
      traced: jax.stages.Traced of (trained, opt_state, frozen, batch, i): its `jaxpr`, and by `lower()` its StableHLO.
      state: TrainState of jax.ShapeDtypeStruct with shardings.
      batch: {key: jax.ShapeDtypeStruct}.
    """

    setup: TrainingSetup
    traced: jax.stages.Traced
    state: states.TrainState
    batch: dict


@dataclasses.dataclass
class Step:
    """A train step on abstract arrays, compiled.

    Attributes:
      compiled: jax.stages.Compiled; takes (trained, opt_state, frozen, batch, i).
      state, batch: as in `Traced`.
      activations: bytes per device that the forward pass keeps for the backward pass.
      seconds: how long compiling took.
    """

    setup: TrainingSetup
    compiled: jax.stages.Compiled
    state: states.TrainState
    batch: dict
    activations: int
    seconds: float


def trace_step(setup: TrainingSetup) -> Traced:
    """Traces the step, which takes a few seconds for a model of any size."""
    state = states.abstract(setup)
    batch = abstract_batch(setup.config, setup.config.input.batch_size, setup.batch_sharding)
    step = train_step.jitted(setup, state.trained)
    with sharding.rules(setup.config, setup.mesh):
        i = jax.ShapeDtypeStruct((), "int32")
        traced = step.trace(state.trained, state.opt_state, state.frozen, batch, i)
    return Traced(setup, traced, state, batch)


def compile_step(setup: TrainingSetup) -> Step:
    """The result of `trace_step`, compiled for `chips.target`."""
    started = time.monotonic()
    t = trace_step(setup)
    with sharding.rules(setup.config, setup.mesh):
        compiled = chips.compile_for_target(t.traced.lower())
        seconds = time.monotonic() - started
        activations = saved_bytes(setup, t.state)
    return Step(setup, compiled, t.state, t.batch, activations, seconds)


def abstract_batch(config, size, where=None) -> dict[str, jax.ShapeDtypeStruct]:
    """{key: jax.ShapeDtypeStruct} of a training batch of `size` rows."""
    shapes = {"image": ((size, config.res, config.res, 3), "float32")}
    shapes |= {k: ((size, config.text_len + 1), "int32") for k in ("text", "mask_ar", "mask_loss")}
    if "image_after=" in str(config.input):  # its pp strings say where in the text the image is
        shapes["image_at"] = ((size,), "int32")
    return {k: jax.ShapeDtypeStruct(*x, sharding=where) for k, x in shapes.items()}


def rows_at_a_time(setup):
    """Examples that a device works on at a time."""
    config = setup.config
    parts = setup.mesh.shape[sharding.DATA_AXIS] * (config.get("grad_accum_steps") or 1)
    return max(1, config.input.batch_size // parts)


def saved_bytes(setup: TrainingSetup, state: states.TrainState) -> int:
    """Bytes that the backward pass reads from the forward pass, without weights and batch, on one device: for
    its rows of a micro-batch (activations that sharding_rules cut count whole)."""
    rows = rows_at_a_time(setup)
    batch = abstract_batch(setup.config, rows)
    batch["row_weight"] = jax.ShapeDtypeStruct((rows,), "float32")
    loss_fn = train_step.make_loss_fn(setup.config, setup.model)

    def saved(trained, frozen, batch, rng):
        loss = lambda x: loss_fn(x, frozen, batch, rng)[0]  # noqa: E731
        return jax.tree.leaves(jax.vjp(loss, trained)[1])

    trees = state.trained, state.frozen, batch
    plain = [{n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in tree.items()} for tree in trees]
    jaxpr = jax.make_jaxpr(saved)(*plain, jax.eval_shape(lambda: jax.random.key(0))).jaxpr
    inputs = set(jaxpr.invars)
    saved_vars = {v for v in jaxpr.outvars if isinstance(v, core.Var) and v not in inputs}
    return sum(v.aval.size * v.aval.dtype.itemsize for v in saved_vars)


@dataclasses.dataclass(frozen=True)
class Needed:
    """Bytes of a device's memory that a step moves even if nothing else left the chip's caches.

    Attributes:
      weights: read by products (`flops.weight_reads`).
      activations: kept for the backward pass, each written once and read once.
    """

    weights: int
    activations: int

    @property
    def sum(self) -> int:
        return self.weights + self.activations


def needed(step: Step) -> Needed:
    """What a step must move at least, on one device: its weights for each micro-batch, and what is kept. What passes
    from one kernel of a layer to the next isn't in it, nor gradients of weights and the optimizer."""
    setup, config = step.setup, step.setup.config
    leaves = {**step.state.frozen, **step.state.trained}
    stored = {}
    for name in setup.abstract:
        parts = [leaves[n] for n in (name, name + quantise.SCALE) if n in leaves]
        stored[name] = sum(_multiplied(x, setup.model.vocab_size in x.shape) for x in parts)
    passes = config.get("grad_accum_steps") or 1
    reads = flops.weight_reads(
        setup.model,
        setup.trained_names,
        stored,
        res=config.res,
        text_len=config.text_len,
        supervised_len=config.get("supervised_len"),
        loss_chunk=config.get("loss_chunk"),
    )
    return Needed(passes * reads, passes * 2 * step.activations)


def _multiplied(x, is_table):
    """Bytes of an array that a device multiplies by: cut along the batch's axis it is gathered, but for the table."""
    cut = 1
    for axes in x.sharding.spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            cut *= x.sharding.mesh.shape[axis] if is_table or axis != sharding.DATA_AXIS else 1
    return x.size * x.dtype.itemsize // cut


def traffic_line(step: Step, program: hlo.Program) -> str:
    """What a compiled step moves beside what is `needed`, for people."""
    least, gib = needed(step), 2**30
    return (
        f"  {'traffic / needed':<26} {compiled.moved(program) / least.sum:.3g}: weights read by each product "
        f"{least.weights / gib:.4g} GiB, activations kept, written and read, {least.activations / gib:.4g} GiB"
    )


def bytes_on_device(tree) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def memory(step: Step) -> dict[str, int]:
    """{what: bytes on one device} of a run with a compiled step; their sum is its peak."""
    analysis = step.compiled.memory_analysis()
    return {
        "frozen weights": bytes_on_device(step.state.frozen),
        "trained weights": bytes_on_device(step.state.trained),
        "optimizer state": bytes_on_device(step.state.opt_state),
        "batches": batches_held(step.setup.config) * bytes_on_device(step.batch),
        "temporary": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }


def batches_held(config) -> int:
    """How many batches are on the devices at a time."""
    return 1 + config.input.get("prefetch", 2) + _BATCHES_IN_USE


def start(setup: TrainingSetup, state: states.TrainState) -> int:
    """Bytes on one device, at most, before the first step: of weights on their way from files to their places, or of
    all weights and optimizer state while fingerprints are taken.

    A CPU's own memory also holds what is read: an array as its file has it, taken as float32, and in its new type.
    """
    leaves = {**state.frozen, **state.trained}
    on_cpu = setup.mesh.devices.flat[0].platform == "cpu"
    placed, most = 0, 0
    # In the order of `weights.place_params`. Scales of quantised leaves are placed with them.
    for name, x in sorted(setup.abstract.items(), key=lambda item: -item[1].size):
        stored = weights.stored_params({name: x}, setup)
        new = bytes_on_device(stored)
        copies = 4 * x.size + sum(s.size * s.dtype.itemsize for s in stored.values()) if on_cpu else 0
        most = max(most, placed + copies, placed + copies - 4 * x.size * on_cpu + new)
        placed += new
    largest = max(leaves.values(), key=bytes_on_device)
    shard = jax.ShapeDtypeStruct(largest.sharding.shard_shape(largest.shape), largest.dtype)
    return max(most, placed + bytes_on_device(state.opt_state) + fingerprint.temporary_bytes(shard))


def float32_twin(setup: TrainingSetup) -> TrainingSetup | None:
    """The same setup in float32 throughout, if this is a CPU and the config has bfloat16 (see this file's docstring);
    else None. Quantised weights stay quantised."""
    config = setup.config
    types = {k: str(config.get(k, "float32")) for k in ("dtype", "frozen_dtype")}
    if types["frozen_dtype"] in quantise.KINDS:
        del types["frozen_dtype"]
    if setup.mesh.devices.flat[0].platform != "cpu" or {*types.values()} == {"float32"}:
        return None
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.update({k: "float32" for k in types})
    return TrainingSetup.without_data(config)


def dry_run(config, hbm_gib=None) -> dict[str, float]:
    """Prints what training `config` would need; reads no weights and no data.

    Args:
      hbm_gib: memory of a device, in GiB; by default that of `chips.target`. On a CPU it means that of a GPU or TPU.

    Returns:
      The printed figures: {what: GiB on one device}, "peak" among them, and "peak_elsewhere" if that
      differs on a GPU or TPU; "activations", which are a part of "temporary"; "tflops" of a step on all
      devices together, and "tflops_executed", which counts what is recomputed as well. For chips that aren't here
      also "bound", the least seconds of a step by the roofline model, or None.

    Raises:
      ValueError: the config can't train, or doesn't fit in hbm_gib.
    """
    setup = TrainingSetup.without_data(config)
    if hbm_gib is None and chips.target():
        hbm_gib = chips.target().memory / 2**30
    print(describe.start(setup), flush=True)
    with notes.stage("compiling the train step"):
        step = compile_step(setup)
    parts = memory(step)
    out = {name: size / 2**30 for name, size in parts.items()}
    out["start"] = start(setup, step.state) / 2**30
    out["peak"] = max(sum(parts.values()) / 2**30, out["start"])
    # XLA may decide to recompute some of them.
    out["activations"] = min(step.activations, parts["temporary"]) / 2**30

    devices = setup.mesh.devices.flat
    print(f"Compiled in {step.seconds:.0f} s for {len(devices)} × {devices[0].device_kind}; on each, GiB:")
    for name in parts:
        print(f"  {name:<18} {out[name]:9.3f}")
        if name == "temporary":
            print(
                f"    activations kept for the backward pass of {rows_at_a_time(setup)} "
                f"examples: at most {out['activations']:.3f}"
            )
        if name == "batches":
            held, ahead = batches_held(setup.config), setup.config.input.get("prefetch", 2)
            print(f"    {held} of them: {ahead} ahead (config.input.prefetch), {held - ahead} in use and on their way")
    print(f"  {'a step':<18} {sum(parts.values()) / 2**30:9.3f}")
    print(f"  {'the start':<18} {out['start']:9.3f}    at most: weights being read, fingerprints")
    print(f"  {'peak':<18} {out['peak']:9.3f}")
    if (twin := float32_twin(setup)) is not None:
        elsewhere = compile_step(twin).compiled.memory_analysis().temp_size_in_bytes
        parts["temporary"] = elsewhere = min(elsewhere, parts["temporary"])
        out["peak_elsewhere"] = sum(parts.values()) / 2**30
        print(
            "That is for this CPU, which casts bfloat16 weights to float32. On a GPU or TPU expect a temporary of at "
            f"most {elsewhere / 2**30:.3f}, a peak of {out['peak_elsewhere']:.3f}."
        )
    out |= _print_flops(setup)
    if chips.target():
        out |= _print_program(step)
    if hbm_gib is not None:
        on_cpu = devices[0].platform == "cpu"
        check_fit(parts, hbm_gib, setup, least=0 if on_cpu else start(setup, step.state))
    return out


def _print_flops(setup):
    config, count = setup.config, setup.flops_per_example
    tera = config.input.batch_size / 1e12
    model, executed = (x * tera for x in (count.per_example_model, count.per_example_executed))
    print(
        f"TFLOPs of a step: {model:.4g} with weights, {count.per_example_attention * tera:.4g} in "
        f"attention, {count.per_example_recompute * tera:.4g} computed again: {executed:.4g}. "
        f"MFU counts the first: {flops.ACCOUNTING}."
    )
    devices = setup.mesh.devices.flat
    if peak := flops.peak(devices[0], config.get("peak_tflops")):
        seconds = executed * 1e12 / peak / len(devices)
        print(f"At the chip's peak a step would take {seconds:.3g} s.")
    return {"tflops": model, "tflops_executed": executed}


def _print_program(step):
    """What the compiled step does on one of the target's devices; see `parallel.compiled`."""
    setup = step.setup
    peak = flops.peak(setup.mesh.devices.flat[0], setup.config.get("peak_tflops"))
    program, bandwidth = hlo.Program(step.compiled.as_text()), chips.target().bandwidth
    print("What the compiled step does on each, kernels as chosen without trying them:")
    print(compiled.described(program, peak, bandwidth))
    print(traffic_line(step, program), flush=True)
    return {"bound": compiled.bound(program, peak, bandwidth).seconds}


_BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "nf4": 4}


def advice(part, setup) -> str:
    """What to change about the largest part; nothing that is set so already."""
    config, devices = setup.config, "cut {} over more devices with config.sharding_strategy"
    if part == "frozen weights":
        bits = _BITS.get(config.get("frozen_dtype", "float32"), 32)
        fewer = [repr(t) for t in ("bfloat16", "int8", "nf4") if _BITS[t] < bits]
        found = [f"set config.frozen_dtype to {' or '.join(fewer)}"] if fewer else []
        found.append(f"{devices.format('them')} (fsdp, tp)")
    elif part in ("trained weights", "optimizer state"):
        found = ["train fewer (config.lora, config.schedule)", devices.format("it" if "state" in part else "them")]
    elif part == "batches":
        ahead = ["config.input.prefetch"] if config.input.get("prefetch", 2) else []
        found = [f"lower {' or '.join(['config.input.batch_size', *ahead])}"]
    elif part == "temporary":
        found = ["raise config.grad_accum_steps"] if rows_at_a_time(setup) > 1 else []
        if not config.get("supervised_len"):
            found.append("set config.supervised_len")
        if not config.get("loss_chunk"):
            found.append("set config.loss_chunk")
        towers = [t for t in ("img", "llm") if _keeps(config.model.get(t))]
        if towers:
            where = " and ".join(f"config.model.{t}" for t in towers)
            found.append(f"keep less with remat_policy='nothing_saveable' in {where}")
    else:
        found = []
    return ", or ".join(found) or "take a larger device"


def _keeps(tower):
    """Whether a section of config.model has its layers keep more than their inputs."""
    return bool(tower) and tower.get("remat_policy", "nothing_saveable") != "nothing_saveable"


def check_fit(parts, hbm_gib, setup, least=0, advice=advice) -> None:
    """Prints that a run fits; otherwise raises ValueError with what to change.

    Args:
      parts: from `memory`.
      least: bytes that a device must have in any case (`start`).
      advice: a function of the largest part and `setup`.
    """
    # From a CPU the question is about another device; the peak above this line is the CPU's.
    of = " of a GPU or TPU" if setup.mesh.devices.flat[0].platform == "cpu" else ""
    peak = max(sum(parts.values()), least) / 2**30
    if peak <= hbm_gib:
        print(f"Fits: {peak:.2f} of {hbm_gib:.4g} GiB{of}.")
        return
    largest = max(parts, key=parts.get)
    raise ValueError(
        f"The run doesn't fit: {peak:.2f} GiB on each device, but there are {hbm_gib:.4g}{of}. Its "
        f"largest part is {largest} with {parts[largest] / 2**30:.2f}: {advice(largest, setup)}."
    )
