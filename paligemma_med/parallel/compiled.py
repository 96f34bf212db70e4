"""What a compiled program does on one device: products, bytes moved, kernels, and what devices send each other.

Counted in the program's text (`parallel.hlo`), each line as often as its loops run. XLA's own `cost_analysis` counts a
loop's body once, and has nothing to say for a GPU that isn't there.

From products and bytes follows a bound by the roofline model (Williams, Waterman, Patterson, "Roofline", CACM 2009): a
step can't be faster than its products at the chip's peak, nor than its memory's traffic at the memory's bandwidth. How
near a real step comes to it, the program doesn't say.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

from paligemma_med.parallel import hlo

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")

# No kernel runs for them, or none that moves what they give.
_NO_WORK = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
}
_NO_WORK |= {"partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "add-dependency"}

_TARGETS = {
    "__cublas": "cuBLAS",
    "__cudnn$fmha": "cuDNN attention",
    "__cudnn$conv": "cuDNN convolution",
    "__cudnn": "cuDNN",
    "__triton": "Triton",
    "cub": "CUB sort",
}


@dataclasses.dataclass(frozen=True)
class Product:
    """A matrix product or convolution.

    Attributes:
      types: of both factors and of the result, such as ("bf16", "bf16", "f32").
      flops: of one run. times: runs.
    """

    types: tuple[str, str, str]
    flops: float
    times: int
    source: str


@dataclasses.dataclass(frozen=True)
class Collective:
    """An exchange between devices.

    Attributes:
      kind: one of COLLECTIVES.
      bytes: of the whole array on one device, before a reduce-scatter or after an all-gather; once.
      times: runs. in_loop: whether a loop lies around it.
      begun_ahead: whether it is started and waited for apart from each other. work: how many kernels run in between.
    """

    kind: str
    bytes: int
    times: int
    in_loop: bool
    begun_ahead: bool
    work: int
    source: str


def products(program: hlo.Program) -> list[Product]:
    """All products of a program. cuDNN's attention counts as two of all scores, its backward pass as five."""
    out = []
    for x, computation, place in program.instructions():
        inputs = [a for i in program.inputs(x, computation) for a in i.arrays[:1]]
        if len(inputs) >= 2 and (flops := _flops(x, inputs)):
            types = (inputs[0].dtype, inputs[1].dtype, x.arrays[0].dtype)
            out.append(Product(types, flops, place.times, x.source))
    return out


def _flops(x, inputs):
    left, right = inputs[:2]
    if x.opcode == "dot":
        return 2 * x.arrays[0].size * math.prod(left.shape[i] for i in x.dimensions("lhs_contracting_dims"))
    if x.opcode == "convolution" or x.target.startswith("__cudnn$conv"):
        return _convolution(x, right)
    if x.target.startswith("__cublas"):
        return 2 * x.arrays[0].size * math.prod(left.shape[i] for i in x.dimensions("lhs_contracting_dimensions"))
    if x.target.startswith("__cudnn$fmha"):
        scores = re.search(r'"intermediate_tensor_shape".*?"dimensions": ?\[([\d", ]*)\]', x.rest)
        scores = math.prod(map(int, re.findall(r"\d+", scores[1]))) if scores else 0
        return (10 if "Backward" in x.target else 4) * scores * left.shape[-1]
    return 0


def _convolution(x, kernel):
    """On TPUs every product is one; an axis that both factors share is a window of which one place counts."""
    labels = re.search(r"dim_labels=\w+_(\w+)->(\w+)", x.rest)
    if not labels:
        return 0
    flops = 2 * x.arrays[0].size * kernel.size / max(1, kernel.shape[labels[1].index("o")])
    window = re.search(r"window=\{([^}]*)\}", x.rest)
    given = dict(re.findall(r"(\w+)=([\dx_\-]+)", window[1])) if window else {}
    axes = {key: [_numbers(n) for n in value.split("x")] for key, value in given.items()}
    for i, (size,) in enumerate(axes.get("size", ())):
        stride, holes, spread = (
            axes[key][i][0] if key in axes else 1 for key in ("stride", "lhs_dilate", "rhs_dilate")
        )
        low, high = axes["pad"][i] if "pad" in axes else (0, 0)
        n = x.arrays[0].shape[labels[2].index(str(i))]
        # As far as the window reaches, without what is padded on both sides.
        inside = (n - 1) * stride + (size - 1) * spread + 1 - low - high
        met = sum(
            0 <= at < inside and at % holes == 0
            for at in (o * stride + k * spread - low for o in range(n) for k in range(size))
        )
        flops *= met / (n * size)
    return flops


def _numbers(text):
    return [int(n) for n in re.findall(r"-?\d+", text.replace("_", " "))]


def moved(program: hlo.Program) -> int:
    """Bytes that kernels read from and write to the device's memory: what each reads and makes. Of an array that is
    only cut into, the cut counts; what a cache saves isn't known."""
    return sum(n * place.times for _, place, n in moves(program))


