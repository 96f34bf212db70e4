"""Rollout: by hand, in the right order, with and without discarding, on to the patches."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.saliency import rollout
from tests.rounding import assert_close

run = jax.jit(rollout.rollout, static_argnames=("fuse", "discard", "start_layer"))
fused = jax.jit(rollout.fused, static_argnames=("fuse", "discard"))


def attention(seed, layers=3, heads=2, length=6):
    """Random rows that sum to 1, some keys of which are not seen."""
    rng = np.random.default_rng(seed)
    x = rng.random((layers, heads, length, length)) ** 3
    x *= (rng.random((length, length)) < 0.8) | np.eye(length, dtype=bool)
    return (x / x.sum(-1, keepdims=True)).astype(np.float32)


def test_three_layers_by_hand():
    """Each layer moves one position onto another, so that the order can be read off:
    2 reads 1 in the first layer, 1 reads 0 in the second, 0 reads 2 in the third."""
    attn = np.tile(np.eye(3, dtype=np.float32), (3, 1, 1, 1))
    for layer, (reader, read) in enumerate([(2, 1), (1, 0), (0, 2)]):
        attn[layer, 0, reader] = np.eye(3)[read]
    # After layer 1, position 2 is half 1; after 2, position 1 is half 0, and 2 stays as it was;
    # after 3, position 0 is half itself and half of what 2 held: 1/4 of 1, 1/4 of 2.
    want = [[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 2, 0], [0, 1 / 2, 1 / 2]]
    np.testing.assert_array_equal(run(attn), want)
    # The other order would say that position 2 holds something of 0, which 1 read only later.
    a1, a2, a3 = (attn[:, 0] + np.eye(3)) / 2
    assert np.abs(a1 @ a2 @ a3 - want).max() > 0.1
    np.testing.assert_array_equal(run(attn, start_layer=2), a3)
    np.testing.assert_array_equal(run(attn, start_layer=1), a3 @ a2)


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    fuse=st.sampled_from(sorted(rollout.FUSES)),
    discard=st.sampled_from([0.0, 0.3, 0.9]),
)
def test_rows_sum_to_one_and_equal_float64(seed, fuse, discard):
    attn = attention(seed)
    got = run(attn, fuse=fuse, discard=discard)
    assert_close(np.sum(got, -1), 1)
    want = np.eye(6)
    for layer in attn:
        want = by_rows(layer, fuse, discard) @ want
    assert_close(got, want)


def by_rows(probs, fuse, discard):
    """`rollout.fused` again, a row at a time, in float64."""
    out = []
    for i, row in enumerate(getattr(np, fuse)(probs, axis=0).astype(np.float64)):
        seen = np.flatnonzero(row > 0)
        smallest = seen[np.argsort(row[seen], kind="stable")][: int(discard * len(seen))]
        row[[j for j in smallest if j != i]] = 0
        own = np.eye(len(row))[i]
        out.append((row / row.sum() + own) / 2 if row.sum() else own)
    return np.array(out)


def test_discard_treats_every_row_alike_and_spares_what_it_must():
    attn = attention(0, layers=1, length=8)[0]
    got = np.asarray(fused(attn, discard=0.5))
    before = attn.mean(0)
    for i, row in enumerate(got):
        assert row[before[i].argmax()] > 0 and row[i] >= 0.5
        dropped = (row == 0) & (before[i] > 0)
        assert dropped.sum() >= (before[i] > 0).sum() // 2 - 1  # its own may be one of them
    # Where all keys weigh the same none is smaller than another.
    even = np.full((1, 4, 4), 0.25, np.float32)
    assert_close(fused(even, discard=0.75), (0.25 + np.eye(4)) / 2)
    # Next to 1, a row keeps its largest key and itself.
    strict = np.asarray(fused(attn, discard=0.99))
    assert ((strict > 0).sum(-1) <= 2).all()


def test_padding_changes_nothing():
    attn = attention(3, length=5)
    padded = np.zeros((3, 2, 9, 9), np.float32)
    padded[..., :5, :5] = attn
    padded[..., 5:, 5:] = np.eye(4)
    got = np.asarray(run(padded, discard=0.4))
    assert_close(got[:5, :5], run(attn, discard=0.4))
    assert (got[:5, 5:] == 0).all()


def test_heads_that_never_agree_leave_the_residual():
    attn = np.stack([np.eye(2)[::-1], np.eye(2)])[None].astype(np.float32)
    np.testing.assert_array_equal(run(attn, fuse="min"), np.eye(2))
    assert_close(run(attn, fuse="max"), [[0.75, 0.25], [0.25, 0.75]])


def test_on_to_the_patches():
    """Token 0 was made of patch 1 alone, token 1 of both: shares follow, and sums are kept."""
    img = np.array([[0, 1], [0.5, 0.5]])
    got = rollout.to_patches(np.array([[0.2, 0.6], [1, 0]]), img)
    assert_close(got, [[0.3, 0.5], [0, 1]])
    attn = attention(4)
    rows = np.random.default_rng(0).random((3, 6))
    moved = rollout.to_patches(rows, run(attn))
    assert_close(np.sum(moved, -1), rows.sum(-1))


@pytest.mark.parametrize(
    "kw,message",
    [
        (dict(fuse="median"), r"fuse is 'median'; expected one of \['max', 'mean', 'min'\]"),
        (dict(discard=1.0), r"discard is 1.0; expected a share in \[0, 1\)"),
        (dict(start_layer=3), "start_layer is 3; expected 0 to 2"),
        (dict(start_layer=-1), "start_layer is -1; expected 0 to 2"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        functools.partial(rollout.rollout, **kw)(attention(0))
