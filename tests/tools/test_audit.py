"""The audit of compiled steps: nothing in the tiny model's, and each mistake made on purpose is found.

Mistakes are made in small programs whose arguments are named as a step's: `trained`, `opt_state`, `frozen`, `batch`.
"""

import dataclasses
import gzip

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from paligemma_med.parallel import chips, hlo
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from tests import tiny
from tools import audit

pytestmark = pytest.mark.usefixtures("optimised_file")

DEPTH, WIDTH, VOCAB, ROWS, TEXT = 3, 40, 1009, 2, 24
LEAVES = {
    "llm/layers/w": (DEPTH, WIDTH, WIDTH),
    "llm/table": (VOCAB, WIDTH),
    "llm/layers/lora": (DEPTH, WIDTH, 2),
}
OF = audit.Facts(LEAVES, VOCAB, ROWS, TEXT, cut=1, in_bfloat16=True, flops=0, least=2**12)


def arguments(dtype="float32"):
    s = jax.ShapeDtypeStruct
    w, table, lora = LEAVES
    return dict(
        trained={lora: s(LEAVES[lora], "float32")},
        opt_state=(s((DEPTH, WIDTH, 2), "float32"),),
        frozen={w: s(LEAVES[w], dtype), table: s(LEAVES[table], dtype)},
        batch={"x": s((ROWS, TEXT, WIDTH), dtype)},
    )


def step(trained, opt_state, frozen, batch, *, positions=4, stack=lambda w: w):
    """A model of three layers and its training step, in short."""

    def loss(trained):
        def layer(x, leaves):
            w, a = leaves
            return x + jnp.tanh(x @ w.astype(x.dtype)) @ a.astype(x.dtype) @ jnp.ones((2, WIDTH), x.dtype), None

        w, table, lora = LEAVES
        x = jax.lax.scan(jax.checkpoint(layer), batch["x"], (stack(frozen[w]), trained[lora]))[0]
        # Read twice, so that it isn't fused away.
        logits = jnp.sin(x[:, :positions] @ frozen[table].T.astype(x.dtype))
        return (jax.nn.logsumexp(logits, -1).sum() + jnp.sort(logits, -1)[..., 0].sum()).astype("float32")

    gradient = jax.grad(loss)(trained)
    new = jax.tree.map(lambda x, g, m: x - g - m, trained, gradient, {n: opt_state[0] for n in trained})
    return new, (opt_state[0] + 1,)


def program(donated=("trained", "opt_state"), **kw):
    names = (*arguments(),)
    jitted = jax.jit(
        lambda trained, opt_state, frozen, batch: step(trained, opt_state, frozen, batch, **kw),
        donate_argnums=[names.index(n) for n in donated],
    )
    return hlo.Program(jitted.lower(*arguments().values()).compile().as_text())


def checks(found):
    return {f.check for f in found}


def test_what_is_as_it_should_be():
    assert audit.audit(program(), dataclasses.replace(OF, in_bfloat16=False)) == []


def test_a_whole_stack_that_is_cast_is_found():
    """Outside of the loop over layers, as `w.astype` before `scan` would do."""
    found = audit.whole_weights(program(stack=lambda w: jnp.sin(w)), OF)
    assert checks(found) == {"weights"} and "llm/layers/w" in found[0].what
    assert found[0].bytes == 4 * DEPTH * WIDTH * WIDTH
    assert audit.whole_weights(program(stack=lambda w: jnp.sin(w)), dataclasses.replace(OF, least=2**20)) == []


def test_logits_of_all_tokens_are_found():
    assert not audit.logits(program(positions=TEXT - 1), OF)
    found = audit.logits(program(positions=TEXT), OF)
    assert found and found[0].bytes == 4 * ROWS * TEXT * VOCAB and "loss_chunk" in str(found[0])


def test_what_is_not_donated_is_found():
    found = audit.not_donated(program(donated=("trained",)))
    assert [f.bytes for f in found] == [4 * DEPTH * WIDTH * 2] and "opt_state" in str(found[0])


@pytest.mark.parametrize("bad", [False, True])
def test_wide_products_are_found_before_xla(bad):
    w, table, _ = LEAVES
    given = arguments("bfloat16")["frozen"]
    x = jax.ShapeDtypeStruct((ROWS, WIDTH), "bfloat16")

    def f(frozen, x):
        y = jax.lax.scan(lambda x, w: (x @ w, None), x, frozen[w])[0]
        return y.astype("float32" if bad else "bfloat16") @ frozen[table].T

    found = audit.wide_products(audit.before_xla(jax.jit(f).lower(given, x)))
    assert [f.bytes for f in found] == ([2 * ROWS * WIDTH * VOCAB] if bad else [])


