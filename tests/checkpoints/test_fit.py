"""Fitting weights to a model: positions, layers, vocabulary, and one message for all that doesn't fit."""

import ml_dtypes
import numpy as np
import pytest
import scipy.ndimage
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import CheckpointError, Lazy, fit, lazy, npz
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.trees import assert_same, tree
from tests.rounding import assert_close

BF16 = np.dtype(ml_dtypes.bfloat16)


# --- position embeddings --------------------------------------------------------------------------


@pytest.mark.parametrize("old, new", [(4, 9), (16, 49), (49, 16), (256, 1024), (9, 1), (1, 9)])
def test_resample_posemb_is_big_visions(old, new):
    emb = np.random.default_rng(0).normal(size=(1, old, 5)).astype(np.float32)
    side_old, side_new = int(old**0.5), int(new**0.5)
    zoom = (side_new / side_old, side_new / side_old, 1)
    want = scipy.ndimage.zoom(emb.reshape(side_old, side_old, 5), zoom, order=1)
    got = fit.resample_posemb(emb, new)
    assert_close(got, want.reshape(1, new, 5))


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 24), st.integers(2, 40))
def test_resampling_keeps_corners_and_reproduces_a_linear_field(old, new):
    def field(side):
        y, x = np.meshgrid(np.linspace(0, 1, side), np.linspace(0, 1, side), indexing="ij")
        return np.stack([1 + 0 * x, x, 2 * y - x], -1).reshape(1, side * side, 3).astype("float32")

    np.testing.assert_allclose(fit.resample_posemb(field(old), new**2), field(new), atol=1e-5)


def test_resampling_keeps_the_dtype_and_refuses_other_grids():
    emb = np.ones((1, 16, 3), BF16)
    assert fit.resample_posemb(emb, 64).dtype == BF16
    assert fit.resample_posemb(emb, 16) is emb
    for shape, new in [((1, 15, 3), 16), ((1, 16, 3), 15), ((1, 16, 3), 0), ((16, 3), 4)]:
        with pytest.raises(CheckpointError, match="position embeddings"):
            fit.resample_posemb(np.ones(shape), new)


@pytest.mark.parametrize("method", fit.RESAMPLING)
def test_a_class_tokens_row_stays(method):
    """EVA's 224 px to 448, and BiomedCLIP's."""
    emb = np.random.default_rng(0).normal(size=(1, 17, 3)).astype(np.float32)
    got = fit.resample_posemb(emb, 65, method=method)
    np.testing.assert_array_equal(got[:, 0], emb[:, 0])
    np.testing.assert_array_equal(got[:, 1:], fit.resample_posemb(emb[:, 1:], 64, method=method))
    for new in (64, 66, 1):  # a tower without a class token, and no square
        with pytest.raises(CheckpointError, match="can only resample square grids"):
            fit.resample_posemb(emb, new, method=method)


@pytest.mark.parametrize("old, new", [(16, 32), (16, 24), (5, 3), (3, 7), (1, 4), (2, 1)])
def test_bicubic_resampling_is_torchs(old, new):
    emb = np.random.default_rng(old).normal(size=(1, old * old, 4)).astype(np.float32)
    grid = torch.tensor(emb.reshape(1, old, old, 4).transpose(0, 3, 1, 2))
    want = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    want = want.numpy().transpose(0, 2, 3, 1).reshape(1, new * new, 4)
    np.testing.assert_allclose(fit.resample_posemb(emb, new * new, method="bicubic"), want, rtol=0, atol=1e-5)
    assert fit.resample_posemb(emb.astype(BF16), new * new, method="bicubic").dtype == BF16


# --- stacking -------------------------------------------------------------------------------------


def test_unstack_and_stack_are_inverse():
    params = tree()
    unrolled = fit.unstack_layers(params)
    assert set(unrolled["img"]["Transformer"]) == {
        "encoder_norm",
        "encoderblock_0",
        "encoderblock_1",
        "encoderblock_2",
    }
    np.testing.assert_array_equal(
        unrolled["img"]["Transformer"]["encoderblock_2"]["mlp"]["kernel"],
        params["img"]["Transformer"]["encoderblock"]["mlp"]["kernel"][2],
    )
    assert_same(fit.stack_layers(unrolled), params)
    assert_same(fit.stack_layers(params), params)


def test_more_than_ten_layers_keep_their_order():
    blocks = {f"encoderblock_{i}": {"w": np.full(2, i)} for i in reversed(range(12))}
    np.testing.assert_array_equal(fit.stack_layers(blocks)["encoderblock"]["w"][:, 0], np.arange(12))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda t: t.pop("encoderblock_1"), "layer 1 is missing"),
        (lambda t: t["encoderblock_2"].pop("mlp"), "mlp/kernel.*layer 2 is missing"),
        (lambda t: t["encoderblock_1"].update(mlp={"kernel": np.ones(2)}), "layer 1 has shape"),
        (lambda t: t.update(encoderblock={"mlp": {"kernel": np.ones(3)}}), "both stacked and"),
    ],
)
def test_layers_that_can_not_be_stacked_are_named(change, says):
    blocks = fit.unstack_layers(tree())["img"]["Transformer"]
    change(blocks)
    with pytest.raises(CheckpointError, match=says):
        fit.stack_layers(blocks)


