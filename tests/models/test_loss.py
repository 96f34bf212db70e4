"""The loss against formulas written out, PyTorch, and a plain loop over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from paligemma_med.models import loss as losses
from tests.rounding import assert_close


def _logits(shape=(3, 4, 11), seed=0):
    rng = np.random.default_rng(seed)
    return (
        rng.normal(0, 3, shape).astype(np.float32),
        rng.integers(0, shape[-1], shape[:-1]).astype(np.int32),
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_cross_entropy_is_the_one_hot_formula(smoothing):
    logits, labels = _logits()
    vocab = logits.shape[-1]
    target = np.full(logits.shape, smoothing / (vocab - 1))
    np.put_along_axis(target, labels[..., None], 1 - smoothing, axis=-1)
    expected = optax.softmax_cross_entropy(logits, target.astype(np.float32))
    found = losses.cross_entropy(logits, labels, smoothing)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gradient_of_cross_entropy_is_that_of_the_one_hot_formula(smoothing):
    logits = 3 * jax.random.normal(jax.random.key(0), (2, 3, 11))
    labels = jax.random.randint(jax.random.key(1), (2, 3), 0, 11)
    weights = jax.random.normal(jax.random.key(2), (2, 3))
    target = jnp.where(jax.nn.one_hot(labels, 11) > 0, 1 - smoothing, smoothing / 10)

    def formula(logits):
        return jnp.sum(-weights * jnp.sum(target * jax.nn.log_softmax(logits), axis=-1))

    wanted = jax.grad(formula)(logits)
    ours = jax.grad(lambda x: jnp.sum(weights * losses.cross_entropy(x, labels, smoothing)))(logits)
    np.testing.assert_allclose(ours, wanted, atol=1e-6 * float(jnp.abs(wanted).max()), rtol=0)


def test_cross_entropy_is_pytorchs():
    import torch

    logits, labels = _logits(seed=1)
    expected = torch.nn.functional.cross_entropy(
        torch.tensor(logits).permute(0, 2, 1), torch.tensor(labels).long(), reduction="none"
    )
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), expected, rtol=1e-5)


def test_cross_entropy_of_bfloat16_is_computed_in_float32():
    logits, labels = _logits((2, 3, 500))
    low = jnp.asarray(logits, jnp.bfloat16)
    found = losses.cross_entropy(low, labels, 0.1)
    assert found.dtype == jnp.float32
    expected = losses.cross_entropy(low.astype(jnp.float32), labels, 0.1)
    np.testing.assert_array_equal(found, expected)


def test_cross_entropy_does_not_overflow():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    np.testing.assert_allclose(losses.cross_entropy(logits, jnp.array([[1]])), [[2e4]])


def _ragged():
    mask = np.zeros((4, 7), np.int32)
    mask[0, 2:6] = 1
    mask[1, 1:2] = 1
    mask[2, [0, 3, 6]] = 1  # need not be contiguous
    return mask  # row 3: nothing is supervised


@pytest.mark.parametrize("norm", losses.NORMS)
def test_weighted_sum_is_the_mean_that_a_loop_takes(norm):
    mask = _ragged()
    nll = np.random.default_rng(2).uniform(0, 5, mask.shape).astype(np.float32)
    if norm == "example":
        means = []
        for row, m in zip(nll, mask):
            tokens = [x for x, is_on in zip(row, m) if is_on]
            means.append(sum(tokens) / len(tokens) if tokens else 0.0)
        expected = sum(means) / len(means)
    else:
        tokens = [x for x, is_on in zip(nll.ravel(), mask.ravel()) if is_on]
        expected = sum(tokens) / len(tokens)
    weights = losses.row_weights(mask, norm)
    assert weights.dtype == jnp.float32
    assert_close(jnp.sum(nll * mask * weights[:, None]), expected)


def test_unknown_norm():
    with pytest.raises(ValueError, match="loss_norm is 'mean'"):
        losses.row_weights(_ragged(), "mean")


@pytest.mark.parametrize("norm", losses.NORMS)
def test_nothing_supervised_gives_zero_and_finite_gradients(norm):
    mask = np.zeros((2, 3), np.int32)
    logits, labels = _logits((2, 3, 5))

    def loss(logits):
        nll = losses.cross_entropy(logits, labels)
        return jnp.sum(nll * mask * losses.row_weights(mask, norm)[:, None])

    value, grads = jax.value_and_grad(loss)(logits)
    assert value == 0 and np.isfinite(grads).all()


@pytest.mark.parametrize("length, lost", [(None, 0), (7, 0), (100, 0), (4, 0), (3, 1), (1, 5)])
def test_supervised_positions(length, lost):
    mask = _ragged()
    positions, weights, found_lost = losses.supervised_positions(mask, length)
    assert int(found_lost) == lost
    wanted = min(length or 7, 7)
    assert positions.shape == weights.shape == (4, wanted)
    assert weights.dtype == jnp.float32
    for row, (p, w) in enumerate(zip(np.asarray(positions), np.asarray(weights))):
        on = np.flatnonzero(mask[row])[:wanted]
        np.testing.assert_array_equal(p[: len(on)], on)
        np.testing.assert_array_equal(w, [1] * len(on) + [0] * (wanted - len(on)))
        assert len(set(p)) == wanted, "a position stands twice"


def test_loss_at_supervised_positions_is_the_loss_at_all():
    mask = _ragged()
    logits, labels = _logits((4, 7, 11))

    def loss(length):
        positions, weights, _ = losses.supervised_positions(mask, length)
        nll = losses.cross_entropy(
            jnp.take_along_axis(jnp.asarray(logits), positions[..., None], axis=1),
            jnp.take_along_axis(jnp.asarray(labels), positions, axis=1),
        )
        return jnp.sum(nll * weights * losses.row_weights(mask, "example")[:, None])

    by_hand = losses.cross_entropy(logits, labels) * mask
    by_hand = jnp.sum(by_hand * losses.row_weights(mask, "example")[:, None])
    assert_close(loss(4), by_hand)
    assert_close(loss(None), by_hand)
    assert abs(loss(2) - by_hand) > 1e-3  # what is cut off does count


def _chunked(chunk, cap=None, smoothing=0.0, dtype="float32"):
    """(nll, gradients by x and by the table) for 5 positions of 2 rows, 11 tokens."""
    rng = np.random.default_rng(3)
    x, table = (jnp.asarray(rng.normal(0, 1, s), dtype) for s in ((2, 5, 6), (11, 6)))
    labels = jnp.asarray(rng.integers(0, 11, (2, 5)))
    weights = jnp.asarray(rng.uniform(0, 1, (2, 5)), jnp.float32)

    def loss(x, table):
        def compute_logits(x):
            logits = jnp.einsum("BPD,VD->BPV", x, table, preferred_element_type=jnp.float32)
            return cap * jnp.tanh(logits / cap) if cap else logits

        nll = losses.chunked_cross_entropy(compute_logits, x, labels, chunk, smoothing)
        return jnp.sum(nll * weights), nll

    grads, nll = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(x, table)
    assert nll.shape == (2, 5) and nll.dtype == jnp.float32
    return nll, *grads


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("kw", [{}, dict(cap=2.0, smoothing=0.1)], ids=["plain", "cap, smoothing"])
def test_chunked_loss_and_gradients_are_those_of_the_whole(chunk, kw):
    for found, expected in zip(_chunked(chunk, **kw), _chunked(None, **kw), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_chunked_loss_of_bfloat16_differs_by_no_more_than_its_sums():
    """Rows of x are each their own; only the table's gradient is a sum over chunks."""
    nll, by_x, by_table = _chunked(2, dtype="bfloat16")
    expected = _chunked(None, dtype="bfloat16")
    assert_close(nll, expected[0])
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in (by_x, expected[1])), rtol=8e-3)
    a, b = (np.asarray(a, np.float32) for a in (by_table, expected[2]))
    np.testing.assert_allclose(a, b, atol=0.02 * np.abs(b).max())


@pytest.mark.parametrize("length, chunk, sizes", [(10, 4, 4), (12, 4, 4), (9, 8, 5), (5, 1, 1)])
def test_chunks_are_nearly_equal_and_never_larger_than_asked(length, chunk, sizes):
    """9 positions by 8 at most are twice 5, not 8 and 1 with 7 of padding."""
    seen = []

    def compute_logits(x):
        seen.append(x.shape)
        return x

    x, labels = jnp.zeros((3, length, 7)), jnp.zeros((3, length), jnp.int32)
    jax.eval_shape(lambda: losses.chunked_cross_entropy(compute_logits, x, labels, chunk))
    assert {*seen} == {(3, sizes, 7)}
