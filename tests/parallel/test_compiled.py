"""Compiled programs taken apart: short ones written here, and one of eight CPU devices.

Numbers are counted by hand from the shapes in the text.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_med.parallel import compiled, hlo

LOOP = """HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (1, {}, may-alias), {1}: (2, {}, must-alias) }

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%product (p0: bf16[5,8,16], p1: s32[], p2: bf16[4,8]) -> f32[4,16] {
  %p0 = bf16[5,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %cut = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %flat = bf16[8,16]{1,0} bitcast(%cut)
  %p2 = bf16[4,8]{1,0} parameter(2)
  ROOT %dot.1 = f32[4,16]{1,0} dot(%p2, %flat), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%keep (q0: f32[5,4,16], q1: f32[4,16], q2: s32[]) -> f32[5,4,16] {
  %q0 = f32[5,4,16]{2,1,0} parameter(0)
  %q1 = f32[4,16]{1,0} parameter(1)
  %one = f32[1,4,16]{2,1,0} bitcast(%q1)
  %q2 = s32[] parameter(2)
  %nought = s32[] constant(0)
  ROOT %put = f32[5,4,16]{2,1,0} dynamic-update-slice(%q0, %one, %q2, %nought, %nought)
}

%body (state: (s32[], bf16[5,8,16], f32[5,4,16])) -> (s32[], bf16[5,8,16], f32[5,4,16]) {
  %state = (s32[], bf16[5,8,16]{2,1,0}, /*index=2*/f32[5,4,16]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %by = s32[] constant(1)
  %next = s32[] add(%i, %by)
  %w = bf16[5,8,16]{2,1,0} get-tuple-element(%state), index=1
  %kept = f32[5,4,16]{2,1,0} get-tuple-element(%state), index=2
  %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} custom-call(), custom_call_target="here", backend_config="a(\\") = b{"
  %y = f32[4,16]{1,0} fusion(%w, %i, %x), kind=kCustom, calls=%product, \
metadata={op_name="jit(f)/mlp/dot"}, backend_config={"fusion_backend_config":{"kind":"__triton_gemm"}}
  %sum-start = f32[4,16]{1,0} all-reduce-start(%y), replica_groups={{0,1}}, to_apply=%sum
  %stored = f32[5,4,16]{2,1,0} fusion(%kept, %y, %i), kind=kLoop, calls=%keep
  %summed = f32[4,16]{1,0} all-reduce-done(%sum-start)
  ROOT %out = (s32[], bf16[5,8,16]{2,1,0}, f32[5,4,16]{2,1,0}) tuple(%next, %w, %stored)
}

%more (state.1: (s32[], bf16[5,8,16], f32[5,4,16])) -> pred[] {
  %state.1 = (s32[], bf16[5,8,16]{2,1,0}, f32[5,4,16]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %five), direction=LT
}

ENTRY %main (w0: bf16[5,8,16], kept0: f32[5,4,16], n: s32[]) -> (s32[], bf16[5,8,16], f32[5,4,16]) {
  %w0 = bf16[5,8,16]{2,1,0} parameter(0)
  %kept0 = f32[5,4,16]{2,1,0} parameter(1)
  %n = s32[] parameter(2)
  %start = (s32[], bf16[5,8,16]{2,1,0}, f32[5,4,16]{2,1,0}) tuple(%n, %w0, %kept0)
  %gather-start = (f32[5,4,16]{2,1,0}, f32[10,4,16]{2,1,0}) all-gather-start(%kept0), dimensions={0}
  %gather-done = f32[10,4,16]{2,1,0} all-gather-done(%gather-start)
  ROOT %loop = (s32[], bf16[5,8,16]{2,1,0}, f32[5,4,16]{2,1,0}) while(%start), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
}
"""


@pytest.fixture(scope="module")
def loop():
    return hlo.Program(LOOP)


def test_a_program_is_read(loop):
    assert loop.entry == "main" and loop.aliased == {1, 2} and loop.unknown_loops == 0
    assert loop.places["product"] == hlo.Place(5, 1, True) and loop.places["body"] == hlo.Place(5, 1, False)
    assert "sum" not in loop.places  # adds two numbers for an all-reduce
    x = loop.computations["body"]["x"]
    assert x.arrays == (hlo.Array("bf16", (4, 8), space=1),) and x.target == "here" and x.operands == ()
    assert [p.name for p in loop.parameters] == ["w0", "kept0", "n"]


def test_lengths_of_loops():
    """Where it isn't said, what the loop's number is compared with."""
    silent = hlo.Program(LOOP.replace("known_trip", "other"))
    assert (silent.unknown_loops, silent.places["body"].times) == (0, 5)
    by_two = hlo.Program(
        LOOP.replace("known_trip", "other").replace("%by = s32[] constant(1)", "%by = s32[] constant(2)")
    )
    assert (by_two.unknown_loops, by_two.places["body"].times) == (0, 3)
    open_end = hlo.Program(LOOP.replace("known_trip", "other").replace("direction=LT", "direction=NE"))
    assert (open_end.unknown_loops, open_end.places["body"].times) == (1, 1)


def test_products_and_their_types(loop):
    (found,) = compiled.products(loop)
    assert (found.types, found.times) == (("bf16", "bf16", "f32"), 5)
    assert found.flops == 2 * 4 * 16 * 8


def test_of_a_stack_that_is_cut_the_cut_is_moved(loop):
    product = 2 * 8 * 16 + 4 + 4 * 4 * 16  # a layer's kernel, the loop's number, the result; %x is on the chip
    keep = 4 * 4 * 16 + 4 + 4 * 4 * 16  # read, the loop's number, written in its place
    sums = 4 * 4 * 16
    gather = 4 * (5 + 10) * 4 * 16
    test = 4 + 4 + 1 + 3 * 4  # whether the loop goes on, and its next number
    assert compiled.moved(loop) == 5 * (product + keep + sums + test) + gather
    assert compiled.moved_by(loop)["Triton product", "mlp/dot"] == 5 * product


def test_collectives(loop):
    gather, sums = sorted(compiled.collectives(loop), key=lambda c: c.kind)
    assert (gather.kind, gather.bytes, gather.times, gather.in_loop) == ("all-gather", 4 * 10 * 4 * 16, 1, False)
    assert gather.begun_ahead and gather.work == 0  # waited for at once
    assert (sums.kind, sums.bytes, sums.times, sums.in_loop, sums.work) == ("all-reduce", 4 * 4 * 16, 5, True, 1)


def test_kernels(loop):
    assert compiled.kernels(loop) == {"here": (1, 5), "Triton product": (1, 5), "fusion": (1, 5)}


def program(*lines):
    text = "\n".join(f"  {line}" for line in lines)
    return hlo.Program(f"HloModule m\n\nENTRY %main () -> f32[] {{\n{text}\n}}\n")


LEFT, RIGHT = "%a = bf16[6,32]{1,0} parameter(0)", "%b = bf16[32,10]{1,0} parameter(1)"


@pytest.mark.parametrize(
    "lines, flops",
    [
        (
            [
                LEFT,
                RIGHT,
                '%c = (f32[6,10]{1,0}, s8[64]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", '
                'backend_config={"gemm_backend_config":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}',
            ],
            2 * 6 * 10 * 32,
        ),
        # A product as a TPU has it.
        ([LEFT, RIGHT, "%c = f32[6,10]{1,0} convolution(%a, %b), dim_labels=bf_io->bf"], 2 * 6 * 10 * 32),
        # The same for three of them: an axis of both factors.
        (
            [
                "%a = bf16[3,6,32]{2,1,0} parameter(0)",
                "%b = bf16[3,32,10]{2,1,0} parameter(1)",
                "%c = f32[3,6,10]{2,1,0} convolution(%a, %b), window={size=3 stride=2 pad=0_0 lhs_dilate=3}, "
                "dim_labels=0bf_0io->0bf",
            ],
            3 * 2 * 6 * 10 * 32,
        ),
        # Patches of 14 pixels.
        (
            [
                "%a = bf16[2,28,28,3]{3,2,1,0} parameter(0)",
                "%b = bf16[7,14,14,3]{3,2,1,0} parameter(1)",
                "%c = (bf16[2,2,2,7]{3,2,1,0}, u8[0]{0}) custom-call(%a, %b), window={size=14x14 stride=14x14}, "
                'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"',
            ],
            2 * (2 * 2 * 2 * 7) * (14 * 14 * 3),
        ),
        # Padded by one on both sides: at each end one of three weights meets nothing.
        (
            [
                "%a = bf16[1,5,1]{2,1,0} parameter(0)",
                "%b = bf16[3,1,1]{2,1,0} parameter(1)",
                "%c = f32[1,5,1]{2,1,0} convolution(%a, %b), window={size=3 pad=1_1}, dim_labels=b0f_0io->b0f",
            ],
            2 * (5 * 3 - 2),
        ),
        (
            [
                "%q = bf16[2,8,4,16]{3,2,1,0} parameter(0)",
                "%k = bf16[2,8,1,16]{3,2,1,0} parameter(1)",
                "%o = (bf16[2,4,8,16]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), "
                'custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":'
                '{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["2", "4", "8", "8"]}}}',
            ],
            2 * 2 * (2 * 4 * 8 * 8) * 16,
        ),
    ],
    ids=["cublas", "tpu", "tpu-batch", "cudnn-conv", "padded", "cudnn-attention"],
)
def test_flops_of_each_way_to_multiply(lines, flops):
    (found,) = compiled.products(program(*lines))
    assert found.flops == flops


def test_the_room_that_a_library_works_in_is_not_moved():
    def moved(made):
        call = f'%c = {made} custom-call(%a, %b), custom_call_target="__cublas$lt$matmul"'
        return compiled.moved(program(LEFT, RIGHT, call))

    factors = 2 * (6 * 32 + 32 * 10)
    assert moved("f32[6,10]{1,0}") == moved("(f32[6,10]{1,0}, s8[33554432]{0})") == factors + 4 * 6 * 10
    assert moved("(f32[6,10]{1,0}, f32[10]{0})") == factors + 4 * (6 * 10 + 10)


def test_an_exchange_in_an_asynchronous_computation():
    """As a TPU's program has some: what starts it calls it."""
    text = LOOP.replace(
        "ENTRY",
        "%sent (p: f32[8]) -> f32[2] {\n  %p = f32[8]{0} parameter(0)\n"
        "  ROOT %rs = f32[2]{0} reduce-scatter(%p), dimensions={0}, to_apply=%sum\n}\n\nENTRY",
    ).replace(
        "  %start =",
        "  %v = f32[8]{0} constant({...})\n  %begun = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%v), "
        'calls=%sent\n  %work = f32[8]{0} custom-call(%v), custom_call_target="w"\n'
        "  %ended = f32[2]{0} async-done(%begun)\n  %start =",
    )
    (found,) = [c for c in compiled.collectives(hlo.Program(text)) if c.kind == "reduce-scatter"]
    assert (found.bytes, found.begun_ahead, found.work) == (32, True, 1)


def test_an_exchange_that_a_tpu_spreads_over_kernels_counts_once():
    parts = dict(start="%cut.1", piece="%async_collective_fusion.7", done="%cut.2")
    line = "  ROOT %g = f32[16]{0} all-gather(%p), channel_id=3, dimensions={0}\n"
    inner = "".join(
        f"{n} (p: f32[8]) -> f32[16] {{\n  %p = f32[8]{{0}} parameter(0)\n{line}}}\n\n" for n in parts.values()
    )
    calls = "  %v = f32[8]{0} constant({...})\n" + "".join(
        f"  %{name} = f32[16]{{0}} fusion(%v), kind=kCustom, calls={parts[key]}\n"
        for key, name in dict(start="async-collective-start", piece="fusion.7", done="async-collective-done").items()
    )
    text = LOOP.replace("ENTRY", inner + "ENTRY").replace("  %start =", calls + "  %start =")
    (found,) = [c for c in compiled.collectives(hlo.Program(text)) if c.bytes == 64]
    assert (found.kind, found.times, found.begun_ahead, found.work) == ("all-gather", 1, True, 1)


def test_the_bound_is_the_larger_of_two(loop):
    flops, moved = 5 * 2 * 4 * 16 * 8, compiled.moved(loop)
    assert compiled.bound(loop, flops / 3, moved / 2) == compiled.Bound(3, 2)
    assert compiled.bound(loop, flops / 3, moved / 2).seconds == 3
    assert compiled.bound(loop, None, moved / 2).seconds == 2 and compiled.bound(loop, None, None).seconds is None
    said = compiled.described(loop, flops / 3, moved / 2)
    assert "at least 3 s" in said and "no forecast of a time" in said
    assert re.search(r"all-reduce +1 in loops \(5 runs\).*begun ahead, with work in between", said)
    assert re.search(r"all-gather +1 outside of loops.*waited for at once", said)
    assert "roofline" not in compiled.described(loop)


def test_a_program_of_eight_devices():
    """Layers in a loop, their weights cut in eight."""
    mesh = Mesh(np.array(jax.devices()[:8]), "d")

    def s(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def f(w, x):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec("d"))), None

        return jax.lax.scan(layer, x, w)[0]

    text = jax.jit(f).lower(s((6, 48, 48), None, "d"), s((64, 48), "d")).compile().as_text()
    found = hlo.Program(text)
    assert found.unknown_loops == 0
    assert sum(p.flops * p.times for p in compiled.products(found)) == 6 * 2 * 8 * 48 * 48
    gathers = [c for c in compiled.collectives(found) if c.kind == "all-gather"]
    assert [(c.bytes, c.times, c.in_loop, c.begun_ahead) for c in gathers] == [(4 * 48 * 48, 6, True, False)]
    # At least each layer's weights, gathered and multiplied, and not all layers' each time.
    assert 6 * 3 * 4 * 48 * 48 < compiled.moved(found) < 6 * 12 * 4 * 48 * 48


def test_what_runs_once_and_what_runs_each_time():
    """A loop that ends when its numbers say so, beside one that counts; and a choice in it."""
    w = jnp.zeros((3, 8, 8))

    def f(x, w, heavy):
        def each(state):
            x, total = state
            x = jax.lax.cond(heavy, lambda x: jnp.sin(x @ w[0] @ w[1]), lambda x: x, x)
            return jnp.tanh(x @ w[2]), total + x.sum()

        x = jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]
        return jax.lax.while_loop(lambda state: state[1] < 5, each, (x, jnp.float32(0)))

    program = hlo.Program(jax.jit(f).lower(jnp.zeros((4, 8)), w, True).compile().as_text())

    def flops(part):
        return sum(p.flops * p.times for p in compiled.products(part)) / (2 * 4 * 8 * 8)

    assert program.unknown_loops == 1 and flops(program) == 6
    once, each = program.around_the_loop()
    assert (flops(once), flops(each), once.unknown_loops, each.unknown_loops) == (3, 3, 0, 0)
    assert compiled.moved(once) > 0 and compiled.moved(each) > 0
    assert flops(program.least()) == 4 and flops(program.least().around_the_loop()[1]) == 1
    assert once.around_the_loop() == (once, None)
