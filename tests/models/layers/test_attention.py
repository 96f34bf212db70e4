"""attend and attend_cached against loops and float64, and what each implementation refuses."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.extend import core as jex

from paligemma_med.models import lean, splice
from paligemma_med.models.layers import attention
from tests.rounding import assert_close

# Jitted: one compilation a shape is quicker than one an operation.
attend = jax.jit(attention.attend, static_argnames=("scale", "softcap", "impl", "capture"))
attend_cached = jax.jit(attention.attend_cached, static_argnames=("scale", "softcap"))


def by_loops(q, k, v, mask, scale, softcap):
    """The definition, in float64: (output [B, T, N, H], probabilities [B, N, T, S])."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, heads, _ = q.shape
    group = heads // k.shape[2]
    out = np.zeros((*q.shape[:3], v.shape[3]))
    probs = np.zeros((batch, heads, length, k.shape[1]))
    for b in range(batch):
        for n in range(heads):
            for t in range(length):
                dots = k[b, :, n // group] @ q[b, t, n] * scale
                if softcap:
                    dots = softcap * np.tanh(dots / softcap)
                e = np.exp(dots - dots.max()) * mask[b, t]
                probs[b, n, t] = e / e.sum()
                out[b, t, n] = probs[b, n, t] @ v[b, :, n // group]
    return out, probs


def random_qkv(rng, batch, queries, keys, heads, kv_heads, width):
    q = rng.normal(size=(batch, queries, heads, width))
    k, v = rng.normal(size=(2, batch, keys, kv_heads, width))
    return (x.astype(np.float32) for x in (q, k, v))


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 1000),
    shape=st.sampled_from([(2, 5, 7, 4, 1, 6), (1, 6, 6, 6, 2, 3), (2, 4, 4, 3, 3, 5)]),
    softcap=st.sampled_from([None, 1.5]),
)
def test_attend_equals_the_definition(seed, shape, softcap):
    rng = np.random.default_rng(seed)
    q, k, v = random_qkv(rng, *shape)
    mask = rng.random((shape[0], shape[1], shape[2])) < 0.6
    mask[..., 0] = True
    want, want_probs = by_loops(q, k, v, mask, 0.7, softcap)
    got, probs = attend(q, k, v, mask, scale=0.7, softcap=softcap, capture=True)
    assert_close(got, want)
    assert_close(probs, want_probs)
    assert probs.dtype == jnp.float32
    assert_close(np.sum(probs, axis=-1), 1)
    assert (np.asarray(probs)[~np.broadcast_to(mask[:, None], probs.shape)] == 0).all()
    # The captured probabilities are those that made the output.
    again = np.einsum("bnts,bsnh->btnh", probs, np.repeat(v, shape[3] // shape[4], axis=2))
    assert_close(again, got)
    plain, nothing = attend(q, k, v, mask, scale=0.7, softcap=softcap)
    assert nothing is None
    assert_close(plain, got)


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (6, 2), (3, 3)])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_gradients_are_those_that_jax_derives(heads, kv_heads, softcap):
    """The backward pass is written by hand; that under capture, which is plain, is derived."""
    rng = np.random.default_rng(5)
    q, k, v = random_qkv(rng, 2, 5, 7, heads, kv_heads, 4)
    weight = rng.normal(size=q.shape).astype(np.float32)
    mask = rng.random((2, 5, 7)) < 0.5
    mask[0, 2] = False  # sees nothing
    mask[1] = True

    def loss(q, k, v, capture):
        kw = dict(scale=0.7, softcap=softcap, capture=capture)
        return jnp.sum(weight * attention.attend(3 * q, k, v, mask, **kw)[0])

    grad = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnames="capture")
    for got, want in zip(grad(q, k, v, capture=False), grad(q, k, v, capture=True), strict=True):
        assert np.abs(want).max() > 0.1
        assert_close(got, want)