def moves(program: hlo.Program) -> Iterator[tuple[hlo.Instruction, hlo.Place, int]]:
    """(kernel, where it stands, bytes that one run of it moves) of all kernels; see `moved`."""
    for x, computation, place in program.instructions(fused=False):
        if x.opcode not in _NO_WORK and not x.opcode.endswith("-done"):
            yield x, place, _moved(program, x, computation)


def moved_by(program: hlo.Program) -> dict[tuple[str, str], int]:
    """`moved` by {(kind of kernel, end of the name of JAX's operation): bytes}, most first."""
    count = collections.Counter()
    for x, place, n in moves(program):
        count[_kernel(program, x) or x.opcode, "/".join(x.source.split("/")[-2:])] += n * place.times
    return dict(count.most_common())


def _main(arrays):
    """Bytes in the device's main memory."""
    return sum(a.bytes for a in arrays if a.space == 0)


def _moved(program, x, computation):
    inputs = program.inputs(x, computation)
    if x.opcode in ("dynamic-slice", "slice", "gather"):
        return 2 * _main(x.arrays)
    if x.opcode == "dynamic-update-slice":
        return 2 * _main(inputs[1].arrays)
    if x.opcode.endswith("-start"):  # its result names what it reads, too
        return max(_main(x.arrays), sum(_main(i.arrays) for i in inputs))
    inner = program.computations.get(next(iter(x.called("calls")), ""), {}) if x.opcode == "fusion" else {}
    if not inner:
        return _main(_results(x)) + sum(_main(i.arrays) for i in inputs)
    read = hlo.users(inner)
    total = sum(_read(p, read) for p, i in zip(hlo.parameters(inner), inputs) if _main(i.arrays))
    roots = [i for i in inner.values() if i.root]
    if roots and roots[0].opcode == "tuple":
        roots = [inner[n] for n in roots[0].operands]
    return total + sum(_written(r, inner) for r in roots if not any(a.space for a in x.arrays))


def _results(x):
    """What a kernel makes. Calls of libraries also give the room that they work in, last and in bytes: how much of it
    is written isn't known."""
    room = x.arrays[-1:] if len(x.arrays) > 1 and x.target.startswith(("__cublas", "__cudnn")) else ()
    return x.arrays[:-1] if any(a.dtype in ("s8", "u8") and len(a.shape) == 1 for a in room) else x.arrays


def _read(parameter, read):
    """Bytes of a fusion's argument that are needed: of one that is only cut into, the cuts."""
    total, todo = 0, [parameter]
    while todo:
        x = todo.pop()
        for user in read[x.name]:
            if user.opcode in ("bitcast", "reshape") and user.bytes == parameter.bytes:
                todo.append(user)
            elif user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == x.name:
                total += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != x.name:
                return parameter.bytes
    return min(total, parameter.bytes)


def _written(root, inner):
    while root.opcode in ("bitcast", "reshape", "copy") and root.operands and root.operands[0] in inner:
        root = inner[root.operands[0]]
    if root.opcode == "dynamic-update-slice":  # in place
        return inner[root.operands[1]].bytes
    return root.bytes


def kernels(program: hlo.Program) -> dict[str, tuple[int, int]]:
    """{kind of kernel: (how many of them, how often they run)}, most often first."""
    count = collections.defaultdict(lambda: [0, 0])
    for x, _, place in program.instructions(fused=False):
        kind = _kernel(program, x)
        if kind:
            count[kind][0] += 1
            count[kind][1] += place.times
    return {k: tuple(v) for k, v in sorted(count.items(), key=lambda item: -item[1][1])}


def _kernel(program, x):
    if x.opcode == "custom-call":
        return next((name for start, name in _TARGETS.items() if x.target.startswith(start)), x.target)
    if x.opcode == "fusion":
        inside = [i for name in x.called("calls") for i in program.computations.get(name, {}).values()]
        product = any(i.opcode in ("dot", "convolution") for i in inside)
        kind = re.search(r'"kind":"(__[\w$]+)"', x.rest)
        if kind and kind[1].startswith("__triton"):
            return "Triton product" if product else "Triton"
        if kind and kind[1].startswith("__cudnn"):
            return "cuDNN product"
        return "fused product" if product else "fusion"
    if x.opcode in ("dot", "convolution"):
        return "product"
    return "copy" if x.opcode in ("copy", "copy-start", "transpose", "convert") else ""


