"""Folds, which read attention as it streams by, and perturbations, to differentiate by it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.models import paligemma
from tests.models import hf
from tests.rounding import UNIT, assert_close


class Keep:
    """A fold whose outs are the probabilities, and whose state says which layer it is at."""

    def init(self, batch, heads, length):
        return dict(layer=jnp.int32(0), shape=jnp.zeros((batch, heads, length), jnp.int8))

    def step(self, state, probs):
        assert probs.shape == (*state["shape"].shape, state["shape"].shape[-1])
        return {**state, "layer": state["layer"] + 1}, (probs, state["layer"])


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model, variables, batch, capture_attention=True):
    inputs = (batch[k] for k in ("image", "text", "mask_ar"))
    return model.apply(variables, *inputs, capture_attention=capture_attention)


@functools.partial(jax.jit, static_argnums=0)
def score(model, params, batch, perturb):
    """((a figure of the first row's logits, out), its gradient by the perturbations)."""

    def figure(perturb):
        variables = {"params": params, "perturbations": paligemma.perturbations(**perturb)}
        logits, out = run(model, variables, batch)
        valid = jnp.arange(logits.shape[1]) < 5
        return jnp.sum(jnp.sin(logits[0]) * valid[:, None]), out

    return jax.value_and_grad(figure, has_aux=True)(perturb)


def variant_of(name, remat, **kw):
    img, llm = (dict(variant=None, remat_policy=remat, **hf.CASES[name][k]) for k in ("img", "llm"))
    return paligemma.Model(img=img, llm=llm, **kw)


@pytest.mark.parametrize("name", ["gqa"])
def test_a_fold_sees_every_layer_of_both_towers_in_order(name):
    case, _, model, params, batch = hf.reference(name)
    logits, want = run(model, {"params": params}, batch)
    got_logits, got = run(model, {"params": params}, batch, Keep())
    assert_close(got_logits, logits)
    for tower in ("img", "llm"):
        state, (probs, layer) = got[f"{tower}/attn"]
        np.testing.assert_array_equal(layer, np.arange(case[tower]["depth"]))
        assert state["layer"] == case[tower]["depth"]
        assert_close(probs, want[f"{tower}/attn"])


def test_each_tower_has_its_own():
    _, _, model, params, batch = hf.reference("mha")
    _, out = run(model, {"params": params}, batch, (False, Keep()))
    assert "img/attn" not in out and len(out["llm/attn"]) == 2
    _, out = run(model, {"params": params}, batch, (True, False))
    assert "llm/attn" not in out and out["img/attn"].ndim == 5


def test_init_makes_no_perturbations():
    model = variant_of("mha", "none")
    inputs = (jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32))
    assert set(jax.eval_shape(model.init, jax.random.key(0), *inputs)) == {"params"}


@functools.cache
def zeros_of(name):
    _, _, model, params, batch = hf.reference(name)
    _, out = jax.eval_shape(functools.partial(run, model), {"params": params}, batch)
    return {k: np.zeros(out[f"{k}/attn"].shape, np.float32) for k in ("img", "llm")}


@pytest.mark.parametrize("name,tower", [("gqa", "llm"), ("gqa", "img")])
def test_a_perturbation_is_added_to_the_probabilities_it_names(name, tower):
    """In one layer and head: that probability is captured changed, all before it are not, and the
    logits move as the gradient foretells."""
    _, _, model, params, batch = hf.reference(name)

    zeros = zeros_of(name)
    (_, out), grads = score(model, params, batch, zeros)
    _, plain = run(model, {"params": params}, batch)
    assert_close(out["llm/attn"], plain["llm/attn"])

    # One key that weighs much, in the first layer, so that all later ones feel it.
    grad = np.asarray(grads[tower])
    at = np.unravel_index(np.abs(grad[0, 0]).argmax(), grad.shape[2:])
    at = (0, 0, *map(int, at))
    eps = 1e-2
    ends = []
    for sign in (1, -1):
        moved = {k: v.copy() for k, v in zeros.items()}
        moved[tower][at] = sign * eps
        (value, out), _ = score(model, params, batch, moved)
        ends.append(float(value))
        change = np.asarray(out[f"{tower}/attn"] - plain[f"{tower}/attn"])
        np.testing.assert_allclose(change[0], moved[tower][0], rtol=0, atol=16 * UNIT)  # of probabilities, up to 1
        assert np.abs(change[1:]).max() > 64 * UNIT
    np.testing.assert_allclose((ends[0] - ends[1]) / (2 * eps), grad[at], rtol=2e-2)


def test_gradients_are_the_same_under_remat():
    _, _, model, params, batch = hf.reference("gqa")

    _, want = score(model, params, batch, zeros_of("gqa"))
    assert hf.CASES["gqa"]["llm"].get("remat_policy") is None  # by default "nothing_saveable"
    _, got = score(variant_of("gqa", "none"), params, batch, zeros_of("gqa"))
    for tower in ("img", "llm"):
        assert np.abs(want[tower]).max() > 1e-3
        assert_close(got[tower], want[tower])


def test_a_fused_kernel_refuses_folds_and_perturbations():
    _, _, _, params, batch = hf.reference("mha")
    model = variant_of("mha", "none", attn_impl="cudnn")
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        run(model, {"params": params}, batch, Keep())
    perturb = paligemma.perturbations(**zeros_of("mha"))
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        run(model, {"params": params, "perturbations": perturb}, batch, False)


@pytest.mark.parametrize("img,grid", [(dict(patch_size=7), (4, 6)), (dict(variant="mu/14"), (2, 3))])
def test_patch_grid(img, grid):
    model = paligemma.Model(img=img, llm=dict(variant="gemma_mu"))
    assert paligemma.patch_grid(model, np.zeros((1, 28, 42, 3))) == grid
