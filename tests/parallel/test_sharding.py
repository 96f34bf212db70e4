"""Meshes and strategy strings: what they give, and the sentence that a wrong one gets."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from paligemma_med import experiment
from paligemma_med.models.layers import activations
from paligemma_med.parallel import sharding
from tests import tiny


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


def test_fsdp_cuts_the_first_dimension_if_asked():
    """Of a layer: not gate and up, which are two; of queries the heads, rather than the longer input."""
    attn = {"q_einsum": _tree(w=(8, 8, 512, 64))}
    tree = {"llm": {"layers": {"mlp": _tree(gating_einsum=(8, 2, 512, 2048)), "attn": attn}}}
    mesh = sharding.make_mesh([("data", -1)])

    def cuts(strategy):
        return {sharding.short_spec(place) for place, _ in sharding.plan(tree, [(".*", strategy)], mesh).values()}

    assert cuts("fsdp()") == cuts('fsdp(cut="longest")') == {"-,-,-,data", "-,-,data,-"}
    assert cuts('fsdp(cut="first")') == {"-,-,data,-", "-,data,-,-"}
    with pytest.raises(ValueError, match="cut is 'last', expected 'longest' or 'first'"):
        cuts('fsdp(cut="last")')


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
        "fsdp()&tp(axis='model')",
        "fsdp()|",
        "tp()",
        "shard_dim(axis='model')",
        "shard_dim(axis='model', dim=True)",
        "shard_dim(axis='model', dim=0, ignore_ndim_error=1)",
    ],
)
def test_bad_strategy_is_quoted(text):
    with pytest.raises(ValueError) as e:
        sharding.parse_strategy(text)
    assert repr(text) in str(e.value)


def test_bad_pairs_and_axis():
    mesh = sharding.make_mesh([("data", -1)])
    tree = _tree(a=(8,), b=(8, 8))
    for rules, word in [
        (["replicate"], "pair"),
        ([("(", "replicate")], "not a regular expression"),
        ([(".*", 'fsdp(axis="model")')], "model"),
        ([(".*", 'fsdp()|tp(axis=("data", "nodel"))')], "nodel"),
        ([(".*", 'shard_dim(axis="data", dim=1)')], "a: shard_dim: there is no dimension 1"),
        ([(".*", 'shard_dim(axis="data", dim=0)|fsdp(min_size_to_shard_mb=0)')], "b: axis 'data'"),
        ([(".*", 'fsdp(min_size_to_shard_mb=0)|shard_dim(axis="data", dim=-1)')], "cut already"),
    ]:
        with pytest.raises(ValueError, match=word):
            sharding.infer_sharding(tree, rules, mesh)


# --- By kind of layer ---


def shapes(**kw):
    """{name: shape and type} of a model with an adapter on every projection."""
    c = tiny.config(
        model=dict(
            img=dict(variant="mu/16", depth=3, num_heads=4),
            llm=dict(variant="gemma_mu", depth=3, **kw),
        ),
        lora=[("(?!img/head).*", dict(rank=4))],
    )
    return experiment.abstract_params(c, experiment.make_model(c))


def cut_by(strategy, tree, *, only=("model",)):
    """{name: dimension that is cut} along the axes `only`."""
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    found = sharding.plan(tree, [(".*", strategy)], mesh)
    return {name: place.spec.index(axis) for name, (place, _) in found.items() for axis in only if axis in place.spec}


def test_tp_cuts_heads_mlps_and_vocabulary():
    block = "img/Transformer/encoderblock"
    attn = f"{block}/MultiHeadDotProductAttention_0"
    expected = {f"{attn}/{n}/kernel": 2 for n in ("query", "key", "value")}
    expected |= {f"{attn}/{n}/bias": 1 for n in ("query", "key", "value")}
    expected |= {f"{attn}/{n}/lora_b": 2 for n in ("query", "key", "value")}
    expected |= {f"{attn}/out/kernel": 1, f"{attn}/out/lora_a": 1}
    mlp = f"{block}/MlpBlock_0"
    expected |= {f"{mlp}/Dense_0/kernel": 2, f"{mlp}/Dense_0/bias": 1, f"{mlp}/Dense_0/lora_b": 2}
    expected |= {f"{mlp}/Dense_1/kernel": 1, f"{mlp}/Dense_1/lora_a": 1}
    attn, mlp = "llm/layers/attn", "llm/layers/mlp"
    expected |= {f"{mlp}/gating_einsum": 3, f"{mlp}/gate/lora_b": 2, f"{mlp}/up/lora_b": 2}
    expected |= {f"{mlp}/linear": 1, f"{mlp}/down/lora_a": 1, "llm/embedder/input_embedding": 0}
    expected |= {f"{attn}/attn_vec_einsum/w": 1, f"{attn}/attn_vec_einsum/lora_a": 1}
    q = {f"{attn}/q_einsum/w": 1, f"{attn}/q_einsum/lora_b": 2}
    kv = {f"{attn}/kv_einsum/w": 2, **{f"{attn}/kv_einsum/{p}/lora_b": 2 for p in "kv"}}
    qkv = {f"{attn}/qkv_einsum/w": 2, **{f"{attn}/qkv_einsum/{p}/lora_b": 2 for p in "qkv"}}
    for heads, more in [(1, q), (2, {**q, **kv}), (4, qkv)]:
        tree = shapes(num_kv_heads=heads)
        assert cut_by('tp(axis="model")', tree) == expected | more
        # A second strategy leaves what the first has cut.
        both = 'tp(axis="model")|fsdp(axis="data", min_size_to_shard_mb=0)'
        assert cut_by(both, tree) == expected | more
        data = cut_by(both, tree, only=("data",))
        for name, dim in data.items():
            assert dim != (expected | more).get(name) and tree[name].shape[dim] > 4, name
        assert data.keys() >= {n for n in tree if n.endswith(("kernel", "/w", "linear"))}


def test_what_an_axis_does_not_divide_stays_whole_and_is_told():
    mesh = sharding.make_mesh([("model", 8)])
    found = sharding.plan(shapes(), [(".*", 'tp(axis="model")')], mesh)
    place, note = found["llm/layers/attn/q_einsum/w"]
    assert place.spec == P() and note == "model=8 doesn't divide N=4"
    assert sharding.short_spec(found["llm/layers/mlp/linear"][0]) == "-,model,-"


def test_fsdp_leaves_layers_and_ranks_whole():
    """Even where these alone would divide."""
    mesh = sharding.make_mesh([("data", -1)])
    layers = {
        "mlp": {**_tree(linear=(8, 9, 9)), "down": _tree(lora_a=(8, 9, 8), lora_b=(8, 8, 9))},
        "pre_ffw_norm": _tree(scale=(8, 9)),
    }
    tree = {"llm": {"layers": layers}}
    found = sharding.infer_sharding(tree, [(".*", "fsdp(min_size_to_shard_mb=0)")], mesh)
    assert all(place.spec == P() for place in jax.tree.leaves(found))


def test_shard_dim_of_kernels_and_their_factors():
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    rules = [
        (".*/linear", 'shard_dim(axis="data", dim=1)'),  # by F, which lora_a has
        (".*/gating_einsum", 'shard_dim(axis=("data", "model"), dim=-2)'),  # by D
        (".*/Dense_0/(kernel|bias)", 'shard_dim(axis="data", dim=2, ignore_ndim_error=True)'),
        (".*/Dense_1/lora_.", 'shard_dim(axis="model", dim=0, ignore_ndim_error=True)'),
        (".*", "replicate"),
    ]
    tree = shapes()
    with pytest.raises(ValueError, match="Dense_1/lora_a.*divide dimension 0"):
        sharding.plan(tree, rules, mesh)
    # A rule with "lora" in it counts the factor's own dimensions.
    rules[3] = (".*/Dense_1/lora_a", 'shard_dim(axis="model", dim=-2)')
    rules.insert(0, ("llm/.*/v/lora_b", 'shard_dim(axis="model", dim=1)'))
    found = sharding.plan(tree, rules, mesh)
    block = "img/Transformer/encoderblock/MlpBlock_0"
    assert {n: sharding.short_spec(s) for n, (s, _) in found.items() if any(s.spec)} == {
        "llm/layers/mlp/linear": "-,data,-",
        "llm/layers/mlp/down/lora_a": "-,data,-",
        "llm/layers/mlp/gating_einsum": "-,-,data×model,-",
        "llm/layers/mlp/gate/lora_a": "-,data×model,-",
        "llm/layers/mlp/up/lora_a": "-,data×model,-",
        f"{block}/Dense_0/kernel": "-,-,data",
        f"{block}/Dense_0/lora_b": "-,-,data",
        f"{block}/Dense_1/lora_a": "-,model,-",
        "llm/layers/attn/kv_einsum/v/lora_b": "-,model,-,-",
    }
    assert found[f"{block}/Dense_0/bias"][1] == "it has no dimension 2"
    # BLOOM's adapter has the name of Gemma's, but the kernel is another.
    down = {"kernel": jnp.zeros((2, 8, 4)), "bias": jnp.zeros((2, 4)), "lora_a": jnp.zeros((2, 8, 2))}
    rules = [(".*/down/kernel", 'shard_dim(axis="data", dim=1)'), (".*", "replicate")]
    found = sharding.plan({"llm": {"layers": {"mlp": {"down": down}}}}, rules, mesh)
    assert sharding.short_spec(found["llm/layers/mlp/down/lora_a"][0]) == "-,data,-"


# --- Rules for activations ---


@pytest.mark.parametrize(
    "rules, words",
    [
        (["act_batch"], "pair"),
        ([("act_bacth", "data")], "no 'act_bacth'"),
        ([("act_emb", "nodel")], "'nodel' is not in the mesh"),
        ([("act_emb", ["data", "nodel"])], "'nodel' is not in the mesh"),
    ],
)
def test_wrong_rules(rules, words):
    with pytest.raises(ValueError, match=f"sharding_rules: .*{words}"):
        sharding.rules(dict(sharding_rules=rules), sharding.make_mesh([("data", -1)]))


def test_rules_are_read_of_a_config():
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    c = ml_collections.ConfigDict()
    for given, expected in [
        (None, (("act_batch", "data"),)),
        ([("act_len", ["data", "model"]), ("act_emb", None)], (("act_len", ("data", "model")), ("act_emb", None))),
    ]:
        c.sharding_rules = given
        with sharding.rules(c, mesh):
            assert activations.active.value == (mesh, expected)
    for rules, devices in [([], 8), (None, 1)]:
        one = sharding.make_mesh([("data", -1)], jax.devices()[:devices])
        with sharding.rules(dict(sharding_rules=rules), one):
            assert activations.active.value is None
