"""Compiled programs as text, taken apart: XLA's HLO, as `jax.stages.Compiled.as_text()` gives it.

What a line says is kept as far as others here ask for it: the operation, its arrays, what it reads and calls. How often
it runs follows from the loops around it, whose lengths XLA writes down where it knows them.
Format: https://openxla.org/xla/operation_semantics; the names of backends' own calls are read off programs.
"""

import collections
import copy
import dataclasses
import functools
import math
import re

BYTES = dict(pred=1, s8=1, u8=1, s16=2, u16=2, bf16=2, f16=2, s32=4, u32=4, f32=4, s64=8, u64=8, f64=8, c64=8, c128=16)
BYTES |= dict(s4=0.5, u4=0.5, s2=0.25, u2=0.25)


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a program. `space`: 0 is the device's main memory; others are on the chip (TPU), or the host's."""

    dtype: str
    shape: tuple[int, ...]
    space: int = 0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """8-bit floats have many names; a token or an opaque thing has no bytes."""
        each = BYTES.get(self.dtype, 1 if self.dtype.startswith("f8") else 0)
        return math.ceil(self.size * each)

    def __str__(self):
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
      arrays: what it makes; several for a tuple.
      operands: names of what it reads, in order.
      rest: what stands behind the operands: called computations, dimensions, the backend's configuration.
      root: whether it is what its computation gives.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    @property
    def bytes(self) -> int:
        return sum(a.bytes for a in self.arrays)

    @property
    def source(self) -> str:
        """The operation of JAX that it was made from, such as "jit(update)/…/dot_general"; "" if that isn't said."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """Of a custom call, what is called; else ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    def called(self, key: str) -> list[str]:
        """Names of computations under `key`, such as "calls", "body" or "branch_computations"."""
        found = re.search(rf"\b{key}=(\{{[^}}]*\}}|%[\w.\-]+)", self.rest)
        return re.findall(r"%([\w.\-]+)", found[1]) if found else []

    def dimensions(self, key: str) -> tuple[int, ...]:
        """Numbers under `key`, such as "lhs_contracting_dims", there or in the backend's configuration as JSON."""
        found = re.search(rf'\b{key}"?[=:][{{\[]([\d,"\s]*)[}}\]]', self.rest)
        return tuple(map(int, re.findall(r"\d+", found[1]))) if found else ()


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a computation stands in the program.

    Attributes:
      times: how often it runs.
      loops: how many loops lie around it.
      fused: whether it is the inside of one kernel, whose arrays in between are never written out.
    """

    times: int
    loops: int
    fused: bool


_OPCODE = re.compile(r"([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_SPACE = re.compile(r"S\((\d+)\)")


def _parenthesis(text, at):
    """The index behind the parenthesis that is opened at `at`."""
    depth, quoted = 0, False
    for i in range(at, len(text)):
        c = text[i]
        if c == '"':
            quoted = not quoted
        elif not quoted:
            depth += (c == "(") - (c == ")")
            if depth == 0:
                return i + 1
    return len(text)


def arrays(text: str) -> tuple[Array, ...]:
    """The arrays of a type: "(f32[2,3]{1,0}, pred[])" has two."""
    out = []
    for dtype, shape, layout in _ARRAY.findall(text):
        space = _SPACE.search(layout)
        out.append(Array(dtype, tuple(map(int, filter(None, shape.split(",")))), int(space[1]) if space else 0))
    return tuple(out)


def instruction(line: str) -> Instruction | None:
    """A line, or None if it is none."""
    left, equals, right = line.strip().partition(" = ")
    if not equals:
        return None
    end = _parenthesis(right, 0) if right.startswith("(") else right.find(" ")
    opcode = _OPCODE.match(right[end:].lstrip())
    if not opcode:
        return None
    start = right.index(opcode[0], end) + len(opcode[0]) - 1
    stop = _parenthesis(right, start)
    operands = re.findall(r"%([\w.\-]+)", right[start:stop]) if opcode[1] != "constant" else ()
    return Instruction(
        left.removeprefix("ROOT ").lstrip("%"),
        opcode[1],
        arrays(right[:end]),
        tuple(operands),
        right[stop:] if opcode[1] not in ("constant", "parameter") else right[start:],
        left.startswith("ROOT "),
    )


class Program:
    """A compiled program.

    Attributes:
      computations: {name: {name of an instruction: Instruction}}, in the order in which they stand (a compiled program
        is scheduled: they run so). entry: the name of the first to run.
      places: {name: Place} of those that run; what only sums two numbers for a reduction isn't there.
      aliased: numbers of the arguments whose memory a result takes.
      unknown_loops: how many loops have no known length; they count once.
    """

    def __init__(self, text: str):
        self.computations, self.entry, current = {}, "", None
        header, _, _ = text.partition("\n")
        for line in text.splitlines():
            if line.endswith("{") and not line.startswith((" ", "HloModule")):
                name = line.removeprefix("ENTRY ").split()[0].split("(")[0].lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif line.startswith("  ") and current is not None and (found := instruction(line)):
                current[found.name] = found
        alias = re.search(r"input_output_alias=\{(.*?)\}, \w+=", header + ", end=")
        # "{0}: (3, {}, may-alias)": result 0 takes the memory of argument 3.
        self.aliased = {int(n) for n in re.findall(r"\{[\d, ]*\}: \((\d+),", alias[1])} if alias else set()
        self._least, self._without = False, None
        self._start([self.entry], Place(1, 0, False))

    def _start(self, names, place):
        self.unknown_loops = 0
        self.places: dict[str, Place] = {}
        for name in names:
            self._visit(name, place)

    def least(self) -> "Program":
        """The same where of each choice only the branch of fewest instructions runs."""
        out = copy.copy(self)
        out._least = True
        out._start([self.entry], Place(1, 0, False))
        return out

    def around_the_loop(self) -> tuple["Program", "Program | None"]:
        """(what runs once, what runs in each round of the loop without a known length): the first such loop that lies
        in no other. (itself, None) if there is none."""
        loops = [
            x
            for x, _, place in self.instructions(fused=False)
            if x.opcode == "while" and not place.loops and x is not self._without and self.length(x) is None
        ]
        if not loops:
            return self, None
        once, each = copy.copy(self), copy.copy(self)
        once._without = loops[0]
        once._start([self.entry], Place(1, 0, False))
        each._start(loops[0].called("body") + loops[0].called("condition"), Place(1, 1, False))
        return once, each

    def _visit(self, name, place):
        before = self.places.get(name)
        if before:  # called from several places
            place = Place(before.times + place.times, max(before.loops, place.loops), before.fused and place.fused)
        self.places[name] = place
        for x in self.computations.get(name, {}).values():
            if x.opcode == "while" and x is not self._without:
                length = self.length(x)
                self.unknown_loops += length is None
                times = 1 if length is None else length
                for inner in x.called("body") + x.called("condition"):
                    self._visit(inner, Place(place.times * times, place.loops + 1, place.fused))
            elif x.opcode == "fusion":
                for inner in x.called("calls"):
                    self._visit(inner, Place(place.times, place.loops, True))
            elif x.opcode in ("call", "async-start"):
                for inner in x.called("to_apply") + x.called("calls"):
                    self._visit(inner, place)
            elif x.opcode == "conditional":
                names = x.called("branch_computations") + x.called("true_computation") + x.called("false_computation")
                names.sort(key=lambda n: len(self.computations.get(n, ())))
                for inner in names[:1] if self._least else names:
                    self._visit(inner, place)

    def length(self, loop: Instruction) -> int | None:
        """How often a "while" runs; None if that isn't known."""
        found = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
        return int(found[1]) if found else self._counted(loop)  # a TPU's program doesn't say

    def _counted(self, loop):
        """How often a loop runs whose number counts from 0 in equal steps up to a limit, as JAX's do, and those that
        a TPU's compiler makes, in steps of two; None if it isn't such a loop."""
        test, body = (self.computations.get(next(iter(loop.called(k)), ""), {}) for k in ("condition", "body"))
        ends, given = (next((x for x in c.values() if x.root), None) for c in (test, body))
        if not ends or ends.opcode != "compare" or "direction=LT" not in ends.rest or not given:
            return None
        at = re.search(r"index=(\d+)", test[ends.operands[0]].rest) if ends.operands[0] in test else None
        limit = _constant(test.get(ends.operands[1]))
        if not at or limit is None or given.opcode != "tuple":
            return None
        new = body.get(given.operands[int(at[1])])
        steps = [_constant(body.get(n)) for n in new.operands] if new and new.opcode == "add" else []
        steps = [n for n in steps if n]
        return math.ceil(limit / steps[0]) if len(steps) == 1 else None

    def instructions(self, fused: bool = True):
        """(Instruction, its computation, Place) of all that runs; not of the insides of kernels unless `fused`."""
        for name, place in self.places.items():
            if fused or not place.fused:
                for x in self.computations.get(name, {}).values():
                    yield x, name, place

    def inputs(self, x: Instruction, computation: str) -> list[Instruction]:
        """The instructions that `x` reads."""
        known = self.computations[computation]
        return [known[n] for n in x.operands if n in known]

    @functools.cached_property
    def parameters(self) -> list[Instruction]:
        """Arguments of the program, by number."""
        return parameters(self.computations[self.entry])


def _constant(x: Instruction | None) -> int | None:
    """The whole number that an instruction gives, or None."""
    found = re.match(r"\((\d+)\)", x.rest) if x and x.opcode == "constant" else None
    return int(found[1]) if found else None


def parameters(computation: dict[str, Instruction]) -> list[Instruction]:
    """A computation's parameters, by number."""
    found = [x for x in computation.values() if x.opcode == "parameter"]
    return sorted(found, key=lambda x: int(re.match(r"\((\d+)", x.rest)[1]))


def users(computation: dict[str, Instruction]) -> dict[str, list[Instruction]]:
    """{name: the instructions that read it}."""
    out = collections.defaultdict(list)
    for x in computation.values():
        for name in dict.fromkeys(x.operands):
            out[name].append(x)
    return out