def collectives(program: hlo.Program) -> list[Collective]:
    """All exchanges between devices, in the order in which they stand."""
    out, callers = [], _callers(program)
    pieces = collections.Counter()  # of exchanges that a TPU spreads over several kernels
    for x, computation, _ in program.instructions():
        pieces[_channel(x)] += callers.get(computation, ("", None))[0] == "spread"
    for x, computation, place in program.instructions():
        kind = x.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        how, start = callers.get(computation, ("", None))
        if how in ("spread", "ended"):
            continue
        into = sum(i.bytes for i in program.inputs(x, computation))
        made = x.bytes - (into if x.opcode == "all-gather-start" else 0)
        size = made if kind in ("all-gather", "collective-broadcast") else into
        work = 0
        if how == "begun":
            work = pieces[_channel(x)]
        elif how == "async" or x.opcode.endswith("-start"):
            work = _between(program, *(start if how == "async" else (computation, x)))
        ahead = x.opcode.endswith("-start") or bool(how)
        out.append(Collective(kind, size, place.times, place.loops > 0, ahead, work, x.source))
    return out


def _channel(x):
    found = re.search(r"channel_id=(\d+)", x.rest) if x.opcode in COLLECTIVES else None
    return found and found[1]


def _callers(program):
    """{computation: (how an exchange in it runs, (where, what calls it))}: "async" in an asynchronous call. A TPU's
    kernels begin it, do some of it beside a product ("spread") and end it, all of which name the exchange."""
    out = {}
    for name, lines in program.computations.items():
        for x in lines.values():
            for inner in x.called("calls") if x.opcode in ("fusion", "async-start") else ():
                if x.opcode == "async-start":
                    out[inner] = ("async", (name, x))
                elif inner.startswith("async_collective_fusion"):
                    out[inner] = ("spread", (name, x))
                elif x.name.startswith("async-collective-"):
                    out[inner] = ("ended" if "-done" in x.name else "begun", (name, x))
    return out


def _between(program, computation, start):
    """Kernels that stand between a start and what waits for it."""
    lines = list(program.computations[computation].values())
    names = [x.name for x in lines]
    waits = {start.name}
    count = 0
    for x in lines[names.index(start.name) + 1 :]:
        if waits & set(x.operands) and x.opcode.endswith("-done"):
            return count
        if waits & set(x.operands) and x.opcode.endswith("-update"):
            waits.add(x.name)
        count += x.opcode in ("fusion", "dot", "convolution", "custom-call", "while")
    return count


@dataclasses.dataclass(frozen=True)
class Bound:
    """Seconds that one run of a program takes at least, for its products and for its memory's traffic; None: the chip's
    peak isn't known."""

    products: float | None
    memory: float | None

    @property
    def seconds(self) -> float | None:
        known = [s for s in (self.products, self.memory) if s is not None]
        return max(known) if known else None


def bound(program: hlo.Program, peak: float | None, bandwidth: float | None) -> Bound:
    """The roofline's bound. All products count at `peak`, whatever their type, so that it stays a bound.

    Args:
      peak: FLOP/s in bfloat16. bandwidth: of the memory, bytes a second.
    """
    flops = sum(p.flops * p.times for p in products(program))
    return Bound(flops / peak if peak else None, moved(program) / bandwidth if bandwidth else None)


_NAMES = dict(bf16="bfloat16", f16="float16", f32="float32", f64="float64", s8="int8", u8="uint8", s32="int32")


def described(program: hlo.Program, peak: float | None = None, bandwidth: float | None = None) -> str:
    """All of it, in a few lines for people."""
    types, lines = collections.Counter(), []
    for p in products(program):
        types[p.types] += p.flops * p.times
    named = lambda t: " × ".join(_NAMES.get(x, x) for x in t[:2]) + f" → {_NAMES.get(t[2], t[2])}"  # noqa: E731
    listed = ", ".join(f"{n / 1e12:.4g} {named(t)}" for t, n in types.most_common())
    lines.append(f"  {'products, TFLOPs':<26} {listed or 'none'}")
    lines.append(f"  {'memory traffic, GiB':<26} {moved(program) / 2**30:.4g}")
    listed = ", ".join(f"{k} {n} ({runs} runs)" for k, (n, runs) in kernels(program).items())
    lines.append(f"  {'kernels':<26} {listed or 'none'}")
    groups = collections.defaultdict(lambda: [0, 0, 0])
    for c in collectives(program):
        how = "waited for at once" if not c.work else "begun ahead, with work in between"
        group = groups[c.kind, "in loops" if c.in_loop else "outside of loops", how]
        for i, n in enumerate((1, c.times, c.bytes * c.times)):
            group[i] += n
    for (kind, where, how), (n, runs, size) in groups.items():
        lines.append(f"  {kind:<26} {n} {where} ({runs} runs), {size / 2**30:.4g} GiB, {how}")
    if not groups:
        lines.append(f"  {'collectives':<26} none")
    if program.unknown_loops:
        lines.append(f"  {program.unknown_loops} loops of unknown length count once")
    least = bound(program, peak, bandwidth)
    if least.seconds is not None:
        parts = [("its products at the chip's peak", least.products), ("its memory traffic", least.memory)]
        parts = ", ".join(f"{what} {s:.3g}" for what, s in parts if s is not None)
        lines.append(f"  {'bound (roofline)':<26} at least {least.seconds:.3g} s ({parts}); no forecast of a time")
    return "\n".join(lines)
