"""Layouts of tensors, there and back, and sizes from shapes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import CheckpointError
from paligemma_med.checkpoints.hf import layout
from paligemma_med.models import parts, vlm
from paligemma_med.models.leaves import flatten_tree


def written(letters, group):
    return "({} {}) {}".format(*letters) if group else " ".join(letters)


@settings(max_examples=50, deadline=None)
@given(st.permutations("ABC"), st.permutations("ABC"), st.booleans(), st.booleans())
def test_relayout_there_and_back_is_the_identity(old, new, group_old, group_new):
    old, new = written(old, group_old), written(new, group_new)
    size = dict(A=2, B=3, C=5)
    x = np.arange(30).reshape(layout.shape(old, size))
    there = layout.relayout(x, old, new, size)
    assert there.shape == layout.shape(new, size)
    np.testing.assert_array_equal(layout.relayout(there, new, old, size), x)


def test_an_axis_of_length_1_may_be_in_one_layout_alone():
    x, size = np.arange(6).reshape(2, 3), dict(T=2, D=3)
    ours = layout.relayout(x, "T D", "1 T D", size)
    np.testing.assert_array_equal(ours, x[None])
    np.testing.assert_array_equal(layout.relayout(ours, "1 T D", "T D", size), x)


def test_a_linear_layer_is_outputs_by_inputs():
    rows = {
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query": ("(N H) (D)", "(N H)"),
        "img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out": ("(D) (N H)", "(D)"),
        "img/head": ("(E) (D)", "(E)"),
    }
    for folder, theirs in rows.items():
        weight, bias = layout.dense("x", folder)
        assert (weight.name, bias.name) == ("x.weight", "x.bias")
        assert (weight.theirs, bias.theirs) == theirs
    value = layout.linear("v", "llm/layers/attn/kv_einsum/w", "v")
    assert (value.theirs, value.ours, value.index, value.part) == ("(K H) (D)", "K D H", 1, "llm")
    assert layout.linear("d", "llm/layers/mlp/linear", "down").index is None


def test_sizes_come_from_the_shapes_of_every_leaf():
    img = dict(variant=None, width=8, depth=3, mlp_dim=12, num_heads=2, patch_size=4)
    llm = dict(variant=None, width=10, depth=2, mlp_dim=14, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50)
    shapes = {k: v.shape for k, v in tree(img, llm).items()}
    sizes = layout.measure(shapes)
    assert sizes["img"] == dict(Y=4, X=4, C=3, T=9, D=8, N=2, H=4, F=12, E=10, L=3)
    assert sizes["llm"] == dict(V=50, D=10, N=4, K=2, H=6, F=14, L=2)
    for path, shape in shapes.items():
        assert layout.leaf_shape(parts.LEAVES[path], sizes[path.partition("/")[0]]) == shape
    wrong = {**shapes, "llm/layers/mlp/linear": (2, 14, 11)}
    with pytest.raises(CheckpointError, match=r"mlp/linear: found shape \(2, 14, 11\), expected \(2, 14, 10\)"):
        layout.measure(wrong)


def tree(img, llm):
    return flatten_tree(vlm.abstract_params(vlm.Model(img=img, llm=llm), image_size=12))
