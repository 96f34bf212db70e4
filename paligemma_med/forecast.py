"""What answering questions would take, without weights, data or the device: the programs of `evaluate` and `explain`,
compiled on abstract arrays for this machine's devices, or for chips that aren't here (`parallel.chips`).

Weights are as `weights.load` places them: all of them in config.frozen_dtype, by config.sharding_strategy. Texts are as
long as their pp string leaves room for. A real batch is cut to its longest prompt (`decode.bucket`), and takes less.
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from paligemma_med import decode, experiment, weights
from paligemma_med.config import values as config_values
from paligemma_med.decode import losses, options
from paligemma_med.decode.generate import lower as lower_answers
from paligemma_med.input_pipeline import devices
from paligemma_med.models import flops
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import chips, compiled, hlo, notes, sharding
from paligemma_med.pp import registry
from paligemma_med.saliency import capture, occlusion, passes, relevancy, report, trace
from paligemma_med.setup import Setup
from paligemma_med.training import dry_run, find_batch_size, state

PROGRAMS = ("answers", "dialogues", "losses")  # what an evaluator's PROGRAM may be
_MOST = 4096  # questions at a time; more make no chip faster
_HELD = 2  # batches on the devices: the one that is asked about, and the next


@dataclasses.dataclass(frozen=True)
class Program:
    """A program on abstract arrays.

    Attributes:
      name: of the evaluation and what is computed, such as "test: answers".
      lower: gives it as a `jax.stages.Lowered`.
      batch: {key: jax.ShapeDtypeStruct} of what it is given besides weights.
      rows: of a batch on one device; text_len: tokens of each.
      round: what its loop without a known length does each time round; "" if it has none. rounds: how often, at most.
      filters: whether top-k or top-p is asked for, between which and none a program chooses as it runs.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    batch: dict[str, Any]
    rows: int
    text_len: int
    round: str = ""
    rounds: int = 0
    filters: bool = False


def of_evals(setup: Setup, text_len: int | None = None) -> list[Program]:
    """The programs of config.evals.

    Args:
      text_len: tokens of the longest prompt; by default what each pp string leaves room for.

    Raises:
      ValueError: a mistake in a section, or one that nothing here is compiled for.
    """
    found = []
    for name, section in (setup.config.get("evals") or {}).items():
        found += _of_section(setup, name, section, text_len)
    if not found:
        raise ValueError("config.evals is empty: there is nothing to compile.")
    return found


def _of_section(setup, name, section, text_len=None):
    where = f"config.evals.{name}"
    if config_values.is_big_visions(section):
        raise ValueError(
            f"{where}.type is {section.type!r}, big_vision's own, which has no program here: --only chooses others."
        )
    module = experiment.evaluator_module(section.type, where)
    kind = getattr(module, "PROGRAM", None)
    if kind not in PROGRAMS:
        raise ValueError(
            f"{where}.type is {section.type!r}, whose file doesn't say what it has a model compute: expected a "
            f"PROGRAM, one of {', '.join(PROGRAMS)}."
        )
    experiment.check_eval_keys(section, module.Evaluator, where)
    rows = devices.check_batch_size(section.batch_size, setup.mesh, f"{where}.batch_size")
    text_key = "prompt_pp" if kind == "dialogues" else "pp_fn"
    length = text_length(section[text_key], f"{where}.{text_key}")
    batch = _batch(setup, rows, length, "image_after=" in section[text_key])
    if kind == "losses":
        return [_losses(setup, name, section, batch)]
    out = []
    if kind == "dialogues":
        out, batch = _encoded(setup, name, batch)
    cut = decode.bucket(min(text_len or length, length), length)
    return [*out, *_answers(setup, name, section, batch, cut)]


def text_length(pp: str, where: str) -> int:
    """Tokens of a text after these preprocessing ops, which end in tolen(…, key='text')."""
    for section in reversed(registry.split(pp)):
        name, args, kw = registry.parse_call(section)
        length = args[0] if args else kw.get("length")
        if name == "tolen" and "text" in (kw.get("key"), kw.get("outkey")) and length:
            return int(length)
    raise ValueError(f"{where} has no tolen(…, key='text'), so that nothing says how long texts are: {pp!r}")


def _batch(setup, rows, length, image_at, where=None):
    """What all programs read of a batch, and `mask_input`, `skip` and `row_id` of those that generate."""
    where = where or sharding.batch_sharding(setup.mesh)
    res = setup.config.res

    def array(shape, dtype):
        return jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=where)

    out = dict(image=array((res, res, 3), "float32"), skip=array((), "bool"), row_id=array((), "uint32"))
    out |= {k: array((length,), "int32") for k in ("text", "mask_ar", "mask_input")}
    return out | (dict(image_at=array((), "int32")) if image_at else {})


def params_of(setup: Setup) -> dict:
    """The model's parameters as `weights.load` would place them: a nested tree of shapes with shardings."""
    return unflatten_tree(weights.stored_params(setup.abstract, setup))


