"""A family's table of leaves against the parameters that its modules really make."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.models import connector, decoder, leaves, parts, vit
from paligemma_med.models.layers import norms
from paligemma_med.models.leaves import flatten_tree

SIZES = st.sampled_from((1, 2, 3, 5))  # axes of like letters must be alike, of others may differ


def tower_shapes(model, rows, columns):
    y, x = model.patch_size
    image = jnp.zeros((1, rows * y, columns * x, 3))
    return shapes(lambda key: model.init(key, image))


def decoder_shapes(model):
    return shapes(
        lambda key: model.init(
            key, jnp.zeros((1, 2), int), method=lambda m, x: m(m.embed_tokens(x), jnp.ones((1, 2, 2), bool))
        )
    )


def shapes(init):
    return {n: x.shape for n, x in flatten_tree(jax.eval_shape(init, jax.random.key(0))["params"]).items()}


def assert_describes(table, made, sizes):
    """Path by path, and axis by axis: `sizes` says how long the axis of a letter is."""
    assert {leaf.path for leaf in table} == set(made)
    assert len(table) == len(made)
    for leaf in table:
        sizes = {**sizes, "P": len(leaf.parts) or 3}  # a fused kernel holds q, k and v
        expected = [int(c) if c.isdigit() else sizes[c] for c in leaf.axes]
        assert list(made[leaf.path]) == expected, leaf
        assert leaf.role in leaves.ROLES
        assert set(leaf.inputs) <= set(leaf.letters)
        assert bool(leaf.inputs) == (leaf.role in ("product", "patch", "stem", "table"))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), scan=st.booleans())
def test_vit(data, scan):
    size = {c: data.draw(SIZES, c) for c in "LNHFYX"}
    size |= {"D": size["N"] * size["H"], "C": 3, "E": data.draw(st.sampled_from((None, 7)), "E")}
    model = vit.Model(
        size["E"],
        width=size["D"],
        depth=size["L"],
        mlp_dim=size["F"],
        num_heads=size["N"],
        patch_size=(size["Y"], size["X"]),
        scan=scan,
    )
    assert_describes(model.leaves, tower_shapes(model, 2, 3), {**size, "T": 6})


def test_vit_with_a_stem():
    """Its first convolution reads colours, what follows the stem's channels."""
    model = vit.Model(None, width=4, depth=1, mlp_dim=6, num_heads=2, patch_size=(8, 4), stem=5)
    made = tower_shapes(model, 2, 3)
    sizes = dict(L=1, N=2, H=2, F=6, D=4, S=5, T=6, C=5)
    first = [leaf for leaf in model.leaves if leaf.path == "stem_0/kernel"]
    assert_describes(first, {"stem_0/kernel": made.pop("stem_0/kernel")}, sizes | dict(Y=3, X=3, C=3))
    second = [leaf for leaf in model.leaves if leaf.path == "stem_1/kernel"]
    assert_describes(second, {"stem_1/kernel": made.pop("stem_1/kernel")}, sizes | dict(Y=3, X=3))
    others = [leaf for leaf in model.leaves if leaf not in (*first, *second)]
    assert_describes(others, made, sizes | dict(Y=2, X=1))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), scan=st.booleans())
def test_decoder(data, scan):
    size = {c: data.draw(SIZES, c) for c in "LKDFV"}
    fused, *flags = (data.draw(st.booleans(), n) for n in ("fused", "post_norms", "qk_norm", "embed_norm", "tie"))
    several = 1 if fused else data.draw(st.sampled_from((1, 2)), "N/K")
    size |= {"N": size["K"] * several, "H": 2 * data.draw(SIZES, "H/2")}
    model = decoder.Model(
        width=size["D"],
        depth=size["L"],
        mlp_dim=size["F"],
        num_heads=size["N"],
        num_kv_heads=size["K"],
        head_dim=size["H"],
        vocab_size=size["V"],
        fused=fused,
        **dict(zip(("post_norms", "qk_norm", "embed_norm", "tie"), flags, strict=True)),
        norm=data.draw(st.sampled_from(norms.KINDS[: 2 if any(flags[:2]) else 3]), "norm"),
        scan=scan,
    )
    assert_describes(model.leaves, decoder_shapes(model), size)


@pytest.mark.parametrize("variant", [*vit.VARIANTS])
def test_tower_variants(variant):
    model = vit.Model(7, variant=f"{variant}/14")
    size = dict(L=model.depth, D=model.width, N=model.num_heads, H=model.width // model.num_heads)
    size |= dict(F=model.mlp_dim, Y=14, X=14, C=3, E=7, T=6)
    assert_describes(model.leaves, tower_shapes(model, 2, 3), size)


@pytest.mark.parametrize("variant", [*decoder.VARIANTS])
def test_decoder_variants(variant):
    model = decoder.Model(variant=variant)
    size = dict(L=model.depth, D=model.width, N=model.num_heads, K=model.num_kv_heads, H=model.head_dim)
    assert_describes(model.leaves, decoder_shapes(model), {**size, "F": model.mlp_dim, "V": model.vocab_size})


def test_a_wrong_table_would_be_seen():
    model = vit.Model(variant="mu/16")
    made = tower_shapes(model, 1, 1)
    size = dict(L=1, D=32, N=2, H=16, F=128, Y=16, X=16, C=3, T=1)
    assert_describes(model.leaves, made, size)
    for wrong in (
        model.leaves[1:],
        (*model.leaves, model.leaves[0]),
        tuple(leaf._replace(stacked=False) for leaf in model.leaves),
        tuple(leaf._replace(letters=leaf.letters[::-1]) for leaf in model.leaves),
    ):
        with pytest.raises(AssertionError):
            assert_describes(wrong, made, size)


def test_no_two_leaves_of_a_family_share_a_path():
    connectors = [kind.LEAVES for kind in connector.KINDS.values()]
    for table in (vit.LEAVES, decoder.LEAVES, *connectors):
        assert len({leaf.path for leaf in table}) == len(table)
    between = {f"connector/{leaf.path}": leaf for table in connectors for leaf in table}
    assert len(parts.LEAVES) == len(vit.LEAVES) + len(decoder.LEAVES) + len(between)


def test_a_path_means_the_same_in_all_connectors():
    """Weights without a config, and names in other formats, go by the path."""
    meanings = {}
    for kind in connector.KINDS.values():
        for leaf in kind.LEAVES:
            assert meanings.setdefault(leaf.path, leaf._replace(when="")) == leaf._replace(when="")


def test_stacks():
    assert leaves.stack_of(vit.LEAVES) == "Transformer/encoderblock"
    assert leaves.stack_of(decoder.LEAVES) == "layers"
    assert leaves.stack_of(leaf for leaf in vit.LEAVES if not leaf.stacked) == ""
    assert (
        leaves.stack_of([leaves.Leaf("layers/a/w", "DF", stacked=True), leaves.Leaf("layers/ab/w", "DF", stacked=True)])
        == "layers"
    )


def test_axes():
    leaf = leaves.Leaf("layers/attn/out/kernel", "NHD", "NH", stacked=True)
    assert (leaf.axes, leaf.input_axes, leaf.folder) == ("LNHD", (-3, -2), "layers/attn/out")
    assert leaf._replace(parts=("a", "b")).axes == "LPNHD"
    assert leaf._replace(parts=("a",), stacked=False).axes == "NHD"
