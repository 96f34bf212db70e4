"""LoRA: where it can be, how large it is, what it adds, and that a fresh one adds nothing."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.models import lora_targets, paligemma
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

# GQA, and query heads with keys of their own (`qkv_einsum`).
IMG = dict(width=12, depth=2, mlp_dim=20, num_heads=3, patch_size=8)
LLM = dict(width=16, depth=3, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=6, vocab_size=50)
MHA = dict(LLM, num_kv_heads=4)
ATTENTION = "(img/Transformer|llm/layers)/.*(query|key|value|out|einsum)/(kernel|w)"
ALL = [(".*", dict(rank=3, alpha=6))]


def make(rules=(), llm=LLM, **kw):
    towers = dict(scan=True, remat_policy="nothing_saveable")
    return paligemma.Model(img=dict(IMG, **towers), llm=dict(llm, **towers), lora=rules, **kw)


def flat_shapes(model, size=16):
    return flatten_tree(paligemma.abstract_params(model, image_size=size))


@functools.cache
def params_of(model, seed=0):
    """Random parameters in which nothing is zero; equal leaves of any two models are equal."""
    out = {}
    for name, x in flat_shapes(model).items():
        rng = np.random.default_rng([seed, *name.encode()])
        scale = 0.3 / math.sqrt(x.shape[-1])
        out[name] = rng.normal(0, 1 if "norm" in name.lower() else scale, x.shape).astype("f4")
    return out


def batch(rows=2, length=5):
    rng = np.random.default_rng(1)
    return (
        rng.uniform(-1, 1, (rows, 16, 16, 3)).astype("f4"),
        rng.integers(1, 50, (rows, length)),
        np.tile(np.arange(length) >= 3, (rows, 1)).astype("i4"),
    )


def apply_plainly(model, params, inputs, train=False, rng=None):
    rngs = None if rng is None else {"dropout": rng}
    return model.apply({"params": unflatten_tree(params)}, *inputs, train, rngs=rngs)[0]


apply = jax.jit(apply_plainly, static_argnums=0, static_argnames="train")


def init(model, seed):
    """{name: what the model initialises it to}."""
    made = jax.jit(lambda key: paligemma.init_params(model, key, image_size=16))
    return flatten_tree(made(jax.random.key(seed)))


def targets_of(model):
    return lora_targets.resolve(model.lora, flat_shapes(model.clone(lora=())))


# ---- What can be adapted, and how large that is


@pytest.mark.parametrize(
    "rules, count",
    [
        # Attention of both towers; of Gemma alone; the list of the authors' script, which reaches
        # q, k, v of SigLIP too; rank 12 (contract 5.7 and reference/medm.md 7).
        ([(ATTENTION, dict(rank=8))], 3_833_856),
        ([("llm/layers/attn/.*", dict(rank=8))], 1_843_200),
        ([(".*/(query|key|value)/kernel|llm/layers/.*", dict(rank=8))], 11_298_816),
        ([(ATTENTION, dict(rank=12))], 5_750_784),
        # The draft's list, without gate: q, k, v, o, up, down.
        ([(".*gating_einsum:gate", None), (".*/(query|key|value)/kernel|llm/layers/.*", dict(rank=12))], 12_966_912),
        # Attention, MLPs and projection head: the paper's figure of stage 2.
        ([("llm/layers/.*|img/.*", dict(rank=12))], 21_268_608),
    ],
)
def test_counts_at_the_true_size(rules, count):
    shapes = flat_shapes(paligemma.Model(lora=rules), 224)
    assert sum(x.size for n, x in shapes.items() if lora.is_factor(n)) == count


@pytest.mark.parametrize("llm", [LLM, MHA])
def test_every_projection_can_be_adapted_and_has_the_shapes_it_says(llm):
    plain, model = make(llm=llm), make(ALL, llm=llm)
    base, shapes = flat_shapes(plain), flat_shapes(model)
    found = targets_of(model)
    assert set(shapes) - set(base) == set(lora_targets.factor_names(found))
    for target, spec in found.items():
        a, b = lora_targets.factor_shapes(target, spec, base[target.param].shape)
        assert (shapes[f"{target.scope}/lora_a"].shape, shapes[f"{target.scope}/lora_b"].shape) == (
            a,
            b,
        )
    # All weights of rank 2 or more in a layer, but for embeddings.
    kernels = {n for n, x in base.items() if n.split("/")[-1] in ("kernel", "w", "linear")}
    kernels |= {"llm/layers/mlp/gating_einsum"}
    assert {t.param for t in found} == kernels - {"img/embedding/kernel"}


def test_k_and_v_have_factors_of_their_own():
    shapes = flat_shapes(make([(".*kv_einsum/w:v", dict(rank=2))]))
    names = [n for n in shapes if lora.is_factor(n)]
    assert names == [f"llm/layers/attn/kv_einsum/v/{f}" for f in lora.FACTORS]
    both = [n for n in flat_shapes(make([(".*kv_einsum/w", dict(rank=2))])) if lora.is_factor(n)]
    assert len(both) == 4 and shapes[names[0]].shape == (3, 16, 2)
    assert shapes[names[1]].shape == (3, 2, 2, 6)


@given(
    chosen=st.sets(st.sampled_from([t for t in lora_targets.TARGETS if t.param in make().leaves]), min_size=1),
    ranks=st.lists(st.integers(1, 9), min_size=20, max_size=20),
)
@settings(max_examples=30, deadline=None)
def test_first_match_wins_and_nothing_else_is_adapted(chosen, ranks):
    names = flat_shapes(make())
    rules = [(t.name, dict(rank=r)) for t, r in zip(sorted(chosen), ranks)]
    found = lora_targets.resolve([*rules, *((t.param, None) for t in chosen)], names)
    assert {t: s.rank for t, s in found.items()} == dict(zip(sorted(chosen), ranks))


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("img/Transformer/.*/querry/kernel", dict(rank=8))], "querry.*matches nothing that can"),
        ([("img/embedding/kernel", dict(rank=8))], "matches nothing that can be adapted; that is"),
        ([("kernel", dict(rank=8))], "matches nothing"),  # a regex must match the whole path
        ([("(", dict(rank=8))], "not a regular expression"),
        ([(".*", dict(rank=0))], "rank is 0; expected a whole number"),
        ([(".*", dict(rank=True))], "rank is True"),
        ([(".*", dict(rank=4, alpha=0))], "alpha is 0; expected a number above 0"),
        ([(".*", dict(rank=4, dropout=1.0))], "dropout is 1.0"),
        ([(".*", dict(rank=4, r=4))], r"expected \['rank', 'alpha', 'dropout', 'rslora'\]"),
        ([(".*", 8)], "expected dict"),
        ([".*"], "is no \\(regex, dict"),
    ],
)
def test_rules_that_are_wrong(rules, message):
    with pytest.raises(ValueError, match=message):
        lora_targets.resolve(rules, flat_shapes(make()))


# ---- What it adds


def check_fresh_adapters_change_no_bit(llm, dtype):
    plain, model = make(llm=llm, dtype=dtype), make(ALL, llm=llm, dtype=dtype)
    params, fresh = params_of(plain), init(model, 3)
    factors = {n: x for n, x in fresh.items() if lora.is_factor(n)}
    assert all((x == 0).all() == n.endswith("lora_b") for n, x in factors.items())
    want = apply(plain, params, batch())
    got = apply(model, {**params, **factors}, batch())
    np.testing.assert_array_equal(got, want)
    # In training as well, dropout of adapters included: B is zero.
    dropping = make([(".*", dict(rank=3, dropout=0.5))], llm=llm, dtype=dtype)
    got = apply(dropping, {**params, **factors}, batch(), train=True, rng=jax.random.key(0))
    np.testing.assert_array_equal(got, want)


def test_fresh_adapters_change_no_bit():
    check_fresh_adapters_change_no_bit(LLM, "bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("llm", [LLM, MHA])
def test_fresh_adapters_change_no_bit_when_optimised(llm, dtype, optimised):
    """What XLA fuses otherwise is just what could change a bit."""
    check_fresh_adapters_change_no_bit(llm, dtype)


@pytest.mark.parametrize("llm", [LLM, MHA])
def test_an_adapter_is_the_low_rank_change_of_its_kernel_alone(llm):
    """W + s·A·B written out with numpy, for each projection by itself, layers and all."""
    model, plain = make([(".*", dict(rank=3, alpha=7))], llm=llm), make(llm=llm)
    params = params_of(model)
    base = {n: x for n, x in params.items() if not lora.is_factor(n)}
    unchanged = apply(plain, base, batch())
    for target in targets_of(model):
        # All others add nothing.
        kept = {n: x * (n.startswith(f"{target.scope}/lora") or not n.endswith("lora_b")) for n, x in params.items()}
        a, b = (params[f"{target.scope}/{f}"].astype("f8") for f in lora.FACTORS)
        w = base[target.param].astype("f8")
        layers = w.shape[0] if target.stacked else 1
        w = w.reshape(layers, *w.shape[target.stacked :])
        a, b = a.reshape(layers, -1, 3), b.reshape(layers, 3, -1)
        for i in range(layers):
            delta = (7 / 3) * a[i] @ b[i]  # (inputs, outputs), heads flattened
            part = w[i] if target.index is None else w[i][target.index]
            if target.param.startswith("llm/layers/attn/") and target.inputs == "D":
                heads, d, h = part.shape  # the heads of the output stand before the input
                part += delta.reshape(d, heads, h).transpose(1, 0, 2)
            else:
                part += delta.reshape(part.shape)
        changed = {**base, target.param: w.reshape(base[target.param].shape).astype("f4")}
        got, expected = apply(model, kept, batch()), apply(plain, changed, batch())
        np.testing.assert_allclose(got, expected, atol=1e-5, rtol=0, err_msg=target.name)
        assert np.abs(got - unchanged).max() > 1e-3, f"{target.name} does nothing"


def test_scale_is_alpha_over_rank_or_its_root():
    assert lora.Spec(8, 32).scale == 4
    assert lora.Spec(16, 32, rslora=True).scale == 8
    assert lora.Spec(8).scale == 1
    base = params_of(make(ALL))
    doubled = {n: x * (2 if n.endswith("lora_b") else 1) for n, x in base.items()}
    twice = make([(".*", dict(rank=3, alpha=12))])
    np.testing.assert_allclose(apply(twice, base, batch()), apply(make(ALL), doubled, batch()), atol=1e-5, rtol=0)
    root = make([(".*", dict(rank=3, alpha=6 / math.sqrt(3), rslora=True))])
    np.testing.assert_allclose(apply(root, base, batch()), apply(make(ALL), base, batch()), atol=1e-5, rtol=0)


def test_a_is_kaiming_uniform_and_each_layer_has_its_own():
    wide = dict(LLM, width=256, num_heads=4, head_dim=32)
    model = make([("llm/layers/attn/.*", dict(rank=64))], llm=wide)
    fresh = init(model, 0)
    for name, inputs in (("q_einsum", 256), ("kv_einsum/k", 256), ("attn_vec_einsum", 4 * 32)):
        a = np.asarray(fresh[f"llm/layers/attn/{name}/lora_a"]).reshape(3, inputs, 64)
        bound = 1 / math.sqrt(inputs)  # sqrt(6 / ((1 + 5) · inputs))
        assert np.abs(a).max() <= bound and np.abs(a).max() > 0.99 * bound
        assert a.std() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(np.corrcoef(a[0].ravel(), a[1].ravel())[0, 1]) < 0.05
    k, v = (np.asarray(fresh[f"llm/layers/attn/kv_einsum/{p}/lora_a"]) for p in "kv")
    assert (k != v).mean() > 0.99


# ---- Under scan, remat, bfloat16, sharding; dropout


def test_unrolled_and_without_remat_it_is_the_same():
    params = params_of(make(ALL))
    expected = apply(make(ALL), params, batch())
    for scan, policy in itertools.product((True, False), ("none", "dots_saveable")):
        kw = dict(scan=scan, remat_policy=policy)
        other = paligemma.Model(img=dict(IMG, **kw), llm=dict(LLM, **kw), lora=ALL)
        np.testing.assert_allclose(apply(other, params, batch()), expected, atol=1e-5, rtol=0)


def test_bfloat16_keeps_what_adding_to_the_kernel_would_round_away():
    """A change of one part in a thousand."""
    dense = lora.Dense(3, dtype="bfloat16", lora=lora.as_rules([("kernel", dict(rank=1))]))
    w, a, b = np.ones((8, 3), "f4"), np.zeros((8, 1), "f4"), np.full((1, 3), 1e-3, "f4")
    a[::2] = 1
    assert (jnp.asarray(w + a @ b, jnp.bfloat16) == 1).all()
    x = jnp.asarray([[1, -1] * 4], jnp.bfloat16)
    params = {"kernel": w, "bias": np.zeros(3, "f4"), "lora_a": a, "lora_b": b}
    y = dense.apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, "f4"), 4e-3, rtol=0.01)


def grads_of(model, params, inputs):
    @jax.jit
    def loss(factors, rest):
        logits = apply(model, {**rest, **factors}, inputs)
        return jnp.mean(jnp.square(logits))

    factors = {n: x for n, x in params.items() if lora.is_factor(n)}
    rest = {n: x for n, x in params.items() if not lora.is_factor(n)}
    return jax.value_and_grad(loss)(factors, rest)


FSDP = "fsdp(axis={}, min_size_to_shard_mb=0)"


@pytest.mark.parametrize(
    "rules",
    [
        [(".*lora_a", FSDP.format('"model"')), (".*", FSDP.format('"data"'))],
        pytest.param([(".*", FSDP.format('"data"'))], marks=pytest.mark.slow),
        pytest.param([(".*lora_a", FSDP.format('"model"')), (".*", "replicate")], marks=pytest.mark.slow),
        pytest.param([(".*", FSDP.format('("data", "model")'))], marks=pytest.mark.slow),
    ],
)
def test_sharded_over_devices_it_is_the_same(rules):
    from paligemma_med.parallel import sharding

    model, inputs = make(ALL), batch(rows=8)
    params = params_of(model)
    loss, grads = grads_of(model, params, inputs)
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    places = sharding.infer_sharding(flat_shapes(model), rules, mesh)
    placed = {n: jax.device_put(x, places[n]) for n, x in params.items()}
    assert any(not x.sharding.is_fully_replicated for x in placed.values())
    on_rows = jax.device_put(inputs, sharding.batch_sharding(mesh))
    loss2, grads2 = grads_of(model, placed, on_rows)
    np.testing.assert_allclose(loss2, loss, rtol=1e-5)
    for n in grads:
        scale = np.abs(grads[n]).max()
        assert scale > 0, n
        np.testing.assert_allclose(grads2[n], grads[n], atol=1e-5 * scale, rtol=0, err_msg=n)


def test_dropout_is_seeded_drops_inputs_of_adapters_only_and_keeps_the_mean():
    rules = [("llm/layers/mlp/linear", dict(rank=3, alpha=6, dropout=0.4))]
    model = make(rules)
    params = params_of(model)
    still = apply(model, params, batch())
    np.testing.assert_array_equal(
        still, apply(make([(rules[0][0], dict(rank=3, alpha=6))]), params, batch(), train=True)
    )

    def drawn(seed):
        return apply(model, params, batch(), train=True, rng=jax.random.key(seed))

    np.testing.assert_array_equal(drawn(1), drawn(1))
    assert np.abs(drawn(1) - drawn(2)).max() > 1e-4
    mean = np.mean([drawn(s) for s in range(300)], axis=0)
    spread = np.std([drawn(s) for s in range(300)], axis=0)
    assert np.abs(mean - still).mean() < 0.2 * spread.mean()
    with pytest.raises(Exception, match="dropout"):
        apply(model, params, batch(), train=True)


def test_decoding_with_a_cache_goes_through_the_adapters():
    """Prefill and one step give what the whole sequence gives."""
    model = make(ALL)
    params = {"params": unflatten_tree(params_of(model))}
    image, text, _ = batch(rows=1)
    mask_ar = np.array([[0, 0, 0, 0, 1]])
    whole = apply(model, params_of(model), (image, text, mask_ar))

    @jax.jit
    def prefill_and_step(params):
        (x, valid, ar), _ = model.apply(
            params, image, text[:, :4], mask_ar=mask_ar[:, :4], method="embed_image_and_text"
        )
        first, cache = model.apply(
            params,
            x,
            valid,
            ar,
            cache_size=x.shape[1] + 1,
            method="prefill_cache",
            mutable=["cache"],
        )
        ztxt, _ = model.apply(params, text[:, 4:], method="embed_text")
        second = model.apply({**params, **cache}, ztxt, method="extend_cache", mutable=["cache"])
        return first, second[0]

    first, second = prefill_and_step(params)
    np.testing.assert_allclose(first[:, 0], whole[:, 3], atol=1e-5, rtol=0)
    np.testing.assert_allclose(second[:, 0], whole[:, 4], atol=1e-5, rtol=0)


def test_models_with_adapters_are_hashable_and_told_apart():
    a, b = make(ALL), make([(".*", {"rank": 3, "alpha": 6.0})])
    assert hash(a) == hash(b) and a == b
    assert make([(".*", dict(rank=3, alpha=7))]) != a and make() != a
