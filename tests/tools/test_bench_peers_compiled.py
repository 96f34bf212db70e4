"""Steps of ours and of others compiled for the same work: the counts are of that work, and what can't be is refused."""

import math
import os
import sys

import jax
import jax.numpy as jnp
import pytest

from paligemma_med.parallel import compiled, hlo
from paligemma_med.setup import TrainingSetup
from tools.bench import peers_compiled, sizes

SIZE = sizes.SIZES["tiny"]


def work(what="full", dtype="float32", devices=1, **kw):
    return peers_compiled.Work(SIZE, what, dtype, SIZE.batch_size, tuple(jax.devices()[:devices]), **kw)


def flops_of(lowered):
    """Products of a program as XLA is given it."""
    return products(lowered.compiler_ir("hlo").as_hlo_module().to_string())


def products(text):
    program = hlo.Program(text)
    assert not program.unknown_loops
    return sum(p.flops * p.times for p in compiled.products(program))


def by_formula(of):
    setup = TrainingSetup.without_data(peers_compiled.config_of(of), mesh=of.mesh)
    return setup, setup.flops_per_example.per_example_executed * of.rows


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="float32 alone, found --dtype=bfloat16"):
        peers_compiled.big_vision(work(dtype="bfloat16"))
    monkeypatch.setenv("BIG_VISION_DIR", "/no/such")
    with pytest.raises(ValueError, match="'/no/such'; expected a checkout of google-research/big_vision"):
        peers_compiled.big_vision(work())
    with pytest.raises(ValueError, match="keras_hub is compiled for one device, found 2"):
        peers_compiled.keras_hub(work(devices=2))
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(ValueError, match="keras-hub can't be imported .*: pip install keras-hub"):
        peers_compiled.keras_hub(work())


def test_ours_is_the_work_of_the_benchmarks():
    setup, _ = by_formula(work("lora"))
    assert setup.trained_names and all("lora" in n for n in setup.trained_names)
    assert by_formula(work("stage1"))[0].trained_names == ["img/head/bias", "img/head/kernel"]
    everything = by_formula(work())[0]
    assert everything.trained_names == list(everything.abstract)
    assert by_formula(work(cut_logits=True))[1] < by_formula(work())[1]


def test_ours_has_the_products_of_its_formula():
    of = work("lora")
    assert flops_of(peers_compiled.ours(of)) == pytest.approx(by_formula(of)[1], rel=0.02)


def test_the_largest_kernels_move_nearly_all(optimised_file):
    def step(x):
        def layer(x, w):
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, jnp.ones((3, 64, 64)))[0].sum()

    program = hlo.Program(jax.jit(step).lower(jnp.ones((512, 64))).compile().as_text())
    found = peers_compiled.largest(program, 100)
    assert sum(n for _, _, n in found) == compiled.moved(program)
    assert [n for *_, n in found] == sorted((n for *_, n in found), reverse=True)
    (product,) = [x for x in found if "dot_general" in x[0]]
    assert product[1] == 3 and product[0].startswith("f32[512,64]")


@pytest.mark.slow
@pytest.mark.skipif("BIG_VISION_DIR" not in os.environ, reason="BIG_VISION_DIR is not set")
def test_big_vision_does_the_same_products():
    sides = peers_compiled.ours, peers_compiled.big_vision
    ours, its = (products(side(work()).compile().as_text()) for side in sides)
    assert its == pytest.approx(ours, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("what", sizes.WHATS)
def test_keras_hub_trains_what_ours_does(what, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip("keras_hub")
    trained, *_ = peers_compiled.keras_hub(work(what)).args_info[0][0]
    if what == "lora":  # two factors of each of a layer's four projections, in shapes of its own; biases stay trained
        assert len(trained) == 4 * (3 * SIZE.img["depth"] + 2 * SIZE.llm["depth"])
        return
    leaves = by_formula(work(what))[0]
    assert sum(math.prod(x.shape) for x in trained) == sum(leaves.abstract[n].size for n in leaves.trained_names)