@pytest.mark.parametrize("whole", [False, True])
def test_gathers_of_more_than_a_layer_are_found(whole):
    mesh = Mesh(np.array(jax.devices()[:8]), "d")

    def s(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    def to(x, *spec):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def f(frozen, x):
        w = frozen["llm/layers/w"]
        w = jnp.sin(to(w, None)) if whole else w
        return jax.lax.scan(lambda x, w: (to(jnp.tanh(x @ to(w, None)), "d"), None), x, w)[0]

    given = {"llm/layers/w": s(LEAVES["llm/layers/w"], None, "d")}
    compiled = jax.jit(f).lower(given, s((64, WIDTH), "d")).compile()
    found = audit.gathered(hlo.Program(compiled.as_text()), OF, overlaps=False)
    assert [f.bytes for f in found] == ([4 * DEPTH * WIDTH * WIDTH] if whole else [])
    # A CPU can't do anything else meanwhile; a chip could.
    late = audit.gathered(hlo.Program(compiled.as_text()), OF, overlaps=True)
    assert whole or ["at once" in f.what for f in late] == [True]


@pytest.mark.parametrize("used", [False, True])
def test_a_layer_that_is_cut_out_of_its_stack_is_found(used):
    """Written out as it is, or read by the kernel that cuts it out."""

    def f(w, i):
        layer = jax.lax.dynamic_index_in_dim(w, i, keepdims=False)
        return jnp.sin(layer) if used else layer

    given = jax.ShapeDtypeStruct(LEAVES["llm/layers/w"], "float32"), jax.ShapeDtypeStruct((), "int32")
    found = audit.cut_out(hlo.Program(jax.jit(f).lower(*given).compile().as_text()), least=2**12)
    assert [f.bytes for f in found] == ([] if used else [4 * WIDTH * WIDTH])


def test_products_that_the_formula_has_not_are_found():
    found = program()
    flops = sum(p.flops * p.times for p in audit.compiled.products(found))
    assert not audit.recomputed(found, dataclasses.replace(OF, flops=flops / 1.04))
    (more,) = audit.recomputed(found, dataclasses.replace(OF, flops=flops / 1.1))
    assert "1.100 × the formula's" in str(more)


def one_device():
    """One of the eight that there are here."""
    return chips.Chip("here", "cpu", tuple(jax.devices()[:1]), 2**30, ())


@pytest.fixture(scope="module")
def tiny_step(optimised_file):
    """The tiny model's step with adapters in float32, layers in a loop, on one device."""
    model = {k: dict(v, depth=3, scan=True, remat_policy="nothing_saveable") for k, v in tiny.MODEL.items()}
    schedule = [(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)]
    lora = [("llm/layers/.*", dict(rank=2))]
    c = tiny.config("/no/such/folder", model=model, schedule=schedule, lora=lora, supervised_len=8)
    with one_device().target():
        return dry_run.compile_step(TrainingSetup.without_data(c))


def test_the_tiny_models_step_is_lean(tiny_step):
    found = hlo.Program(tiny_step.compiled.as_text())
    of = audit.facts(tiny_step, least=2**12)
    assert not of.in_bfloat16 and len(audit._stacks(found, of)) > 5
    assert audit.audit(found, of, overlaps=False) == []
    # XLA may drop products, and adds none.
    assert 0.95 * of.flops < sum(p.flops * p.times for p in audit.compiled.products(found)) <= of.flops


def test_the_program_tells_what_it_found(tiny_step, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(dry_run, "compile_step", lambda setup: tiny_step)
    assert audit.run(tiny_step.setup.config, one_device(), tmp_path / "step.gz") == []
    out = capsys.readouterr().out
    assert out.startswith("0 findings; products 0.9") and "traffic / needed" in out
    with gzip.open(tmp_path / "step.gz", "rt") as f:
        assert f.read() == tiny_step.compiled.as_text()
    monkeypatch.setattr(audit, "_MORE_FLOPS", 0.5)
    assert len(audit.run(tiny_step.setup.config, one_device())) == 1
    assert "recomputed" in capsys.readouterr().out
