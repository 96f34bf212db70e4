"""What a compiled train step, or another program, shouldn't hold or do, looked for in its text.

    python -m tools.audit --config=configs/stage1_slake.py --chip=h200
    python -m tools.audit --config=configs/stage2_rocov2.py:micro=48,accum=1 --chip=h200:8 --save=step.hlo.gz
    python -m tools.audit --config=configs/stage2_rocov2.py --chip=h200 --program=decode

--program: train; of the first of config.evals that generates, prefill (what runs once for a batch) or decode (what runs
for each token); saliency (attention, rollout and relevancy as `explain` computes them). See `forecast`.

No weights and no data are read, and no such chip is needed (`parallel.chips`). Without --chip the step is compiled for
this machine. Each finding is a line; with any the program ends with status 1. Then follows how much a train step moves
beside the weights and activations that it needs, and which kernels move most. Looked for are:

    product     float32 × float32 in a bfloat16 model
    weights     something of the size of all layers of a frozen kernel, or of the vocabulary table, made outside of a
                fused kernel: a copy, a transpose, a conversion, dense values of quantised ones; of trained ones, copies
    logits      an array of all text tokens × the vocabulary
    donated     trained leaves or optimizer state whose memory no result takes
    gathered    weights of more than one layer brought together; a layer's waited for as soon as they are asked for
    recomputed  more products than the model's formula has (`models.flops`)
    cut out     of decode: a layer's weights, keys or values copied out of their stack before they are multiplied
"""

import collections
import contextlib
import dataclasses
import gzip
import math
import re
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli, forecast, weights
from paligemma_med.parallel import chips, compiled, hlo, notes, sharding
from paligemma_med.pp import command_line
from paligemma_med.setup import Setup, TrainingSetup
from paligemma_med.training import dry_run

PROGRAMS = ("train", "prefill", "decode", "saliency")
# Products in float32 that are meant: patterns of the operation of JAX that they come from.
MEANT = ()
# Products that only some programs have, such as a decomposed one's rest, and cuDNN's fifth product in attention.
_MORE_FLOPS = 1.05
_LISTED = 12  # kernels that move most


@dataclasses.dataclass(frozen=True)
class Finding:
    """What shouldn't be. `bytes`: of it, once; for products FLOPs. `times`: how often in a step."""

    check: str
    what: str
    bytes: float
    times: int = 1

    def __str__(self):
        size = f"{self.bytes / 1e9:.4g} GFLOPs" if self.check in ("product", "recomputed") else _size(self.bytes)
        return f"{self.check:<11} {size:>14} × {self.times:<4} {self.what}"


def _size(n):
    return f"{n / 2**20:.4g} MiB"


@dataclasses.dataclass(frozen=True)
class Facts:
    """What of a step its program is held against.

    Attributes:
      leaves: {name: shape of the whole array}. vocab: rows of its table.
      rows: examples that a device works on at a time. text_len: tokens of each. cut: devices that share the batch.
      in_bfloat16: whether activations and frozen weights are.
      flops: products of a step on one device, by the formula.
      least: bytes below which a weight isn't looked at.
    """

    leaves: dict
    vocab: int
    rows: int
    text_len: int
    cut: int
    in_bfloat16: bool
    flops: float
    least: int = 2**24


def facts(step: dry_run.Step, least: int = 2**24) -> Facts:
    """What a step is held against."""
    setup = step.setup
    config, state = setup.config, step.state
    return Facts(
        leaves={n: x.shape for n, x in {**state.trained, **state.frozen}.items()},
        vocab=setup.model.vocab_size,
        rows=dry_run.rows_at_a_time(setup),
        text_len=config.text_len,
        cut=setup.mesh.shape[sharding.DATA_AXIS],
        in_bfloat16=_in_bfloat16(config),
        flops=setup.flops_per_example.per_example_executed * config.input.batch_size / setup.mesh.size,
        least=least,
    )


def facts_of_program(setup: Setup, program: forecast.Program, least: int = 2**24) -> Facts:
    """What a program that trains nothing is held against."""
    return Facts(
        leaves={n: x.shape for n, x in weights.stored_params(setup.abstract, setup).items()},
        vocab=setup.model.vocab_size,
        rows=program.rows,
        text_len=program.text_len,
        cut=setup.mesh.shape[sharding.DATA_AXIS],
        in_bfloat16=_in_bfloat16(setup.config),
        flops=0,
        least=least,
    )


def _in_bfloat16(config):
    return config.get("dtype") == "bfloat16" and config.get("frozen_dtype", "float32") != "float32"


def audit(program: hlo.Program, of: Facts, overlaps: bool = True) -> list[Finding]:
    """All that a compiled step shouldn't hold or do.

    Args:
      overlaps: whether exchanges can run beside kernels, as they can't on a CPU.
    """
    found = wide_products(program) if of.in_bfloat16 else []
    found += whole_weights(program, of) + logits(program, of) + not_donated(program) + gathered(program, of, overlaps)
    return found + recomputed(program, of)


