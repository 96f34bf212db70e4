"""Adapters apart from a model: put in, taken out, merged, and refused where they don't fit."""

import functools
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from paligemma_med.checkpoints import adapter, npz
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models import lora_targets
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints import adapters
from tests.models import hf
from tests.rounding import assert_close

CASES = ("mqa", "mha", "gemma2")


def applied(name, made, params=None):
    case, _, _, base, _ = hf.reference(name)
    img, llm = (dict(variant=None, **case[k]) for k in ("img", "llm"))
    return adapter.apply_adapter(img, llm, base if params is None else params, made)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image, text, mask_ar):
    return model.apply({"params": params}, image, text, mask_ar)[0]


def logits_of(name, model, params):
    batch = hf.reference(name)[4]
    return np.asarray(apply(model, params, batch["image"], batch["text"], batch["mask_ar"]))[batch["valid"]]


def base_logits(name):
    _, _, model, params, _ = hf.reference(name)
    return logits_of(name, model, params)


# ---- In and out


@pytest.mark.parametrize("rules", [adapters.ALL, adapters.MIXED], ids=["all", "mixed"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_put_in_comes_out(name, rules):
    made = adapters.random_adapter(name, rules)
    model, params = applied(name, made)
    adapters.assert_equal(adapter.extract_adapter(model, params), made)
    base = flatten_tree(adapter.remove_adapter(params))
    expected = flatten_tree(hf.reference(name)[3])
    assert base.keys() == expected.keys()
    assert all(base[n] is expected[n] for n in base)


def test_the_model_has_the_shapes_of_the_parameters():
    """… and abstract parameters are enough."""
    name = "mqa"
    case, _, _, base, _ = hf.reference(name)
    made = adapters.random_adapter(name)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
    model, params = applied(name, made, abstract)
    want = flatten_tree(adapter.vlm.abstract_params(model, image_size=case["image"]))
    assert {n: x.shape for n, x in flatten_tree(params).items()} == {n: x.shape for n, x in want.items()}


@pytest.mark.parametrize("name", ["mqa", "mha"])
def test_rules_are_plain_and_exact(name):
    made = adapters.random_adapter(name, adapters.MIXED)
    rules = json.loads(json.dumps(adapter.rules_of(made)))
    assert lora_targets.resolve(rules, flatten_tree(hf.reference(name)[3])) == made.specs


def test_one_kernel_for_q_k_v_or_two():
    """Both hold the same projections, and an adapter can't always tell which there is."""
    made = adapters.random_adapter("mha")
    split = adapter.Adapter(
        {lora_targets.TWINS.get(t, t): s for t, s in made.specs.items()},
        {lora_targets.TWINS.get(t, t): f for t, f in made.factors.items()},
    )
    assert made.specs.keys() != split.specs.keys()
    params, specs = adapter.insert_adapter(hf.reference("mha")[3], split)
    assert specs == made.specs
    adapters.assert_equal(adapter.extract_adapter(adapter.rules_of(made), params), made)


# ---- Merging


@pytest.mark.parametrize("name", CASES)
def test_merged_logits_equal_the_adapters(name):
    made = adapters.random_adapter(name, adapters.ALL)
    model, params = applied(name, made)
    want = logits_of(name, model, params)
    assert abs(want - base_logits(name)).max() > 0.1
    merged = adapter.merge(params, made.specs)
    assert jax.tree.structure(merged) == jax.tree.structure(hf.reference(name)[3])
    np.testing.assert_allclose(logits_of(name, model.clone(lora=()), merged), want, rtol=0, atol=1e-5)


def test_every_target_is_merged_into_its_own_kernel():
    """Against W + s·A·B written out from the model's einsums, in float64."""
    rules = [("img/head/kernel", dict(rank=5, alpha=5, rslora=True)), *adapters.MIXED]
    made = adapters.random_adapter("gemma2", rules)
    _, params = applied("gemma2", made)
    flat = flatten_tree(params)
    merged = flatten_tree(adapter.merge(params, made.specs))
    sums = {
        "query": "ldr,lrnh->ldnh",
        "value": "ldr,lrnh->ldnh",
        "Dense_0": "ldr,lrf->ldf",
        "Dense_1": "lfr,lrd->lfd",
        "head": "dr,re->de",
        "v": "ldr,lrkh->lkdh",
        "attn_vec_einsum": "lnhr,lrd->lnhd",
        "gate": "ldr,lrf->ldf",
        "up": "ldr,lrf->ldf",
        "down": "lfr,lrd->lfd",
    }
    want = {n: x.astype(np.float64) for n, x in flat.items() if not lora.is_factor(n)}
    for target, spec in made.specs.items():
        a, b = (flat[n].astype(np.float64) for n in lora_targets.factor_names([target]))
        scale = spec.alpha / (spec.rank**0.5 if spec.rslora else spec.rank)
        delta = scale * np.einsum(sums[target.scope.rpartition("/")[2]], a, b)
        at = () if target.index is None else (slice(None), target.index)
        want[target.param][at] += delta
    assert merged.keys() == want.keys()
    for n, x in merged.items():
        assert_close(x, want[n], err_msg=n)


def test_merging_rounds_once_at_the_end():
    made = adapters.random_adapter("mqa")
    _, params = applied("mqa", made)
    flat = flatten_tree(params)
    half = {n: x if lora.is_factor(n) else x.astype(ml_dtypes.bfloat16) for n, x in flat.items()}
    exact = {n: x.astype(np.float32) for n, x in half.items()}
    got = flatten_tree(adapter.merge(unflatten_tree(half), made.specs))
    want = flatten_tree(adapter.merge(unflatten_tree(exact), made.specs))
    for n, x in got.items():
        assert x.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(x, want[n].astype(ml_dtypes.bfloat16), err_msg=n)


def test_lazy_weights_are_merged_when_read():
    made = adapters.random_adapter("mqa", adapters.MIXED)
    _, params = applied("mqa", made)
    read = []

    def lazy(name, x):
        return Lazy(x.shape, x.dtype, lambda: read.append(name) or x)

    flat = flatten_tree(params)
    merged = adapter.merge(unflatten_tree({n: lazy(n, x) for n, x in flat.items()}), made.specs)
    merged = flatten_tree(merged)
    want = flatten_tree(adapter.merge(params, made.specs))
    assert not read
    before = {n: x.copy() for n, x in flat.items()}
    for n, x in merged.items():
        assert isinstance(x, Lazy) and (x.shape, x.dtype) == (want[n].shape, want[n].dtype)
        np.testing.assert_array_equal(np.asarray(x), want[n])
    head = {"img/head/kernel", "img/head/lora_a", "img/head/lora_b"}
    read.clear()
    np.asarray(merged["img/head/kernel"])
    assert set(read) == head
    for n, x in flat.items():  # nothing was merged in place
        np.testing.assert_array_equal(x, before[n])


def test_alpha_and_each_factor_count():
    name = "mqa"
    made = adapters.random_adapter(name)
    model, params = applied(name, made)
    want = logits_of(name, model, params)
    twice = {t: lora.Spec(s.rank, 2 * s.alpha) for t, s in made.specs.items()}
    other, _ = applied(name, adapter.Adapter(twice, made.factors))
    assert abs(logits_of(name, other, params) - want).max() > 1e-2
    flat = flatten_tree(params)
    for factor in lora_targets.factor_names(made.specs):
        changed = unflatten_tree({**flat, factor: flat[factor] * 1.5})
        assert abs(logits_of(name, model, changed) - want).max() > 1e-4, factor


# ---- What doesn't fit


def test_everything_that_does_not_fit_is_listed():
    made = adapters.random_adapter("mqa", adapters.MIXED)
    flat = dict(flatten_tree(hf.reference("mqa")[3]))
    del flat["img/head/kernel"]
    flat["llm/layers/mlp/linear"] = flat["llm/layers/mlp/linear"][:-1]  # a layer less
    with pytest.raises(npz.CheckpointError) as e:
        adapter.insert_adapter(unflatten_tree(flat), made)
    assert len(str(e.value).splitlines()) == 3
    assert "img/head/kernel: the parameters have no" in str(e.value)
    assert "llm/layers/mlp/linear:down: expected" in str(e.value)


def test_adapter_of_another_model():
    with pytest.raises(npz.CheckpointError, match="doesn't fit the parameters"):
        applied("gqa", adapters.random_adapter("mqa"))


def test_adapters_on_adapters():
    _, params = applied("mqa", adapters.random_adapter("mqa"))
    with pytest.raises(npz.CheckpointError, match="have adapters already"):
        applied("mqa", adapters.random_adapter("mqa"), params)


def test_specs_without_factors():
    made = adapters.random_adapter("mqa", adapters.MIXED)
    factors = dict(made.factors)
    factors.popitem()
    with pytest.raises(npz.CheckpointError, match="a spec or factors, but not both"):
        applied("mqa", adapter.Adapter(made.specs, factors))


@pytest.mark.parametrize("function", ["extract", "merge"])
def test_factors_that_the_rules_do_not_want(function):
    made = adapters.random_adapter("mqa", adapters.MIXED)
    _, params = applied("mqa", made)
    specs = dict(made.specs)
    first = next(iter(specs))
    spec = specs.pop(first)

    def use(specs, params):
        if function == "merge":
            return adapter.merge(params, specs)
        return adapter.extract_adapter(adapter.rules_of(adapter.Adapter(specs, {})), params)

    with pytest.raises(npz.CheckpointError, match=f"{first.scope}/lora_a: unexpected"):
        use(specs, params)
    with pytest.raises(npz.CheckpointError, match=f"{first.scope}/lora_a: expected"):
        use({**specs, first: lora.Spec(spec.rank + 1)}, params)
    flat = flatten_tree(params)
    del flat[f"{first.scope}/lora_b"]
    with pytest.raises(npz.CheckpointError, match=f"{first.scope}/lora_b: missing"):
        use(made.specs, unflatten_tree(flat))


def test_rules_that_match_nothing():
    with pytest.raises(npz.CheckpointError, match="matches nothing"):
        adapter.extract_adapter([("nothing", dict(rank=1))], hf.reference("mqa")[3])
