"""Codes and scales: cases worked by hand, bounds that hold for each weight, and what is cut how."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_med import checkpoints, experiment, quantise, train, weights
from paligemma_med.checkpoints import npz
from paligemma_med.models import lora_targets
from paligemma_med.models.layers import quantised
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import sharding
from tests import tiny

Q = "llm/layers/attn/q_einsum/w"  # [L, N, D, H], inputs D
OUT = "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/kernel"  # [L, N, H, D]
LINEAR = "llm/layers/mlp/linear"  # [L, F, D]
TABLE = "llm/embedder/input_embedding"  # [V, D]


def dense(name, array, kind):
    """float32 of what is stored of an array."""
    found = quantise.quantise(name, array, kind)
    made = quantised.Weight(*map(jnp.asarray, found.values()), array.shape)
    return np.asarray(quantised.product(lambda x, w: w, jnp.float32(0), made)), found


def test_int8_worked_by_hand():
    kernel = np.array([[[1.0, -2.0], [-0.5, 0.0], [0.25, 4.0]]], np.float32)
    found = quantise.quantise(LINEAR, kernel, "int8")
    # The largest of each column is 127.5 steps, of which 127 fit.
    codes = [[[127, -64], [-64, 0], [32, 127]]]
    np.testing.assert_array_equal(found[LINEAR], np.array(codes, np.int8))
    np.testing.assert_allclose(found[LINEAR + "_scale"], [[[1 / 127.5, 4 / 127.5]]], rtol=1e-6)


def test_nf4_worked_by_hand():
    # Along the inputs all 16 quantiles, times 4 upwards in one column, half downwards in the other.
    up = np.array(quantised.NF4, np.float32)
    kernel = np.stack([4 * up, 0.5 * up[::-1]], -1)[None]
    found, codes = dense(LINEAR, kernel, "nf4")
    # The first of two is the lower half of their byte.
    assert codes[LINEAR].tolist()[0] == [[i | (i + 1) << 4, (15 - i) | (14 - i) << 4] for i in range(0, 16, 2)]
    np.testing.assert_allclose(found, kernel, rtol=1e-6)
    assert codes[LINEAR + "_scale"].tolist() == [[[4.0, 0.5]]]


@pytest.mark.parametrize(
    "name, shape, kind, scales",
    [
        (Q, (2, 3, 128, 4), "int8", (2, 3, 1, 4)),
        (Q, (2, 3, 128, 4), "nf4", (2, 3, 2, 4)),
        (OUT, (2, 2, 72, 6), "int8", (2, 1, 1, 6)),
        (OUT, (2, 2, 72, 6), "nf4", (2, 2, 2, 6)),  # 64 doesn't divide 72, 36 does
        (TABLE, (40, 6), "int8", (40, 1)),
    ],
)
def test_each_weight_is_the_nearest_that_its_scale_allows(name, shape, kind, scales):
    kernel = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    kernel[0] = 0  # zeros stay zeros
    found, stored = dense(name, kernel, kind)
    scale = np.asarray(stored[name + "_scale"], np.float32)
    assert scale.shape == scales
    for axis, (n, s) in enumerate(zip(shape, scales)):
        scale = np.repeat(scale, n // s, axis)
    # nf4's scales are rounded to bfloat16 after the codes were chosen.
    levels = np.arange(-128, 128) if kind == "int8" else np.array(quantised.NF4)
    nearest = np.min(np.abs(kernel[..., None] - scale[..., None] * levels), -1)
    slack = 1e-6 if kind == "int8" else 2**-8 * scale
    assert np.all(np.abs(found - kernel) <= nearest + slack)
    assert not found[0].any()


def test_what_is_quantised():
    assert quantise.kind_of(Q, (2, 3, 128, 4), "nf4") == "nf4"
    assert quantise.kind_of(Q, (2, 3, 127, 4), "nf4") == "int8"  # no pairs
    assert quantise.kind_of(TABLE, (40, 6), "nf4") == "int8"
    for name in ("img/embedding/kernel", "llm/final_norm/scale", "img/head/bias", Q + "/lora_a"):
        assert quantise.kind_of(name, (4, 4), "int8") is None


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_stored_foretells_what_is_made(kind):
    array = np.ones((2, 3, 128, 4), np.float32)
    made = quantise.quantise(Q, array, kind)
    told = quantise.stored(Q, jax.ShapeDtypeStruct(array.shape, "float32"), kind)
    assert {n: (x.shape, x.dtype) for n, x in made.items()} == {n: (x.shape, x.dtype) for n, x in told.items()}


def test_codes_and_scales_are_cut_as_the_kernel_is():
    mesh = sharding.make_mesh([("data", -1), ("model", 2)])
    data = mesh.shape["data"]
    where = NamedSharding(mesh, PartitionSpec(None, "model", "data", None))
    x = jax.ShapeDtypeStruct((2, 4, 64 * data, 6), "float32", sharding=where)
    for kind, block_spec in (("int8", None), ("nf4", "data")):
        codes, scale = quantise.stored(Q, x, kind).values()
        assert codes.sharding.spec == PartitionSpec(None, "model", "data", None)
        assert scale.sharding.spec == PartitionSpec(None, "model", block_spec, None)


def test_what_is_not_finite_is_refused():
    with pytest.raises(ValueError, match=f"{LINEAR} has weights that aren't finite"):
        quantise.quantise(LINEAR, np.full((1, 2, 2), np.nan, np.float32), "int8")


@pytest.mark.parametrize("kind", quantise.KINDS)
def test_the_dense_weights_are_those_of_qwix(kind):
    kernel = np.random.default_rng(0).standard_normal((1, 256, 8)).astype(np.float32)
    found, stored = dense(LINEAR, kernel, kind)
    tiles = dict(channelwise_axes=(1,), tiled_axes={0: 64} if kind == "nf4" else {})
    tolerance = 1e-6 if kind == "int8" else 2**-8  # our nf4's scales are bfloat16
    theirs = qwix.quantize(kernel[0], kind, **tiles)
    scale = np.asarray(stored[LINEAR + "_scale"][0])
    np.testing.assert_allclose(scale.astype(np.float32), theirs.scale, rtol=tolerance)
    # A weight halfway between two codes may be rounded either way.
    differ = np.abs(found[0] - qwix.dequantize(theirs)) > tolerance * np.abs(found[0]) + 1e-6
    assert np.mean(differ) < 0.01


@pytest.mark.slow
def test_a_run_on_quantised_weights(tiny_data, tmp_path):
    """It trains, goes on where it was, evaluates, and its adapters merge into the dense base."""
    init, out = str(tmp_path / "base.npz"), str(tmp_path / "run")
    c = tiny.config(tiny_data)
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    rng = np.random.default_rng(0)
    base = {n: rng.normal(0, 0.1, x.shape).astype(np.float32) for n, x in abstract.items()}
    npz.save_npz(init, unflatten_tree(base))

    def config(**kw):
        constant = dict(decay_type="constant")
        schedule = [(".*/lora_[ab]", constant), (".*", None)]
        rules = [("llm/layers/.*", dict(rank=2))]
        kw = dict(model_init=init, lora=rules, schedule=schedule, frozen_dtype="nf4") | kw
        return tiny.config(tiny_data, **kw)

    train.train(config(total_steps=3, evals={}), out)
    with pytest.raises(ValueError, match="frozen weights .* in nf4; .* in int8 has other ones"):
        train.train(config(frozen_dtype="int8"), out)
    found = train.train(config(), out)["val"]
    whole = str(tmp_path / "whole")
    assert train.train(config(), whole)["val"] == found  # in one go
    assert np.isfinite(found["model/overall/acc"])

    params = flatten_tree(checkpoints.load_params(out))
    assert not [n for n in params if n.endswith("_scale")]
    for name, x in base.items():
        np.testing.assert_array_equal(params[name], x)
    merged = checkpoints.merge(
        unflatten_tree(params), lora_targets.resolve([("llm/layers/.*", dict(rank=2))], abstract)
    )
    assert np.any(flatten_tree(merged)[LINEAR] != base[LINEAR])
    _, _, _, loaded = weights.load(config(), out)
    assert loaded["llm"]["layers"]["mlp"]["linear"].dtype == jnp.uint8


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ['fsdp(axis="data", min_size_to_shard_mb=0)', 'tp(axis="model")'])
def test_logits_are_the_same_on_several_devices(monkeypatch, strategy, tmp_path):
    monkeypatch.setattr(quantise, "_ROWS", 100)
    monkeypatch.setattr(quantised, "_COPY", 2**13)  # the table is read in parts
    monkeypatch.setattr(quantised, "_few", lambda x: True)
    init = str(tmp_path / "base.npz")
    c = tiny.config()
    abstract = experiment.abstract_params(c, experiment.make_model(c))
    rng = np.random.default_rng(0)
    base = {n: rng.normal(0, 0.1, x.shape).astype(np.float32) for n, x in abstract.items()}
    npz.save_npz(init, unflatten_tree(base))
    batch = tiny.batch(rows=8)

    def logits(**kw):
        c = tiny.config(frozen_dtype="nf4", **kw)
        model, _, mesh, params = weights.load(c, init)
        found = params["llm"]["layers"]["mlp"]["linear"].sharding.spec
        args = [batch[k] for k in ("image", "text", "mask_ar")]
        with sharding.rules(c, mesh):
            run = jax.jit(lambda p, *args: model.apply({"params": p}, *args)[0])
            return np.asarray(run(params, *args)), found

    whole, _ = logits(mesh=[("data", 8)])
    mesh = [("data", 4), ("model", 2)]
    cut, spec = logits(mesh=mesh, sharding_strategy=[(".*", strategy)])
    assert any(spec)
    np.testing.assert_allclose(cut, whole, rtol=1e-4, atol=1e-4)
