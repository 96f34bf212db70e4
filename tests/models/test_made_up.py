"""A tower and a decoder that nobody knows work everywhere: their tables of leaves are all it takes.

Whatever is tested here must need no line about a family outside of its own file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import experiment, quantise
from paligemma_med.config import values as config_values
from paligemma_med.models import connector, flops, lora_targets, parts, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.saliency import sanity
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import describe, dry_run, optim
from paligemma_med.training import step as train_step
from tests import tiny
from tests.models import made_up
from tests.models.test_leaves import assert_describes

MODEL = dict(made_up.NAMES, img=dict(side=16), llm=dict(num_heads=4))
ADAPTERS = [(".*", dict(rank=2, alpha=6))]
PATCHES = (tiny.RES // 16) ** 2
SIZES = dict(L=3, C=16 * 16 * 3, D=12, F=20, E=16), dict(L=2, V=1024, D=16, N=4, H=6, Z=16)
KERNELS = {
    "img/mixes/wide/kernel",
    "img/mixes/narrow/kernel",
    "img/bridge/kernel",
    "llm/lines/read/kernel",
    "llm/lines/join/kernel",
    "llm/lines/press",
}


@pytest.fixture(autouse=True)
def families(monkeypatch):
    monkeypatch.setitem(parts.FAMILIES["img"], made_up.NAMES["img_model"], made_up.Mixer)
    monkeypatch.setitem(parts.FAMILIES["llm"], made_up.NAMES["llm_model"], made_up.Scribe)


def make(adapters=(), **kw):
    c = tiny.config("/no/such/folder", model=MODEL, lora=adapters, **kw)
    return c, experiment.make_model(c)


def draw(c, model, seed=0):
    """{name: float32 array}, none of them zero."""
    rng = np.random.default_rng(seed)
    shapes = experiment.abstract_params(c, model)
    return {n: rng.normal(0, 0.3, x.shape).astype(np.float32) for n, x in shapes.items()}


def logits(model, params):
    batch = tiny.batch()
    return model.apply({"params": unflatten_tree(params)}, batch["image"], batch["text"], batch["mask_ar"])[0]


def test_a_config_names_the_families_and_gives_them_what_they_take():
    c, model = make()
    assert isinstance(model.parts["img"], made_up.Tower) and isinstance(model.parts["llm"], made_up.Decoder)
    assert model.vocab_size == 1024 and vlm.patch_grid(model, np.zeros((1, 32, 48, 3))) == (2, 3)
    assert experiment.make_tokenizer(c, model).vocab_size <= 1024
    with pytest.raises(ValueError, match=r"config.model.img has unknown keys \['mlp_dim'\].*known are .*inner"):
        config_values.checked(tiny.config("/no/such/folder", model=dict(MODEL, img=dict(mlp_dim=3))))


def test_the_tables_are_right():
    c, model = make()
    made = experiment.abstract_params(c, model)
    for part, size in zip(("img", "llm"), SIZES, strict=True):
        below = {n.removeprefix(f"{part}/"): x.shape for n, x in made.items() if n.startswith(part)}
        assert_describes(model.parts[part].leaves, below, size)
    assert {*model.leaves} == {*parts.leaves_of(c.model)} == {*made}


def test_adapters_are_made_where_the_tables_say():
    c, model = make(ADAPTERS)
    specs = lora_targets.resolve(ADAPTERS, model.leaves, model.leaves)
    assert {t.param for t in specs} == KERNELS
    shapes = experiment.abstract_params(c, model)
    expected = {}
    for target, spec in specs.items():
        pair = lora_targets.factor_shapes(target, spec, shapes[target.param].shape)
        expected |= dict(zip(lora_targets.factor_names([target]), pair, strict=True))
    assert {n: x.shape for n, x in shapes.items() if lora.is_factor(n)} == expected
    assert expected["llm/lines/read/lora_b"] == (2, 2, 4, 3, 6)
    assert expected["llm/lines/whole/lora_a"] == (2, 16, 2)


def test_training_adapters_changes_the_answer_and_nothing_else():
    c, model = make(ADAPTERS, schedule=[(".*lora_[ab]", dict(decay_type="constant")), (".*", None)])
    params = draw(c, model)
    names = optim.trained_names(c, list(params))
    assert names == [n for n in params if lora.is_factor(n)] and names
    tx, rate = optim.make(c, names, total_steps=9, num_examples=9, batch_size=8)
    trained = {n: jnp.asarray(params.pop(n)) for n in names}
    step = jax.jit(train_step.make_train_step(c, model, tx, rate))
    losses, opt_state = [], tx.init(trained)
    for i in range(5):
        trained, opt_state, metrics = step(trained, opt_state, params, tiny.batch(), i)
        losses.append(float(metrics["training_loss"]))
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


@pytest.mark.parametrize("kind, error", [("int8", 0.03), ("nf4", 0.3)])
def test_quantised_weights_give_nearly_the_same_logits(kind, error):
    c, model = make()
    params, stored, kinds = draw(c, model), {}, {}
    for name, x in params.items():
        kinds[name] = quantise.kind_of(name, x.shape, kind, model.leaves)
        codes = quantise.quantise(name, x, kinds[name], model.leaves) if kinds[name] else {name: x}
        told = jax.ShapeDtypeStruct(x.shape, "float32")
        if kinds[name]:
            told = quantise.stored(name, told, kinds[name], model.leaves)
            assert {n: (x.shape, x.dtype) for n, x in codes.items()} == {n: (x.shape, x.dtype) for n, x in told.items()}
        stored |= codes
    assert {n: k for n, k in kinds.items() if k} == {n: kind for n in KERNELS} | {"llm/words": "int8"}
    exact, near = logits(model, params), logits(model, stored)
    difference = float(jnp.std(near - exact) / jnp.std(exact))
    assert 0 < difference < error


def test_sharded_by_the_letters():
    c, model = make(ADAPTERS)
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    params = draw(c, model)
    rules = [(".*", 'tp(axis="model")|fsdp(axis="data", min_size_to_shard_mb=0)')]
    found = sharding.plan(params, rules, mesh, model.leaves)
    specs = {n: sharding.short_spec(place) for n, (place, _) in found.items()}
    assert specs["llm/words"] == "model,data"
    assert specs["llm/lines/read/kernel"] == "-,data,model,-,-"
    assert specs["llm/lines/read/lora_b"] == "-,-,model,-,-"
    assert specs["llm/lines/join/kernel"] == "-,model,-,data"
    assert specs["img/mixes/wide/kernel"] == "-,data,model"
    assert specs["img/mixes/narrow/lora_a"] == "-,model,-"
    assert specs["llm/lines/gain/gain"] == "-,data"  # never along the layers
    placed = {n: jax.device_put(x, found[n][0]) for n, x in params.items()}
    cut, whole = jax.jit(logits, static_argnums=0)(model, placed), logits(model, params)
    np.testing.assert_allclose(cut, whole, rtol=0, atol=3e-5 * float(jnp.abs(whole).max()))


def test_a_run_is_worked_out():
    """Quantised, cut both ways, with adapters: the table and the traced step of a dry run."""
    c, _ = make(
        ADAPTERS,
        schedule=[(".*lora_[ab]", dict(decay_type="constant")), (".*", None)],
        frozen_dtype="nf4",
        mesh=[("data", 4), ("model", 2)],
        sharding_strategy=[(".*", 'tp(axis="model")|fsdp(axis="data", min_size_to_shard_mb=0)')],
    )
    setup = TrainingSetup.without_data(c)
    state = dry_run.trace_step(setup).state
    assert state.frozen["llm/lines/read/kernel"].dtype == np.uint8
    assert state.frozen["llm/words"].dtype == np.int8
    assert sharding.short_spec(state.frozen["llm/words"].sharding) == "model,data"
    assert {*state.trained} == {n for n in setup.abstract if lora.is_factor(n)}
    assert "nf4" in describe.parameters(setup)


def test_flops_by_hand():
    model = make()[1]
    text, supervised = 9, 4
    tokens = PATCHES + text
    tower = 3 * 2 * 12 * 20 + 12 * 16
    pixels, table = 768 * 12, 1024 * 16
    decoder = 2 * (16 * 4 * 3 * 6 + 4 * 6 * 16 + 16 * 16)

    def count(trained):
        return flops.count(model, trained, res=tiny.RES, text_len=text, supervised_len=supervised)

    below, above = (tower + pixels) * PATCHES, decoder * tokens + table * supervised
    everything = count(model.leaves)
    assert everything.per_example_model == 6 * (below + above) - 2 * pixels * PATCHES
    assert everything.per_example_attention == 3 * 4 * 2 * 4 * 6 * tokens**2
    bridge = count(["img/bridge/kernel"])
    assert bridge.per_example_model == 2 * below + 2 * 12 * 16 * PATCHES + 4 * above
    last = count(["llm/last/gain"])
    assert last.per_example_model == 2 * (below + above) + 2 * table * supervised
    assert flops.count_pass(model, res=tiny.RES, text_len=text, logits=supervised).per_example_model == 2 * (
        below + above
    )


def test_randomised_from_the_output_down():
    c, model = make(ADAPTERS)
    params = unflatten_tree(draw(c, model))
    stages = sanity.stages(params, model.leaves)
    assert stages == [
        "llm/last",
        "llm/lines/1",
        "llm/lines/0",
        "llm/words",
        "img/bridge",
        "img/mixes/2",
        "img/mixes/1",
        "img/mixes/0",
        "img/pixels",
    ]
    flat, changed = flatten_tree(params), set()
    for _, after in sanity.cascade(params, leaves=model.leaves):
        after = flatten_tree(after)
        now = {(n, i) for n in flat for i in range(len(flat[n])) if not np.array_equal(flat[n][i], after[n][i])}
        assert now > changed
        changed = now
    assert {n for n, _ in changed} == {*flat}


def test_a_connector_stands_between_the_two(monkeypatch):
    monkeypatch.setitem(connector.KINDS, "pair", made_up.Pair)
    c = tiny.config("/no/such/folder", model=dict(MODEL, connector=dict(kind="pair")), lora=ADAPTERS)
    model = experiment.make_model(c)
    params = draw(c, model)
    assert {*model.leaves} == {n for n in params if not lora.is_factor(n)} <= {*parts.leaves_of(c.model)}
    assert params["connector/both/lora_a"].shape == (24, 2)
    stages = sanity.stages(unflatten_tree(params), model.leaves)
    assert stages[3:6] == ["llm/words", "connector/both", "img/mixes/2"]
    both, tokens = 24 * 16, PATCHES // 2 + 9
    decoder = 2 * (16 * 4 * 3 * 6 + 4 * 6 * 16 + 16 * 16)
    plain = model.clone(lora=())
    forward = flops.count_pass(plain, res=tiny.RES, text_len=9, logits=4).per_example_model
    tower = (3 * 2 * 12 * 20 + 768 * 12) * PATCHES
    assert forward == 2 * (tower + both * (PATCHES // 2) + decoder * tokens + 1024 * 16 * 4)
    trained = flops.count(plain, ["connector/both/bias"], res=tiny.RES, text_len=9, supervised_len=4)
    assert trained.per_example_model == forward + 2 * (decoder * tokens + 1024 * 16 * 4)


def test_gradients_by_the_attention():
    c, model = make()
    zeros = jnp.zeros((2, 8, 4, PATCHES + 13, PATCHES + 13))
    variables = {"params": unflatten_tree(draw(c, model)), "perturbations": vlm.perturbations(model, llm=zeros)}
    batch = tiny.batch()

    def loss(perturbed):
        out = model.apply({**variables, "perturbations": perturbed}, batch["image"], batch["text"], batch["mask_ar"])
        return jnp.sum(out[0][:, -1, 7])

    grads = jax.grad(loss)(variables["perturbations"])
    assert float(jnp.abs(grads["llm"]["lines"]["probs"]).max()) > 0
