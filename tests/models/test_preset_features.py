"""What every preset must support besides a forward pass: adapters everywhere, 8 and 4 bits, cutting over devices,
bfloat16, remat policies and chunked losses, each in a tiny shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import experiment, quantise
from paligemma_med.checkpoints.hf import families
from paligemma_med.models import lora_targets, presets, vlm
from paligemma_med.models import loss as losses
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import describe, dry_run
from paligemma_med.training import step as train_step
from tests import tiny
from tests.models.test_presets import TINY

NAMES = tuple(TINY)
CUT = [(".*", 'tp(axis="model")|fsdp(axis="data", min_size_to_shard_mb=0)')]
# Of all adapters in what is usually adapted, and the connector.
SCHEDULE = [(".*lora_[ab]|connector/.*|img/head/.*", dict(decay_type="constant")), (".*", None)]
RULES = [("(img|connector)/.*|llm/layers/.*", dict(rank=2, alpha=4))]


def quick(*names):
    """All presets, all but these with the marker `slow`."""
    return [pytest.param(n, marks=[] if n in names else [pytest.mark.slow]) for n in NAMES]


def arguments(name):
    kw = {**presets.PRESETS[name], **TINY[name]}
    if "connector" in TINY[name]:
        kw["connector"] = {**presets.PRESETS[name]["connector"], **TINY[name]["connector"]}
    return kw


def config_of(name, *, adapters=(), policy=None, scan=None, **kw):
    model = arguments(name)
    given = {k: v for k, v in dict(remat_policy=policy, scan=scan).items() if v is not None}
    model |= {part: {**model[part], **given} for part in ("img", "llm")}
    return tiny.config("/no/such/folder", model=model, lora=adapters, schedule=SCHEDULE, **kw)


@functools.cache
def draw(name, adapted=False):
    """{name: float32 array}, none of them zero."""
    c = config_of(name, adapters=RULES if adapted else ())
    rng = np.random.default_rng(0)
    shapes = experiment.abstract_params(c, experiment.make_model(c))
    return {n: rng.normal(0, 0.2, x.shape).astype(np.float32) for n, x in shapes.items()}


def batch_of(rows=4):
    batch = tiny.batch(rows=rows)
    return batch | dict(mask_ar=np.ones_like(batch["mask_ar"]), image_at=np.arange(rows, dtype=np.int32) % 3)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
    batch = batch_of()
    inputs = [batch[k] for k in ("image", "text", "mask_ar")]
    return model.apply({"params": unflatten_tree(params)}, *inputs, image_at=batch["image_at"])[0]


def spread(a, b):
    """The deviation of a difference, in parts of that of `b`."""
    return float(jnp.std(jnp.asarray(a, jnp.float32) - b) / jnp.std(b))


# --- Adapters ---


@pytest.mark.parametrize("name", quick("bloom_qformer", "medgemma_4b"))
def test_every_projection_can_be_adapted(name):
    """Of tower, connector and decoder at the true size; each factor has its projection's input or output."""
    rules = [(".*", dict(rank=1))]
    model = vlm.Model(**presets.PRESETS[name], lora=rules)
    res = {"medgemma_4b": 896, "pefomed": 448}.get(name, 224)
    shapes = {n: x.shape for n, x in flatten_tree(vlm.abstract_params(model, image_size=res)).items()}
    want = 0
    for leaf in model.leaves.values():
        if leaf.role == "product":
            size = dict(zip(leaf.axes, shapes[leaf.path], strict=True))
            ins, outs = (int(np.prod([size[c] for c in letters])) for letters in (leaf.inputs, leaf.letters))
            want += size.get("L", 1) * max(1, len(leaf.parts)) * (ins + outs // ins)
    factors = [n for n in shapes if lora.is_factor(n)]
    assert sum(int(np.prod(shapes[n])) for n in factors) == want
    specs = lora_targets.resolve(rules, model.leaves, model.leaves)
    assert {*lora_targets.factor_names(specs)} == {*factors}
    # PEFT has a module for each of the decoder's.
    family = families.language_model_of(model.leaves, presets.PRESETS[name]["llm"])
    assert all(t in families.modules_of(family) for t in specs if t.param.startswith("llm/"))


# --- 8 and 4 bits, and cut over devices ---


@pytest.mark.parametrize("name", NAMES)
def test_what_is_quantised_and_cut(name):
    """Every kernel and table; each quantised leaf has the codes and scales that are foretold, cut as it is."""
    params, table = draw(name), vlm.Model(**arguments(name)).leaves
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    plan = sharding.plan(params, CUT, mesh, table)
    for path, x in params.items():
        leaf = table[path]
        kind = quantise.kind_of(path, x.shape, "nf4", table)
        assert bool(kind) == (leaf.role in ("product", "table"))
        if kind is None:
            continue
        told = jax.ShapeDtypeStruct(x.shape, "float32", sharding=plan[path][0])
        told = quantise.stored(path, told, kind, table)
        made = quantise.quantise(path, x, kind, table)
        assert {n: (y.shape, y.dtype) for n, y in made.items()} == {n: (y.shape, y.dtype) for n, y in told.items()}
    spec = {n: sharding.short_spec(where) for n, (where, _) in plan.items()}
    head = "llm/embedder/output_embedding"
    assert spec["llm/embedder/input_embedding"] == spec.get(head, "model,data") == "model,data"
    if name == "bloom_qformer":
        assert spec["llm/layers/attn/qkv/kernel"] == "-,data,model,-,-"
        assert spec["llm/layers/mlp/down/kernel"] == "-,model,data"
        assert spec["connector/layers/block_0/cross/key/kernel"] == "-,data,model,-"


@pytest.mark.slow
@pytest.mark.parametrize("kind, error", [("int8", 0.05), ("nf4", 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_quantised_weights_give_nearly_the_same_logits(name, kind, error):
    model = vlm.Model(**arguments(name))
    params, stored = draw(name), {}
    for path, x in params.items():
        found = quantise.kind_of(path, x.shape, kind, model.leaves)
        stored |= quantise.quantise(path, x, found, model.leaves) if found else {path: x}
    assert 0 < spread(logits(model, stored), logits(model, params)) < error


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_devices_share_the_work(name):
    c = config_of(name, adapters=RULES)
    model, params = experiment.make_model(c), draw(name, adapted=True)
    plan = sharding.plan(params, CUT, sharding.make_mesh([("data", 4), ("model", 2)]), model.leaves)
    placed = {n: jax.device_put(x, plan[n][0]) for n, x in params.items()}
    cut, whole = logits(model, placed), logits(model, params)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=3e-5 * float(jnp.abs(whole).max()))


# --- Training ---


def losses_and_gradients(name, **kw):
    """(loss, {name: gradient}) of the connector and the adapters."""
    c = config_of(name, adapters=RULES, **kw)
    model, params, batch = experiment.make_model(c), draw(name, adapted=True), batch_of()
    batch["row_weight"] = losses.row_weights(batch["mask_loss"][:, 1:], "example")
    trained = {n: x for n, x in params.items() if lora.is_factor(n) or n.startswith(("connector/", "img/head/"))}
    frozen = {n: x for n, x in params.items() if n not in trained}
    loss_fn = train_step.make_loss_fn(c, model)
    found = jax.jit(jax.value_and_grad(lambda x: loss_fn(x, frozen, batch, jax.random.key(0))[0]))(trained)
    return jax.device_get(found)


@functools.cache
def plain(name):
    return losses_and_gradients(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kw",
    [dict(policy="dots_with_no_batch_dims_saveable", scan=False), dict(supervised_len=6, loss_chunk=2)],
    ids=["unrolled, dots kept", "chunked"],
)
@pytest.mark.parametrize("name", NAMES)
def test_the_loss_and_its_gradient_are_the_same(name, kw):
    """… however layers are repeated, whatever is kept, and where logits are of answers alone, a few at a time."""
    (loss, grads), (want, of_want) = losses_and_gradients(name, **kw), plain(name)
    assert loss == pytest.approx(want, rel=1e-5)
    largest = max(np.abs(x).max() for x in of_want.values())
    for path, x in of_want.items():
        if path.endswith("key/bias"):  # which softmax doesn't see: its gradient is rounding
            assert np.abs(x).max() < 1e-5 * largest
            continue
        np.testing.assert_allclose(grads[path], x, rtol=0, atol=1e-4 * np.abs(x).max(), err_msg=path)
        assert np.abs(x).max() > 0, path


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_near(name):
    model, params = vlm.Model(**arguments(name)), draw(name)
    half = {n: jnp.asarray(x, jnp.bfloat16) for n, x in params.items()}
    found = logits(vlm.Model(**arguments(name), dtype="bfloat16"), half)
    assert found.dtype == jnp.float32
    assert 0 < spread(found, logits(model, params)) < 0.1


@pytest.mark.parametrize("name", quick("bloom_qformer"))
def test_a_run_is_worked_out(name):
    """In 4 bits, cut both ways, with adapters in tower and decoder: the table and the traced step of a dry run."""
    c = config_of(
        name,
        adapters=[("img/Transformer/.*|llm/layers/.*", dict(rank=2))],
        policy="nothing_saveable",
        dtype="bfloat16",
        frozen_dtype="nf4",
        mesh=[("data", 4), ("model", 2)],
        sharding_strategy=CUT,
        supervised_len=8,
    )
    setup = TrainingSetup.without_data(c)
    state = dry_run.trace_step(setup).state
    kernel = "llm/layers/attn/" + ("qkv/kernel" if name == "bloom_qformer" else "attn_vec_einsum/w")
    assert state.frozen[kernel].dtype == np.uint8
    tables = [n for n, leaf in setup.model.leaves.items() if leaf.role == "table"]
    assert all(state.frozen[n].dtype == np.int8 for n in tables)
    assert all(x.dtype == np.float32 for x in state.trained.values())
    between = [n for n in setup.abstract if n.startswith(("connector/", "img/head/"))]
    assert between and {*state.trained} == {*between} | {n for n in setup.abstract if lora.is_factor(n)}
    assert "nf4" in describe.parameters(setup)
    assert setup.flops_per_example.per_example_model > 0
