"""The train step: what it changes, and by how much; on several devices, in microbatches, with dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import experiment, weights
from paligemma_med.models import loss as losses
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import optim
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step
from tests import tiny

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]


@functools.cache
def start():
    """The parameters that `steps` starts from, {name: numpy array}."""
    c = tiny.config()
    mesh = sharding.make_mesh([("data", 1)], devices=jax.devices()[:1])
    return jax.device_get(weights.initial_params(TrainingSetup.without_data(c, mesh=mesh))[0])


def steps(c, batches, *, parts=1, rng_step=0):
    """Takes a step for each batch on `parts` devices.

    Returns:
      (trained, frozen, opt_state, metrics of each step, the jitted step).
    """
    mesh = sharding.make_mesh([("data", parts)], devices=jax.devices()[:parts])
    setup = TrainingSetup.without_data(c, mesh=mesh)
    setup.num_examples, setup.total_steps = 100, 10
    state = states.of_params(setup, weights.place_params(dict(start()), setup))
    trained, opt_state, params = state.trained, state.opt_state, state.frozen
    step_fn = train_step.jitted(setup, trained)
    found = []
    for i, batch in enumerate(batches, rng_step):
        batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        trained, opt_state, metrics = step_fn(trained, opt_state, params, batch, i)
        found.append({k: float(v) for k, v in metrics.items()})
    return trained, params, opt_state, found, step_fn


def assert_close(a, b, atol):
    assert a.keys() == b.keys()
    for n in a:
        np.testing.assert_allclose(np.asarray(a[n]), np.asarray(b[n]), atol=atol, rtol=0, err_msg=n)


def sgd(**kw):
    """Plain gradient descent: Adam would hide a wrong scale and blow up rounding."""
    kw = dict(schedule=dict(decay_type="constant")) | kw
    return tiny.config(optax_name="identity", lr=0.1, **kw)


@functools.cache
def one_sgd_step(norm):
    return steps(sgd(loss_norm=norm), [tiny.batch()])


def test_only_trained_leaves_change_and_have_state():
    c = tiny.config(schedule=HEAD, frozen_dtype="bfloat16", grad_clip_norm=1.0)
    before = start()
    trained, frozen, opt_state, metrics, _ = steps(c, [tiny.batch()] * 2)
    assert set(trained) == {"img/head/kernel", "img/head/bias"}
    assert all(x.dtype == jnp.float32 for x in trained.values())
    assert frozen and all(x.dtype == jnp.bfloat16 for x in frozen.values())
    for n in frozen:
        np.testing.assert_array_equal(np.asarray(frozen[n]), before[n].astype(jnp.bfloat16))
    for n in trained:
        assert np.abs(np.asarray(trained[n]) - before[n]).max() > 1e-4
    # Adam's two moments a trained leaf; the rest are counters.
    shapes = sorted(x.shape for x in jax.tree.leaves(opt_state) if x.ndim)
    assert shapes == sorted(2 * [x.shape for x in trained.values()])
    assert metrics[0]["lr"] == pytest.approx(1e-3)


def test_trained_leaves_learn_what_they_would_if_all_were_trained():
    """Freezing changes nothing about the leaves that remain."""
    head, *_ = steps(sgd(schedule=HEAD), [tiny.batch()])
    everything = one_sgd_step("example")[0]
    assert_close(head, {n: everything[n] for n in head}, 1e-6)


def test_loss_and_gradients_are_those_of_the_formula():
    """All positions, one-hot, no gathering: the plain way to write it."""
    batch, before = tiny.batch(), start()
    model = experiment.make_model(tiny.config())

    @jax.jit
    @jax.value_and_grad
    def loss(flat, is_example):
        logits, _ = model.apply(
            {"params": unflatten_tree(flat)},
            batch["image"],
            batch["text"][:, :-1],
            batch["mask_ar"][:, :-1],
        )
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.sum(jax.nn.one_hot(batch["text"][:, 1:], logits.shape[-1]) * logp, -1)
        mask = batch["mask_loss"][:, 1:]
        by_example = jnp.mean(jnp.sum(nll * mask, 1) / mask.sum(1))
        return jnp.where(is_example, by_example, jnp.sum(nll * mask) / mask.sum())

    for norm in losses.NORMS:
        value, grads = loss(before, norm == "example")
        trained, _, _, metrics, _ = one_sgd_step(norm)
        assert metrics[0]["training_loss"] == pytest.approx(float(value), rel=1e-6)
        assert metrics[0]["l2_grads"] == pytest.approx(float(optim.global_norm(grads)), rel=1e-5)
        assert_close(trained, {n: before[n] - 0.1 * grads[n] for n in before}, 1e-6)


@pytest.mark.parametrize("norm, accum", [("example", 2), ("example", 4), ("token", 8)])
def test_accumulation_adds_up_to_the_whole_batch(norm, accum):
    whole, _, _, metrics, _ = one_sgd_step(norm)
    c = sgd(loss_norm=norm, grad_accum_steps=accum, supervised_len=3 if accum == 2 else 5)
    parts, _, _, found, _ = steps(c, [tiny.batch()])
    if accum == 2:  # rows of 1 to 5 tokens, then of 1 to 3: what is lost is counted in all parts
        assert found[0]["lost"] == 1 + 2
        return
    assert found[0]["lost"] == 0
    assert_close(whole, parts, 1e-6)
    for k in ("training_loss", "l2_grads", "l2_updates"):
        assert found[0][k] == pytest.approx(metrics[0][k], rel=1e-5)


def test_the_norms_differ_where_answers_differ_in_length():
    a, b = (one_sgd_step(n)[3][0]["l2_grads"] for n in losses.NORMS)
    assert abs(a - b) > 1e-3 * a


@pytest.mark.parametrize(
    "kw",
    [
        pytest.param(dict(supervised_len=5), marks=pytest.mark.slow),
        dict(supervised_len=5, loss_chunk=2),
    ],
)
def test_logits_at_supervised_positions_alone_give_the_same_step(kw):
    whole = one_sgd_step("example")
    some, _, _, metrics, _ = steps(sgd(**kw), [tiny.batch()])
    assert_close(whole[0], some, 1e-6)
    assert metrics[0]["lost"] == 0


def test_eight_devices_equal_one_and_compile_once():
    schedule = dict(decay_type="cosine", warmup_steps=1)
    c = tiny.config(schedule=schedule, grad_accum_steps=2, loss_chunk=5)
    c.sharding_strategy = [(".*", 'fsdp(axis="data", min_size_to_shard_mb=0)')]
    # Keys' biases have no gradient but rounding, which Adam with a small eps takes for a signal.
    c.optax = dict(eps=1e-4)
    batches = [tiny.batch(16, seed=s) for s in range(5)]
    one, _, _, metrics_one, _ = steps(c, batches)
    eight, _, opt_state, metrics_eight, step_fn = steps(c, batches, parts=8)
    assert_close(one, eight, 1e-5)
    for a, b in zip(metrics_one, metrics_eight):
        assert a["training_loss"] == pytest.approx(b["training_loss"], abs=1e-5)
    embedding = eight["llm/embedder/input_embedding"]
    assert embedding.addressable_shards[0].data.size == embedding.size // 8
    moments = [x for x in jax.tree.leaves(opt_state) if x.shape == embedding.shape]
    assert len(moments) == 2 and all(m.sharding == embedding.sharding for m in moments)
    assert step_fn._cache_size() == 1


def test_the_loss_falls_on_what_can_be_memorised():
    c = tiny.config(lr=5e-3, schedule=dict(decay_type="constant"))
    *_, metrics, _ = steps(c, [tiny.batch()] * 30)
    assert metrics[-1]["training_loss"] < 0.3 * metrics[0]["training_loss"]


def test_dropout_is_seeded_by_the_step():
    model = {k: dict(v, dropout=0.3) for k, v in tiny.MODEL.items()}
    c = tiny.config(model=model, schedule=dict(decay_type="constant"), lr=0.0)
    *_, first, _ = steps(c, [tiny.batch()] * 3)
    *_, later, _ = steps(c, [tiny.batch()] * 2, rng_step=1)
    a, b, d = (m["training_loss"] for m in first)
    assert len({a, b, d}) == 3  # lr is 0: nothing but dropout can tell the steps apart
    assert [m["training_loss"] for m in later] == [b, d]


def test_accumulation_holds_no_second_copy_of_the_frozen_weights(optimised):
    """Compiled: as much scratch memory as one microbatch needs, and the sums of gradients."""
    llm = dict(variant="gemma_mu", depth=4, width=128, mlp_dim=2048)
    model = dict(img=dict(variant="mu/16"), llm=llm)  # layers stacked, as at the true size

    def scratch(rows, accum):
        c = tiny.config(model=model, schedule=HEAD, grad_accum_steps=accum, mesh=[("data", -1)])
        model_ = experiment.make_model(c)
        abstract = experiment.abstract_params(c, model_)
        names = optim.trained_names(c, list(abstract))
        frozen = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in abstract.items()}
        trained = {n: frozen.pop(n) for n in names}
        tx, rate = optim.make(c, names, total_steps=10, num_examples=80, batch_size=rows)
        step = jax.jit(train_step.make_train_step(c, model_, tx, rate), donate_argnums=(0, 1))
        args = trained, jax.eval_shape(tx.init, trained), frozen, tiny.batch(rows), 0
        size = sum(x.size * 4 for x in frozen.values())
        return step.lower(*args).compile().memory_analysis().temp_size_in_bytes, size

    one, size = scratch(4, 1)
    four, _ = scratch(16, 4)
    assert size > 10 * 2**20
    assert four - one < 0.1 * size