def _rows(setup, batch):
    return max(1, batch["text"].shape[0] // setup.mesh.shape[sharding.DATA_AXIS])


def _losses(setup, name, section, batch):
    renamed = dict(mask_input="mask_loss", skip="_mask")  # of the same shapes and types
    batch = {renamed.get(k, k): x for k, x in batch.items() if k != "row_id"}
    chunk, length = section.get("loss_chunk", 16), batch["text"].shape[1]
    return Program(
        f"{name}: losses",
        lambda: losses.answer_losses.lower(setup.model, params_of(setup), batch, chunk=chunk),
        batch,
        _rows(setup, batch),
        length - 1,
        round=f"{chunk} tokens of each row's answer",
        rounds=-(-(length - 1) // chunk),
    )


def _answers(setup, name, section, batch, text_len):
    model, kw = setup.model, {"max_new_tokens": 32, **(section.get("pred_kw") or {})}
    filters = bool(kw.get("top_k")) or kw.get("top_p", 1.0) < 1
    counts = {k: kw[k] for k in ("max_new_tokens", "num_samples", "temperature") if k in kw}
    shapes = dict(batch=batch, rows=_rows(setup, batch), text_len=text_len)
    out = [
        Program(
            f"{name}: answers",
            lambda: lower_answers(model, params_of(setup), batch, text_len=text_len, **counts),
            round="one token of every answer",
            rounds=kw["max_new_tokens"] - 1,
            filters=filters,
            **shapes,
        )
    ]
    if section.get("options"):
        # A letter and EOS in the smallest length; texts at most as long as answers.
        length = 4 if section.options == "letter" else 1 << max(2, (kw["max_new_tokens"] - 1).bit_length())
        count, read = len(section.choices), {k: x for k, x in batch.items() if k != "row_id"}
        out.append(
            Program(
                f"{name}: options",
                lambda: options.lower(model, params_of(setup), read, count, length, text_len=text_len),
                round="one token of every option",
                rounds=length - 1,
                **shapes,
            )
        )
    return out


def _encoded(setup, name, batch):
    """The program that encodes images alone, and the batch with their tokens in place of them."""
    image, model = batch["image"], setup.model
    program = Program(
        f"{name}: images",
        lambda: decode.encode_images.lower(model, params_of(setup), image),
        {"image": image},
        _rows(setup, batch),
        batch["text"].shape[1],
    )
    tokens = jax.eval_shape(lambda p, x: decode.encode_images(model, p, x), params_of(setup), image)
    zimg = jax.ShapeDtypeStruct(tokens.shape, tokens.dtype, sharding=image.sharding)
    return [program], {k: x for k, x in batch.items() if k != "image"} | {"zimg": zimg}


def of_saliency(setup: Setup, *, num_samples=5, max_new_tokens=64, methods=("rollout", "relevancy", "occlusion")):
    """The programs of a page of `explain`, for questions and answers of any length, as with --serve: list of `Program`.

    Raises:
      ValueError: the config has no predict_pp, or can't be captured.
    """
    if not setup.config.get("predict_pp"):
        raise ValueError("config has no predict_pp, which makes a prompt of a question.")
    pp = setup.config.predict_pp
    model, length = capture.capturable(setup.model), text_length(pp, "config.predict_pp")
    whole = sharding.replicated(setup.mesh)
    batch = lambda rows, length: _batch(setup, rows, length, "image_after=" in pp, whole)  # noqa: E731

    def answers(name, rows, samples, temperature):
        given = batch(rows, length)
        kw = dict(num_samples=samples, temperature=temperature, max_new_tokens=max_new_tokens, text_len=length)
        lower = lambda: lower_answers(model, params_of(setup), given, **kw)  # noqa: E731
        return Program(name, lower, given, rows, length, "one token of every answer", max_new_tokens - 1)

    out = [answers("the answer, and those to a grey and a shuffled image", 3, 1, 0.0)]
    if num_samples:
        out.append(answers("sampled answers", 1, num_samples, 1.0))
    total = -(-(length + max_new_tokens) // 16) * 16
    read = {k: x for k, x in batch(1, total).items() if k in trace.INPUTS}
    count = -(-max_new_tokens // trace.MULTIPLE) * trace.MULTIPLE
    queries = jax.ShapeDtypeStruct((count,), "int32")
    add = lambda name, lower, rows=1, given=read: out.append(Program(name, lower, given, rows, total))  # noqa: E731
    add("attention and rollout", lambda: passes.lower(model, params_of(setup), read, queries))
    if "relevancy" in methods:
        add("relevancy of the first tokens", lambda: relevancy.lower(model, params_of(setup), read, max_new_tokens))
    if "occlusion" in methods:
        params = params_of(setup)
        size = report.batch_size_for(params) if chips.backend() == "cpu" else report.BATCH
        images = {**read, "image": batch(size, total)["image"]}
        add("occlusion", lambda: occlusion.lower(model, params, read, size, count), size, images)
    return out


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A `Program`, compiled in so many seconds."""

    program: Program
    compiled: jax.stages.Compiled
    seconds: float

    @property
    def parts(self) -> tuple[hlo.Program, hlo.Program | None]:
        """What runs once for a batch, and what runs in each round of its loop, without filters unless asked for."""
        text = hlo.Program(self.compiled.as_text())
        return (text if self.program.filters else text.least()).around_the_loop()


def compile_program(setup: Setup, program: Program) -> Compiled:
    """Compiles for `chips.target`."""
    started = time.monotonic()
    with notes.stage(f"compiling {program.name}"), sharding.rules(setup.config, setup.mesh):
        made = chips.compile_for_target(program.lower())
    return Compiled(program, made, time.monotonic() - started)


def memory(setup: Setup, made: Compiled) -> dict[str, int]:
    """{what: bytes on one device} while it runs; their sum is its peak."""
    analysis = made.compiled.memory_analysis()
    return {
        "weights": dry_run.bytes_on_device(params_of(setup)),
        "batches": _HELD * dry_run.bytes_on_device(made.program.batch),
        "temporary": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "program": analysis.generated_code_size_in_bytes,
    }


def run(setup: Setup, programs: list[Program], advice: str) -> dict[str, dict]:
    """Compiles the programs, and prints what each takes and does on one device.

    Args:
      advice: what to change where one doesn't fit.

    Returns:
      {name: figures}: {part of memory: GiB}, "peak", and for chips that aren't here "bound" and "bound_of_round", least
      seconds by the roofline model.

    Raises:
      ValueError: one doesn't fit in the memory of `chips.target`.
    """
    chip, where = chips.target(), setup.mesh.devices.flat
    peak = flops.peak(where[0], setup.config.get("peak_tflops"))
    bandwidth = chip and chip.bandwidth
    start = dry_run.start(setup, state.TrainState({}, None, weights.stored_params(setup.abstract, setup)))
    out, largest = {}, {}
    for program in programs:
        made = compile_program(setup, program)
        parts = memory(setup, made)
        figures = out[program.name] = {k: size / 2**30 for k, size in parts.items()}
        figures["peak"] = sum(parts.values()) / 2**30
        largest = max(largest, parts, key=lambda x: sum(x.values()))
        print(
            f"{program.name}, {program.rows} rows with texts of {program.text_len} tokens: compiled in "
            f"{made.seconds:.0f} s for {len(where)} × {where[0].device_kind}; on each, GiB:"
        )
        print("  " + ", ".join(f"{k} {figures[k]:.3f}" for k in parts) + f": {figures['peak']:.3f}")
        once, each = made.parts
        figures["bound"] = _describe("for a batch" if each is None else "once for a batch", once, peak, bandwidth)
        if each is not None:
            what = f"for {program.round}, {program.rounds} times at most"
            figures["bound_of_round"] = _describe(what, each, peak, bandwidth)
    print(f"The start, weights being read and their fingerprints taken: at most {start / 2**30:.3f} GiB.")
    if chip:
        dry_run.check_fit(largest, chip.memory / 2**30, setup, start, lambda part, setup: _advice(part, setup, advice))
    elif where[0].platform == "cpu" and _is_short(setup.config):
        print("That is for this CPU, which computes in float32; --chip=… compiles for a GPU or TPU.")
    return out


def _describe(what, program, peak, bandwidth):
    print(f" {what}:")
    print(compiled.described(program, peak, bandwidth), flush=True)
    return compiled.bound(program, peak, bandwidth).seconds


def _is_short(config):
    return {str(config.get(k, "float32")) for k in ("dtype", "frozen_dtype")} != {"float32"}


def _advice(part, setup, advice):
    return dry_run.advice("frozen weights", setup) if part == "weights" else advice


def find_batch_sizes(setup: Setup, text_len: int | None = None) -> dict[str, int]:
    """Prints how many questions at a time fit on `chips.target`, for each section of config.evals, by compiling; gives
    {name: rows of a batch on all devices together}.

    Raises:
      ValueError: not even one row on each device fits; as `of_evals`.
    """
    memory_of_chip = chips.target().memory / 2**30
    shards = setup.mesh.shape[sharding.DATA_AXIS]
    of_evals(setup, text_len)  # refuses what can't be compiled
    out = {}
    for name, section in setup.config.evals.items():
        known = {}

        def peak(rows, name=name, section=section, known=known):
            section = section.copy_and_resolve_references()
            section.batch_size = rows * shards
            sizes = [memory(setup, compile_program(setup, p)) for p in _of_section(setup, name, section, text_len)]
            known[rows] = max(sizes, key=lambda x: sum(x.values()))
            size = sum(known[rows].values()) / 2**30
            print(f"{name}: {rows * shards:5d} rows at a time: {size:.2f} GiB on each device", flush=True)
            return size

        rows = find_batch_size.search(peak, memory_of_chip, _MOST)
        if not rows:
            dry_run.check_fit(known[1], memory_of_chip, setup, advice=lambda p, s: _advice(p, s, ADVICE))
        out[name] = rows * shards
        print(f"Fits into {memory_of_chip:.4g} GiB: --config.evals.{name}.batch_size={out[name]}")
    return out


ADVICE = "lower batch_size, or pred_kw.num_samples, of the section of config.evals"
ADVICE_OF_SALIENCY = "lower config.res or --num_samples, or leave methods out"
