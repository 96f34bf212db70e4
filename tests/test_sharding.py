"""Meshes and strategy strings: what they give, and the sentence that a wrong one gets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paligemma_med import sharding


def _tree(**shapes):
    return {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}


def test_make_mesh_fills_minus_one():
    assert dict(sharding.make_mesh([("data", -1)]).shape) == {"data": 8}
    assert dict(sharding.make_mesh((("data", -1), ("model", 2))).shape) == {"data": 4, "model": 2}
    one = sharding.make_mesh([("data", -1)], devices=jax.devices()[:1])
    assert dict(one.shape) == {"data": 1}


@pytest.mark.parametrize(
    "spec",
    [
        [],
        [("data", 3)],
        [("data", -1), ("model", 3)],
        [("data", -1), ("model", -1)],
        [("data", 2), ("data", 4)],
        [("data", 0)],
        [("data", "8")],
    ],
)
def test_make_mesh_refuses(spec):
    with pytest.raises(ValueError, match="mesh="):
        sharding.make_mesh(spec)


def test_mesh_lets_the_compiler_place_intermediates():
    # make_mesh's own default (explicit axes) would refuse this product of differently cut arrays.
    mesh = sharding.make_mesh([("data", -1)])
    x = jax.device_put(np.ones((8, 16), np.float32), sharding.batch_sharding(mesh))
    w = jax.device_put(np.ones((16, 8), np.float32), jax.NamedSharding(mesh, P("data", None)))
    np.testing.assert_array_equal(jax.jit(lambda x, w: x @ w)(x, w), np.full((8, 8), 16.0))


def test_batch_sharding_and_replicated():
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    x = jax.device_put(np.arange(8), sharding.batch_sharding(mesh))
    assert {s.data.shape for s in x.addressable_shards} == {(2,)}
    assert sharding.replicated(mesh).is_fully_replicated
    with pytest.raises(ValueError, match="model"):
        sharding.batch_sharding(sharding.make_mesh([("model", -1)]))


def test_fsdp_cuts_the_longest_divisible_dimension():
    mesh = sharding.make_mesh([("data", -1)])
    tree = _tree(stack=(24, 512, 2048), tie=(1024, 1024), odd=(1023, 2049), small=(8, 8))
    got = sharding.infer_sharding(tree, [(".*", 'fsdp(axis="data", min_size_to_shard_mb=1)')], mesh)
    assert {k: v.spec for k, v in got.items()} == {
        "stack": P(None, None, "data"),
        "tie": P(None, "data"),
        "odd": P(),
        "small": P(),
    }


def test_size_bound_counts_bytes():
    mesh = sharding.make_mesh([("data", -1)])
    rule = [(".*", "fsdp(min_size_to_shard_mb=2)")]
    for dtype, expected in [(jnp.float32, P("data")), (jnp.bfloat16, P())]:
        tree = {"a": jax.ShapeDtypeStruct((2**19,), dtype)}
        assert sharding.infer_sharding(tree, rule, mesh)["a"].spec == expected


def test_first_full_match_wins():
    mesh = sharding.make_mesh([("data", -1)])
    tree = {"img": {"head": _tree(kernel=(1024, 1024), bias=(2**20,))}}
    rules = [("img/head/k.*", "replicate"), (".*/kernel", "fsdp()"), (".*", "fsdp()")]
    got = sharding.infer_sharding(tree, rules, mesh)["img"]["head"]
    assert got["kernel"].spec == P() and got["bias"].spec == P("data")


def test_a_regex_that_matches_nothing_is_a_typo():
    mesh = sharding.make_mesh([("data", -1)])
    tree = {"img": {"head": _tree(kernel=(8, 8))}}
    for regex in ("head/.*", "img/head", "img/head/kernel/lora_a"):
        with pytest.raises(ValueError, match=f"'{regex}' matches no"):
            sharding.infer_sharding(tree, [(regex, "fsdp()"), (".*", "fsdp()")], mesh)
    # What an earlier rule took is matched nonetheless, and ".*" may be left with nothing.
    rules = [("img/.*", "fsdp()"), (".*kernel", "fsdp()"), (".*", "replicate")]
    sharding.infer_sharding(tree, rules, mesh)


def test_uncovered_leaf_is_named():
    mesh = sharding.make_mesh([("data", -1)])
    tree = {"img": _tree(kernel=(2,)), "llm": _tree(w=(2,))}
    with pytest.raises(ValueError, match="1 leaves.*'llm/w'"):
        sharding.infer_sharding(tree, [("img/.*", "replicate")], mesh)


@pytest.mark.parametrize(
    "text",
    [
        "nothing",
        "fsdp('data')",
        "fsdp(axes='data')",
        "fsdp(axis=open('x'))",
        "fsdp(axis=3)",
        "fsdp(min_size_to_shard_mb=True)",
        "fsdp(**{'axis': 'data'})",
        "fsdp(",
        "__import__('os').getcwd()",
        "replicate(axis='data')",
        "fsdp()|replicate",
    ],
)
def test_bad_strategy_is_quoted(text):
    with pytest.raises(ValueError) as e:
        sharding.parse_strategy(text)
    assert repr(text) in str(e.value)


def test_bad_pairs_and_axis():
    mesh = sharding.make_mesh([("data", -1)])
    tree = _tree(a=(8,))
    for rules, word in [
        (["replicate"], "pair"),
        ([("(", "replicate")], "regex"),
        ([(".*", 'fsdp(axis="model")')], "model"),
    ]:
        with pytest.raises(ValueError, match=word):
            sharding.infer_sharding(tree, rules, mesh)