@pytest.mark.parametrize("heads, kv_heads", [(8, 1), (6, 6)])
def test_no_product_wants_a_matrix_of_scores_transposed(heads, kv_heads):
    """Which would be a copy of it on a CPU: contracted are the last axes of a left factor, and of
    a right one the first behind those in common."""
    (q, k, v), found = random_qkv(np.random.default_rng(6), 2, 5, 7, heads, kv_heads, 3), []

    def loss(q, k, v):
        return jnp.sum(attention.attend(q, k, v, scale=1.0)[0] ** 2)

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dot_general":
                contracted, (common, _) = eqn.params["dimension_numbers"]
                for i, x in enumerate(eqn.invars):
                    if {5, 7} <= set(x.aval.shape):
                        n, axes = len(contracted[i]), x.aval.ndim
                        first = axes - n if i == 0 else len(common)
                        found.append(tuple(contracted[i]) == tuple(range(first, first + n)))
            for inner in jex.jaxprs_in_params(eqn.params):
                visit(inner)

    visit(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(q, k, v).jaxpr)
    assert found == 4 * [True]  # by v, of the output, by q, by k


# Five image tokens, then text: prompts of 1 and 3 tokens, then causal.
PREFIX = np.array([6, 8])
PREFIX_LM = np.arange(9) < np.maximum(PREFIX[:, None, None], np.arange(9)[:, None] + 1)


def test_a_split_mask_says_the_same(monkeypatch):
    """Values and gradients, with what computes lengths on any device in cuDNN's place."""
    monkeypatch.setattr(attention, "_FUSED", "xla")
    q, k, v = random_qkv(np.random.default_rng(7), 2, 9, 9, 4, 1, 8)
    lengths, rows = splice.split_mask(PREFIX_LM, 5)
    np.testing.assert_array_equal(lengths, PREFIX)
    assert rows.shape == (2, 4, 9)

    @functools.partial(jax.jit, static_argnames="impl")
    def run(q, k, v, mask, impl):
        def loss(*qkv):
            out, _ = attention.attend(*qkv, mask, scale=0.7, impl=impl)
            return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    got, want = run(q, k, v, (lengths, rows), "cudnn"), run(q, k, v, PREFIX_LM, "xla")
    jax.tree.map(assert_close, got, want)
    longer = run(q, k, v, (lengths + 1, rows), "cudnn")
    assert np.abs(longer[1] - want[1])[:, :5].max() > 1e-2