def wide_products(program: hlo.Program) -> list[Finding]:
    """Products of two float32 factors. A CPU makes all of them so: give it the program as it was before XLA
    (`before_xla`)."""
    count = collections.Counter()
    for p in compiled.products(program):
        if p.types[:2] == ("f32", "f32") and not any(re.search(m, p.source) for m in MEANT):
            count[_tail(p.source)] += p.flops * p.times
    return [Finding("product", f"float32 × float32: {source}", flops) for source, flops in count.most_common()]


def _tail(source, most=90):
    return source if len(source) <= most else f"…{source[-most:]}"


def before_xla(lowered: jax.stages.Lowered) -> hlo.Program:
    """The program as XLA is given it."""
    return hlo.Program(lowered.compiler_ir("hlo").get_hlo_module().to_string())


# Give what is there under another name, or something that no kernel makes.
_NAMES = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "call", "conditional", "constant", "copy-done")
_MOVES = ("copy", "transpose", "convert")
_RESERVES = ("AllocateBuffer", "ConcatBitcast")  # of TPUs


def _leaf(parameter):
    """(group, name) of a parameter of the program: ("frozen", "llm/…"); ("", "") if it is no weight. The nested
    `params` of a program that trains nothing are frozen."""
    found = re.match(r"(\w+)((?:\[\\?'[^'\\]*\\?'\])+)", parameter.source)
    if not found:
        return "", ""
    name = "/".join(re.findall(r"\[\\?'([^'\\]*)", found[2]))
    return "frozen" if found[1] == "params" else found[1], name


def _key(shape):
    return tuple(sorted(n for n in shape if n > 1))


def _is_table(shape, vocab):
    return vocab in shape and len(shape) == 2


def _stacks(program, of):
    """{sorted local shape: (group, name)} of the weights that are looked for: all layers of kernels, and the table."""
    out = {}
    for group in ("trained", "frozen"):  # of a shape that both have, frozen ones are looked for
        for p in program.parameters:
            which, name = _leaf(p)
            shape = of.leaves.get(name, ())
            big = p.bytes >= of.least and (len(shape) >= 3 or _is_table(shape, of.vocab))
            if which == group and big:
                out[_key(p.arrays[0].shape)] = (group, name)
    trained = {_key(of.leaves[n]) for g, n in map(_leaf, program.parameters) if g == "trained" and n in of.leaves}
    return {k: v for k, v in out.items() if v[0] == "trained" or k not in trained}


def _only_moves(program, x):
    """Whether a kernel does no more than copy, transpose or convert."""
    if x.opcode != "fusion":
        return x.opcode in _MOVES
    inner = [i.opcode for name in x.called("calls") for i in program.computations.get(name, {}).values()]
    return bool(inner) and set(inner) <= {*_MOVES, "parameter", "bitcast", "reshape"}


def whole_weights(program: hlo.Program, of: Facts) -> list[Finding]:
    """Arrays of the size of all layers of a kernel, or of the table, that are written out. They are known by their
    shape on one device, in any order of its axes."""
    stacks, out = _stacks(program, of), []
    for x, _, place in program.instructions(fused=False):
        if x.opcode in _NAMES:
            continue
        if x.opcode.endswith("-start") or x.target in _RESERVES:
            continue  # parts of it on their way to memory on the chip (TPU), or room for what another makes
        for array in x.arrays:
            group, name = stacks.get(_key(array.shape), ("", ""))
            if array.space:
                continue
            if group == "frozen" or (group == "trained" and _only_moves(program, x)):
                how = x.opcode if x.opcode != "fusion" else f"fusion ({x.name})"
                out.append(Finding("weights", f"{how} {array} of {name}", array.bytes, place.times))
    return out


def logits(program: hlo.Program, of: Facts) -> list[Finding]:
    """Arrays of all text tokens × vocabulary that are written out. Under a table that is cut along the batch's axis
    each device has its part of the vocabulary for the rows of all."""
    parts = {of.vocab: 1, math.ceil(of.vocab / of.cut): of.cut}
    count = collections.Counter()
    for x, _, place in program.instructions(fused=False):
        if x.opcode in _NAMES:
            continue
        for array in x.arrays:
            for size, others in parts.items():
                if size > 1 and size in array.shape and array.size >= of.rows * others * of.text_len * size:
                    count[array] += place.times
                    break
    hint = "config.supervised_len or config.loss_chunk makes fewer"
    return [Finding("logits", f"{a} of all text tokens; {hint}", a.bytes, n) for a, n in count.items()]


def not_donated(program: hlo.Program) -> list[Finding]:
    """Leaves of the state whose memory no result takes."""
    out = []
    for number, p in enumerate(program.parameters):
        if p.source.startswith(("trained", "opt_state")) and number not in program.aliased:
            out.append(Finding("donated", f"not written over: {p.source}", p.bytes))
    return out


