"""A model that reads quantised weights computes what it does with the dense ones they stand for.

How far those are from the weights they were made of is tested in tests/test_quantise.py, what a
train step holds of them in tests/training/test_compiled_step.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import quantise
from paligemma_med.models import decoder_layer, paligemma
from paligemma_med.models import loss as losses
from paligemma_med.models.layers import lora, quantised
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests import tiny
from tests.rounding import assert_close

RULES = [(".*", dict(rank=2))]
HEADS = {"shared keys": 1, "own keys": 4}


def make(num_kv_heads):
    """(model with adapters, its parameters by name) of two layers each."""
    model = paligemma.Model(
        img=dict(variant="mu/16", depth=2),
        llm=dict(variant="gemma_mu", num_kv_heads=num_kv_heads),
        lora=RULES,
    )
    shapes = flatten_tree(paligemma.abstract_params(model, image_size=tiny.RES))
    rng = np.random.default_rng(0)
    draw = {n: rng.normal(0, 0.1, x.shape).astype(np.float32) for n, x in shapes.items()}
    return model, draw


def split(params, kind):
    """Parameters by name → (those stored in `kind`, the dense ones they stand for)."""
    stored, dense = {}, {}
    for n, x in params.items():
        if how := quantise.kind_of(n, x.shape, kind):
            stored |= (found := quantise.quantise(n, x, how))
            weight = quantised.Weight(*map(jnp.asarray, found.values()), x.shape)
            dense[n] = quantised.product(lambda x, w: w, jnp.float32(0), weight)
        else:
            stored[n] = dense[n] = x
    return stored, dense


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", quantise.KINDS)
def test_logits_and_gradients_are_those_of_the_dense_weights(kind, heads):
    model, params = make(HEADS[heads])
    batch = tiny.batch(rows=2)
    stored, dense = split(params, kind)
    factors = {n: stored.pop(n) for n in params if lora.is_factor(n)}

    @jax.jit
    def run(factors, params):
        def mean_of(factors):
            tree = unflatten_tree({**params, **factors})
            args = (batch[k] for k in ("image", "text", "mask_ar"))
            logits, _ = model.apply({"params": tree}, *args)
            return jnp.mean(jax.nn.log_softmax(logits)[..., 5]), logits

        return jax.value_and_grad(mean_of, has_aux=True)(factors)

    (_, logits), grads = run(factors, stored)
    (_, expected), expected_grads = run(factors, {n: dense[n] for n in dense if n not in factors})
    np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    for n in grads:
        np.testing.assert_allclose(grads[n], expected_grads[n], rtol=1e-3, atol=1e-7, err_msg=n)
        assert np.any(grads[n]), n


BLOCK = "img/Transformer/encoderblock"
# Each form of layer that reads weights: (where it stands, the layer, width of its input).
LAYERS = {
    "Einsum of parts": (
        "llm/layers/attn/kv_einsum",
        lora.Einsum((2, 1, 16, 4), jax.nn.initializers.ones, (), True, parts="kv"),
        ("BTD,2KDH->BT2KH", (2, 3, 16)),
    ),
    "FeedForward": ("llm/layers/mlp", decoder_layer.FeedForward(12, "gelu_tanh", (), True), ((2, 3, 16),)),
    "Dense of heads": (
        f"{BLOCK}/MultiHeadDotProductAttention_0/out",
        lora.Dense(6, inputs=2),
        ((2, 3, 4, 8),),
    ),
}


@pytest.mark.parametrize("form", LAYERS)
def test_layers_read_quantised_weights(form):
    """Their results, and gradients by the input, are those with the dense weights."""
    at, layer, (*eqn, shape) = LAYERS[form]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    made = jax.eval_shape(lambda: layer.init(jax.random.key(0), *eqn, x))["params"]
    params = {f"{at}/{n}": rng.standard_normal(v.shape).astype(np.float32)[None] for n, v in made.items()}
    for kind in quantise.KINDS:
        trees = [{n.removeprefix(at + "/"): v[0] for n, v in tree.items()} for tree in split(params, kind)]
        assert len(trees[0]) > len(trees[1]) == len(params)

        def loss(x, tree):
            y = layer.apply({"params": tree}, *eqn, x)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(y))

        stored, dense = (jax.value_and_grad(loss)(x, tree) for tree in trees)
        np.testing.assert_allclose(stored[0], dense[0], rtol=1e-5)
        np.testing.assert_allclose(stored[1], dense[1], rtol=1e-4, atol=1e-5)


def test_a_large_table_is_read_in_parts(monkeypatch):
    rng = np.random.default_rng(0)
    table = rng.standard_normal((40, 12)).astype(np.float32)
    x = rng.standard_normal((2, 3, 12)).astype(np.float32)
    name = "llm/embedder/input_embedding"
    found = quantise.quantise(name, table, "int8")
    weight = quantised.Weight(*map(jnp.asarray, found.values()), table.shape)

    def loss(x):
        logits = quantised.logits(x, weight)
        return jnp.sum(jnp.sin(logits)), logits

    run = jax.value_and_grad(loss, has_aux=True)
    (_, whole), whole_grad = run(x)
    monkeypatch.setattr(quantised, "_COPY", 100)
    assert quantised._parts((40, 12)) == (8, 5)  # 8 rows, 96 numbers
    text = str(jax.make_jaxpr(run)(x))
    assert "f32[8,1,12]" in text and "f32[40,12]" not in text
    (_, parts), parts_grad = run(x)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(parts_grad, whole_grad, rtol=1e-4, atol=1e-5)
    x = np.concatenate([x, x])  # 12 rows of logits are as large as the table
    assert "f32[8,1,12]" not in str(jax.make_jaxpr(run)(x))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_logits_multiplies_what_the_model_does(dtype, chunk):
    """No product of float32 in a bfloat16 model, neither by the input nor by the table; JAX's own gradient has both."""
    rng = np.random.default_rng(0)
    x, table = (jnp.asarray(rng.standard_normal(s), dtype) for s in ((2, 4, 12), (40, 12)))
    labels = jnp.zeros((2, 4), int)

    def gradient(logits):
        def loss(x, table):
            return jnp.mean(losses.chunked_cross_entropy(lambda x: logits(x, table), x, labels, chunk))

        return jax.jit(jax.grad(loss, (0, 1)))

    def own(x, table):
        return jnp.einsum("...D,VD->...V", x, table, preferred_element_type=jnp.float32)

    def ours(x, table):
        return quantised.logits(x, quantised.Weight(table, None, table.shape))

    def wide(f):
        return [d for d in products(f, x, table) if "float32" in d]

    got, want = (gradient(f)(x, table) for f in (ours, own))
    for a, b in zip(got, want):
        assert a.dtype == b.dtype == dtype
        if dtype == "float32":
            assert_close(a, b)
        else:  # a step of rounding of each factor and of the result
            assert_close(a.astype("float32"), b.astype("float32"), units=2**16)
    if dtype == "bfloat16":
        assert len(wide(gradient(own))) == 2 and not wide(gradient(ours))


def products(f, *args):
    """The types of both factors of each product in a function, as JAX gives it to XLA."""
    text = f.lower(*args).as_text()
    found = re.findall(r"dot_general .*: \(tensor<[\dx]*(\w+)>, tensor<[\dx]*(\w+)>\)", text)
    assert found
    return [tuple({"f32": "float32", "bf16": "bfloat16"}[t] for t in pair) for pair in found]


def test_parts_of_the_true_table():
    groups, parts = quantised._parts((257_152, 2048))
    assert 257_152 * 2048 // parts <= 2**26 and groups == 64
    assert quantised._parts((1009, 24)) == (1, 1)


def test_rows_of_a_quantised_table():
    table = np.random.default_rng(0).standard_normal((40, 12)).astype(np.float32)
    found = quantise.quantise("llm/embedder/input_embedding", table, "int8")
    weight = quantised.Weight(*map(jnp.asarray, found.values()), table.shape)
    tokens = np.array([[3, 39], [0, 3]])
    rows = quantised.rows(weight, tokens, "float32")
    dense = quantised.product(lambda x, w: w, jnp.float32(0), weight)
    np.testing.assert_array_equal(rows, np.asarray(dense)[tokens])