@pytest.mark.parametrize("split", [True, False])
def test_cudnn_kernels_without_a_gpu(monkeypatch, split):
    """The program for one, as far as it can be made here: with a split mask its kernels, forward
    and backward, get lengths and no bias, of which they would also make a gradient."""
    there = "jax._src.cudnn.fused_attention_stablehlo"
    monkeypatch.setattr(f"{there}.check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(f"{there}.check_compute_capability", lambda _: True)
    monkeypatch.setattr(f"{there}.is_cuda_compute_capability_equal", lambda _: False)
    q = jnp.zeros((2, 10, 8, 256), jnp.bfloat16)
    k = jnp.zeros((2, 10, 1, 256), jnp.bfloat16)
    mask = jnp.ones((2, 10, 10), bool)

    def loss(q, k, v):
        shown = splice.split_mask(mask, 6) if split else mask
        return jnp.sum(attention.attend(q, k, v, shown, scale=0.1, impl="cudnn")[0])

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    quoted = program.replace(r"\22", '"')
    kernels = re.findall(r'@__cudnn\$fmha(\w+)\(.*"mask_type": "(\w+)"', quoted)
    expected = [("Softmax", "PADDING"), ("SoftmaxBackward", "PADDING")]
    if not split:
        expected = [(f"ScaleBias{name}", "NO_MASK") for name, _ in expected]
    assert kernels == expected


def test_no_mask_means_all_are_seen():
    q, k, v = random_qkv(np.random.default_rng(0), 2, 3, 5, 4, 2, 6)
    got, _ = attend(q, k, v, scale=0.4)
    want, _ = attend(q, k, v, np.ones((2, 3, 5), bool), scale=0.4)
    assert_close(got, want)


def test_softmax_is_taken_in_float32_under_bfloat16():
    """4,096 equal keys: a bfloat16 sum would stick at 256, and probabilities at 1/256."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    k = v = jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    out, probs = attend(q, k, v, scale=1.0, capture=True)
    assert (out.dtype, probs.dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(probs, np.float64).sum(), 1, atol=1e-6)
    np.testing.assert_allclose(np.float32(out), 1, atol=2**-8)


def test_dot_products_are_accumulated_in_float32_under_bfloat16():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.bfloat16(3 * x) for x in random_qkv(rng, 1, 4, 9, 2, 1, 256))
    mask = np.ones((1, 4, 9), bool)
    _, want = by_loops(*(np.float64(np.float32(x)) for x in (q, k, v)), mask, 0.1, None)
    _, probs = attend(q, k, v, mask, scale=0.1, capture=True)
    # Logits near 100: rounding them to bfloat16 would move a probability by tens of percent.
    np.testing.assert_allclose(probs, want, atol=1e-4)


def test_a_row_that_sees_nothing_is_finite_with_finite_gradients():
    q, k, v = random_qkv(np.random.default_rng(2), 1, 3, 3, 2, 1, 4)
    mask = np.tril(np.ones((1, 3, 3), bool))
    mask[0, 2] = False

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, mask, scale=0.5, softcap=2.0)[0][:, :2] ** 2)

    grads = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    assert all(np.isfinite(g).all() for g in grads)
    assert np.isfinite(attend(q, k, v, mask, scale=0.5)[0]).all()


@pytest.mark.parametrize("samples,softcap,heads,kv_heads", [(1, None, 4, 1), (3, 1.0, 4, 2), (3, None, 3, 3)])
def test_attend_cached_equals_attend_on_all_keys(samples, softcap, heads, kv_heads):
    rng = np.random.default_rng(3)
    batch, width, before, room, step = 2, 6, 5, 4, 2
    rows = batch * samples
    q, nk, nv = random_qkv(rng, rows, 1, room, heads, kv_heads, width)
    _, pk, pv = random_qkv(rng, batch, 1, before, heads, kv_heads, width)
    pmask = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    nmask = np.arange(room) <= step

    got = attend_cached(q, (pk, pv, pmask), (nk, nv, nmask), scale=0.6, softcap=softcap)
    per_sample = [np.repeat(x, samples, axis=0) for x in (pk, pv, pmask)]
    keys, values = (np.concatenate([a, b], axis=1) for a, b in zip(per_sample, (nk, nv)))
    mask = np.concatenate([per_sample[2], np.tile(nmask, (rows, 1))], axis=1)[:, None]
    want, _ = attend(q, keys, values, mask, scale=0.6, softcap=softcap)
    assert_close(got, want)
    assert got.shape == q.shape


def test_refusals():
    q, k, v = random_qkv(np.random.default_rng(4), 1, 2, 2, 2, 1, 4)
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        attention.attend(q, k, v, scale=1.0, impl="cudnn", capture=True)
    with pytest.raises(ValueError, match="'cudnn' has no soft-cap"):
        attention.attend(q, k, v, scale=1.0, impl="cudnn", softcap=50.0)
    with pytest.raises(ValueError, match="'cudnn' can't be had here: .* Use attn_impl='xla'"):
        attention.attend(q, k, v, scale=1.0, impl="cudnn")
    with pytest.raises(ValueError, match="attn_impl is 'flash'; expected one of"):
        attention.attend(q, k, v, scale=1.0, impl="flash")


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_gradients_in_bfloat16_can_be_computed_on_a_cpu(kv_heads, optimised):
    """Of several rows whose query heads share keys: XLA kept a product in bfloat16 that its CPU backend refuses to
    compute. (On processors without AVX512-BF16 it didn't.)"""
    rng = np.random.default_rng(5)
    arrays = [x.astype(jnp.bfloat16) for x in random_qkv(rng, 2, 6, 6, 4, kv_heads, 8)]

    def loss(q, k, v):
        return jnp.sum(attention.attend(q, k, v, scale=0.5)[0].astype(jnp.float32) ** 2)

    found = lean.jit(jax.grad(loss, (0, 1, 2)))(*arrays)
    wanted = jax.grad(loss, (0, 1, 2))(*(x.astype(jnp.float32) for x in arrays))
    for a, b in zip(found, wanted):
        assert a.dtype == jnp.bfloat16
        assert_close(a.astype(jnp.float32), b, 8 * 2**15)  # units of bfloat16