def test_layers_that_can_not_be_unstacked_are_named():
    with pytest.raises(CheckpointError, match="encoderblock/b.*2 layers"):
        fit.unstack_layers({"encoderblock": {"a": np.ones((3, 1)), "b": np.ones((2, 1))}})


# --- vocabulary, matching -------------------------------------------------------------------------


def test_extend_vocab_keeps_the_old_rows():
    old = np.random.default_rng(0).normal(size=(50, 40)).astype(BF16)
    new = fit.extend_vocab(old, 100, seed=1)
    assert new.shape == (100, 40) and new.dtype == BF16
    np.testing.assert_array_equal(new[:50], old)
    assert 0.018 < new[50:].astype(np.float32).std() < 0.022
    np.testing.assert_array_equal(new, fit.extend_vocab(old, 100, seed=1))
    with pytest.raises(CheckpointError, match="shrink"):
        fit.extend_vocab(old, 49)


def test_match_takes_what_fits_and_resamples_position_embeddings():
    import jax

    params, want = tree(), tree(1)
    want["img"]["pos_embedding"] = np.zeros((1, 25, 6), np.float32)
    expected = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), want)
    got = fit.match_params(params, expected)
    np.testing.assert_array_equal(got["img"]["pos_embedding"], fit.resample_posemb(params["img"]["pos_embedding"], 25))
    got["img"]["pos_embedding"] = params["img"]["pos_embedding"]
    assert_same(got, params)


def test_match_converts_between_stacked_and_unrolled_layers():
    params = tree()
    unrolled = fit.unstack_layers(params)
    assert_same(fit.match_params(unrolled, params), params)
    assert_same(fit.match_params(params, unrolled), unrolled)


def test_match_names_every_key_that_does_not_fit():
    params, expected = tree(), tree()
    del params["img"]["head"]["bias"]
    params["llm"]["extra"] = np.ones((2, 2))
    params["llm"]["layers"]["w"] = np.ones((2, 4, 5))
    expected["img"]["pos_embedding"] = np.zeros((1, 15, 6))
    expected["llm"]["embedder"]["input_embedding"] = np.zeros((13, 4))
    with pytest.raises(CheckpointError) as e:
        fit.match_params(params, expected)
    for line in (
        "5 of 9 keys differ",
        "img/head/bias: missing, expected (4,)",
        "llm/extra: unexpected, found (2, 2)",
        "llm/layers/w: expected (2, 5, 4), found (2, 4, 5)",
        "llm/embedder/input_embedding: expected (13, 4), found (11, 4)",
        "img/pos_embedding: position embeddings: can only resample square grids",
    ):
        assert line in str(e.value)


def test_match_does_not_resample_a_position_embedding_of_another_width():
    with pytest.raises(CheckpointError, match=r"expected \(1, 16, 8\), found \(1, 25, 6\)"):
        fit.match_params({"pos_embedding": np.ones((1, 25, 6))}, {"pos_embedding": np.ones((1, 16, 8))})


def test_a_long_list_of_mismatches_is_cut_with_a_count():
    expected = {f"k{i:03d}": np.ones(1) for i in range(90)}
    with pytest.raises(CheckpointError, match="91 of 91 keys differ") as e:
        fit.match_params({"other": np.ones(1)}, expected)
    assert "and 71 more" in str(e.value) and len(str(e.value).splitlines()) == 22


# --- leaves that stay in the file -----------------------------------------------------------------


def unreadable(tree):
    """The tree with leaves that know their shape and can't be read."""

    def fail():
        raise AssertionError("read")

    return {key: unreadable(x) if isinstance(x, dict) else Lazy(x.shape, x.dtype, fail) for key, x in tree.items()}


def test_fitting_to_a_model_reads_nothing():
    params = tree()
    params["img"]["pos_embedding"] = np.ones((1, 25, 6), np.float32)
    unrolled = fit.unstack_layers(unreadable(params))
    fitted = fit.match_params(unrolled, tree())
    assert all(isinstance(x, Lazy) for x in flatten_tree(fitted).values())
    shapes = {k: x.shape for k, x in flatten_tree(fitted).items()}
    assert shapes == {k: x.shape for k, x in flatten_tree(tree()).items()}
    table = fit.extend_vocab(unreadable(params)["llm"]["embedder"]["input_embedding"], 20)
    assert table.shape == (20, 4)
    with pytest.raises(CheckpointError, match="can't shrink"):
        fit.extend_vocab(unreadable(params)["llm"]["embedder"]["input_embedding"], 3)


def test_lazy_and_eager_agree(tmp_path):
    params = tree()
    npz.save_npz(tmp_path / "w.npz", fit.unstack_layers(params))
    opened = npz.open_npz(tmp_path / "w.npz")
    expected = tree()
    expected["img"]["pos_embedding"] = np.ones((1, 25, 6))
    ours = fit.match_params(opened, expected)
    assert_same(lazy.read_all(ours), fit.match_params(params, expected))
    table = opened["llm"]["embedder"]["input_embedding"]
    np.testing.assert_array_equal(fit.extend_vocab(table, 20), fit.extend_vocab(np.asarray(table), 20))
    assert_same(
        lazy.read_all(fit.unstack_layers(fit.stack_layers(opened))),
        npz.load_npz(tmp_path / "w.npz"),
    )