def gathered(program: hlo.Program, of: Facts, overlaps: bool) -> list[Finding]:
    """Weights of more than a layer gathered; gathers in loops that are waited for at once."""
    sizes = {math.prod(s): n for n, s in of.leaves.items() if len(s) >= 3 or _is_table(s, of.vocab)}
    out, waiting = [], collections.Counter()
    for c in compiled.collectives(program):
        if c.kind != "all-gather":
            continue
        for item in (1, 2, 4):
            name = sizes.get(c.bytes // item)
            if name and c.bytes >= of.least and c.bytes % item == 0:
                out.append(Finding("gathered", f"all of {name}", c.bytes, c.times))
                break
        else:
            if overlaps and c.in_loop and not c.work and c.bytes * c.times >= of.least:
                waiting[c.bytes, _tail(c.source)] += c.times
    late = [Finding("gathered", f"waited for at once: {s}", size, n) for (size, s), n in waiting.items()]
    return out + late


def recomputed(program: hlo.Program, of: Facts) -> list[Finding]:
    """Whether there are more products than the formula has."""
    flops = sum(p.flops * p.times for p in compiled.products(program))
    if not of.flops or flops <= of.flops * _MORE_FLOPS or program.unknown_loops:
        return []
    what = f"{flops / 1e12:.4g} TFLOPs, {flops / of.flops:.3f} × the formula's"
    return [Finding("recomputed", what, flops - of.flops)]


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    with chips.aimed_at(values.chip) as chip:
        found = run(values.config, chip, values.save, values.program)
    if found:
        sys.exit(1)


def run(config, chip=None, save=None, program="train") -> list[Finding]:
    """Compiles a step, or another of PROGRAMS, for `chip`, or for what is here; prints what is found and gives it.

    Args:
      save: file for the program's text, gzipped; of several the last.
    """
    if program != "train":
        with chip.target() if chip else contextlib.nullcontext():
            return _run_program(Setup(config), program, save)
    with chip.target() if chip else contextlib.nullcontext():
        setup = TrainingSetup.without_data(config)
        with notes.stage("compiling the train step"):
            step = dry_run.compile_step(setup)
        text = step.compiled.as_text()
        program, of = hlo.Program(text), facts(step)
        on_cpu = chips.backend() == "cpu"
        found = audit(program, dataclasses.replace(of, in_bfloat16=of.in_bfloat16 and not on_cpu), not on_cpu)
        if on_cpu and of.in_bfloat16:
            found = wide_products(before_xla(dry_run.trace_step(setup).traced.lower())) + found
    _save(text, save)
    flops = sum(p.flops * p.times for p in compiled.products(program))
    print(f"{len(found)} findings; products {flops / of.flops:.3f} × the formula's" if of.flops else len(found))
    for finding in found:
        print(finding)
    print(dry_run.traffic_line(step, program))
    for (kind, name), size in list(compiled.moved_by(program).items())[:_LISTED]:
        print(f"    {size / 2**30:7.2f} GiB  {kind}: {name}")
    return found


_CUTS = ("dynamic-slice", "slice")


def cut_out(program: hlo.Program, least: int = 2**24) -> list[Finding]:
    """Kernels that only cut something out of an array and write it down, where a product could read the cut itself."""
    out, moves = [], {*_CUTS, *_MOVES, "parameter", "constant", "bitcast", "reshape", "tuple"}
    for x, _, place in program.instructions(fused=False):
        inner = [i for name in x.called("calls") for i in program.computations.get(name, {}).values()]
        # Not those that work out where to cut.
        does = {i.opcode for i in (inner if x.opcode == "fusion" else [x]) if any(a.size > 1 for a in i.arrays)}
        size = sum(a.bytes for a in x.arrays if not a.space)
        if does & {*_CUTS} and does <= moves and size >= least:
            made = ", ".join(map(str, x.arrays))
            out.append(Finding("cut out", f"{made}: {_tail(x.source)}", size, place.times))
    return out


def _run_program(setup, program, save):
    if program == "saliency":
        programs = forecast.of_saliency(setup, num_samples=0, methods=("rollout", "relevancy"))[1:]
    else:
        programs = [p for p in forecast.of_evals(setup) if p.name.endswith(": answers")][:1]
        if not programs:
            raise ValueError(f"--program={program}: none of config.evals generates answers.")
    part, on_cpu, out = program == "decode", chips.backend() == "cpu", []
    for one in programs:
        made, of = forecast.compile_program(setup, one), facts_of_program(setup, one)
        _save(made.compiled.as_text(), save)
        of = dataclasses.replace(of, in_bfloat16=of.in_bfloat16 and not on_cpu)
        found = audit(made.parts[part] or made.parts[0], of, not on_cpu)
        if part:
            found += cut_out(made.parts[part] or made.parts[0])
        if on_cpu and _in_bfloat16(setup.config):
            given = before_xla(one.lower()).around_the_loop()
            found = wide_products(given[part] or given[0]) + found
        print(f"{one.name}, {program}: {len(found)} findings")
        for finding in found:
            print(finding)
        out += found
    return out


def _save(text, path):
    if path:
        with gzip.open(path, "wt", encoding="utf-8") as f:
            f.write(text)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    flags.DEFINE_string("chip", None, "Compile for this chip, not for what is here: h200, h200:8, v5e:4x4, …")
    flags.DEFINE_enum("program", "train", PROGRAMS, "What is compiled.")
    command_line.define_path("save", None, "Write the program's text there, gzipped.")
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=cli.parse_flags)
