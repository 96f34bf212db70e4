"""The optimizer against its formulas and PyTorch, and what each mistake in a config says."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from paligemma_med.training import optim
from tests.rounding import assert_close

NAMES = ["img/head/kernel", "img/head/bias", "llm/layers/attn/q_einsum/w", "llm/final_norm/scale"]
KW = dict(total_steps=100, num_examples=1000, batch_size=10)


def params(seed=0):
    rng = np.random.default_rng(seed)
    return {n: jnp.asarray(rng.normal(size=(3, 2)), jnp.float32) for n in NAMES}


def config(**kw):
    c = dict(optax_name="scale_by_adam", optax={}, lr=0.1, schedule=dict(decay_type="constant"))
    return ml_collections.ConfigDict({**c, **kw})


def run(c, grads, p=None, **kw):
    """Parameters after one step for each of `grads`."""
    p = params() if p is None else p
    tx, _ = optim.make(c, list(p), **{**KW, **kw})
    state = tx.init(p)
    for g in grads:
        updates, state = tx.update(g, state, p)
        p = {n: p[n] + updates[n] for n in p}
    return p


def gradients(steps, seed=1):
    return [params(seed + i) for i in range(steps)]


# --- Rules ---


def test_first_full_match_wins():
    rules = [("img/head/kernel", 1), ("img/.*", 2), ("llm/layers/attn/q_einsum/w", None)]
    found = optim.match_names(NAMES, rules, "x")
    assert found == {NAMES[0]: (0, 1), NAMES[1]: (1, 2), NAMES[2]: (2, None)}
    with pytest.raises(ValueError, match="x: 'head' matches no parameter"):  # not a search
        optim.match_names(NAMES, [("head", 1)], "x")


@pytest.mark.parametrize(
    "rules, message",
    [
        ([("img/haed/.*", 1)], "'img/haed/.*' matches no parameter; names look like img/head/bias"),
        ([("img/(", 1)], r"'img/\(' is not a regular expression"),
    ],
)
def test_rules_that_cannot_be_meant(rules, message):
    with pytest.raises(ValueError, match="config.lr_mults: " + message):
        optim.match_names(NAMES, rules, "config.lr_mults")


def test_idle_catch_all_is_allowed():
    optim.match_names(NAMES, [("img/.*", 1), ("llm/.*", 2), (".*", 3)], "x")


def test_none_freezes():
    constant = dict(decay_type="constant")
    c = config(schedule=[("img/head/.*", constant), (".*", None)])
    assert optim.trained_names(c, NAMES) == NAMES[:2]
    c = config(schedule=[("img/head/bias", None), (".*", constant)])
    assert optim.trained_names(c, NAMES) == [NAMES[0], *NAMES[2:]]
    assert optim.trained_names(config(), NAMES) == NAMES


def test_uncovered_leaf_is_an_error_that_names_it():
    c = config(schedule=[("img/.*", dict(decay_type="constant"))])
    with pytest.raises(ValueError, match="nothing about 2 parameters.*llm/layers/attn/q_einsum/w"):
        optim.trained_names(c, NAMES)


def test_nothing_trained_is_an_error():
    with pytest.raises(ValueError, match="freezes every parameter"):
        optim.trained_names(config(schedule=[(".*", None)]), NAMES)


# --- Schedules ---


def factors(schedule, steps, **kw):
    f = optim.make_schedule(schedule, **{**KW, **kw})
    values = [f(jnp.int32(s)) for s in steps]
    assert all(v.dtype == jnp.float32 and v.shape == () for v in values)
    return np.array(values)


STEPS = np.array([0, 1, 5, 10, 37, 99, 100, 150])


@pytest.mark.parametrize("warmup", [0, 10])
@pytest.mark.parametrize("kind", ["constant", "cosine", "linear"])
def test_schedules_are_their_formulas(kind, warmup):
    done = np.clip((STEPS - warmup) / (100 - warmup), 0, 1)
    expected = {
        "constant": np.ones(len(STEPS)),
        "cosine": np.cos(done * np.pi / 2) ** 2,
        "linear": 1 - 0.8 * done,
    }[kind]
    expected = expected * (np.minimum(STEPS / warmup, 1) if warmup else 1)
    schedule = dict(decay_type=kind, warmup_steps=warmup)
    if kind == "linear":
        schedule["linear_end"] = 0.2
    np.testing.assert_allclose(factors(schedule, STEPS), expected, rtol=1e-5, atol=1e-6)


def test_a_cosine_in_steps_of_an_epoch_is_lavis():
    """5 epochs of 20 steps from 1e-5 to 1e-6, after a warmup of 20 steps from 1e-6: the numbers by its formulas."""
    epochs = np.arange(100) // 20
    rates = (1e-5 - 1e-6) * 0.5 * (1 + np.cos(np.pi * epochs / 5)) + 1e-6
    rates[:20] = 1e-6 + (1e-5 - 1e-6) * np.arange(20) / 20
    schedule = dict(decay_type="cosine", cosine_end=0.1, warmup_steps=20, warmup_start=0.1, hold_percent=0.2)
    np.testing.assert_allclose(factors(schedule, np.arange(100)) * 1e-5, rates, rtol=1e-5)
    assert_close(factors(dict(decay_type="cosine", cosine_end=0.1), [0, 50, 100]), [1, 0.55, 0.1])


@pytest.mark.parametrize(
    "warmup", [dict(warmup_steps=10), dict(warmup_percent=0.1), dict(warmup_epochs=0.1), dict(warmup_examples=100)]
)
def test_warmup_in_every_unit(warmup):
    assert_close(factors(dict(decay_type="constant", **warmup), [5, 10]), [0.5, 1])


@pytest.mark.parametrize(
    "schedule, message",
    [
        (dict(decay_type="cosin"), "decay_type is 'cosin'"),
        (dict(decay_type="cosine", warm_up=3), "unknown keys.*warm_up"),
        (dict(decay_type="cosine", warmup_step=3), "unknown keys.*warmup_step"),
        (dict(decay_type="cosine", warmup_steps=100), "warmup of 100 steps in 100"),
        (dict(decay_type="cosine", cosine_end=2.0), "cosine_end is 2.0; expected a share"),
    ],
)
def test_schedule_errors(schedule, message):
    with pytest.raises(ValueError, match=message):
        optim.make(config(schedule=schedule), NAMES, **KW)


def test_logged_learning_rate_is_the_one_used():
    c = config(optax_name="identity", lr=0.5, schedule=dict(decay_type="cosine", warmup_steps=2))
    tx, rate = optim.make(c, NAMES, **KW)
    p = params()
    state = tx.init(p)
    for step in range(4):
        updates, state = tx.update(p, state, p)
        np.testing.assert_allclose(updates[NAMES[0]], -rate(step) * p[NAMES[0]], rtol=1e-6)
    assert rate(3) > 0.4


def test_groups_have_their_own_schedules():
    c = config(
        optax_name="identity",
        lr=1.0,
        schedule=[("img/.*", dict(decay_type="constant", warmup_steps=4)), (".*", dict(decay_type="linear"))],
    )
    before, g = params(), gradients(1)[0]
    after = run(c, [g, g], before)
    expected = {n: before[n] - (0.25 if n.startswith("img") else 1.99) * g[n] for n in NAMES}
    for n in NAMES:
        np.testing.assert_allclose(after[n], expected[n], rtol=1e-5, atol=1e-6)


# --- Updates ---


def test_learning_rate_multipliers():
    c = config(optax_name="identity", lr=0.5, lr_mults=[("llm/.*", 0.1), (".*", 2.0)])
    before, g = params(), gradients(1)[0]
    after = run(c, [g], before)
    for n in NAMES:
        mult = 0.1 if n.startswith("llm") else 2.0
        np.testing.assert_allclose(after[n], before[n] - 0.5 * mult * g[n], rtol=1e-6)


def test_weight_decay_is_decoupled_from_the_learning_rate():
    c = config(
        lr=0.5,
        wd=0.03,
        wd_mults=[(".*kernel", 1.0), (".*/w", 0.5)],
        lr_mults=[(".*", 0)],
        schedule=dict(decay_type="linear"),
    )
    before = params()
    after = run(c, gradients(2), before)
    for n in NAMES:
        wd = 0.03 * (1.0 if n.endswith("kernel") else 0.5 if n.endswith("/w") else 0.0)
        np.testing.assert_allclose(after[n], before[n] * (1 - wd) * (1 - 0.99 * wd), rtol=1e-6)


def test_weight_decay_of_kernels_alone_by_default():
    after, before = run(config(lr=0.0, wd=0.5), gradients(1)), params()
    for n in NAMES:
        factor = 0.5 if n.endswith("/kernel") else 1.0
        np.testing.assert_allclose(after[n], factor * before[n], rtol=1e-6)


def test_weight_decay_of_a_kernel_is_that_of_its_adapter():
    """Without wd_mults, which no stage-2 config has: --config.wd=… alone was an error once."""
    names = ["img/head/lora_a", "llm/layers/attn/q_einsum/lora_b", "img/head/bias"]
    before = {n: np.ones(3, np.float32) for n in names}
    tx, _ = optim.make(config(lr=0.0, wd=0.5), names, all_names=[*NAMES, *names], **KW)
    updates, _ = tx.update(before, tx.init(before), before)
    for n in names:
        np.testing.assert_allclose(updates[n], -0.5 if "lora" in n else 0.0, err_msg=n)


def test_weight_decay_of_nothing_is_told(caplog):
    optim.make(config(wd=0.5), ["img/head/bias"], all_names=NAMES, **KW)
    assert "config.wd = 0.5 decays none of the trained parameters: config.wd_mults says which" in caplog.text
    with pytest.raises(ValueError, match="config.wd_mults: 'img/haed/.*' matches no parameter"):
        optim.make(config(wd_mults=[("img/haed/.*", 1.0)]), NAMES, **KW)  # also where wd is 0


@pytest.mark.parametrize("key", ["lr_mults", "wd_mults"])
def test_multipliers_may_name_frozen_leaves(key):
    """A config that trains less than another keeps the other's multipliers."""
    c = config(wd=0.1, **{key: [("llm/.*", 0.1), (".*", 2.0)]})
    head = [n for n in NAMES if n.startswith("img/")]
    optim.make(c, head, all_names=NAMES, **KW)
    with pytest.raises(ValueError, match=f"config.{key}: 'llm/.*' matches no parameter"):
        optim.make(c, head, **KW)  # where there is no such leaf at all


def test_a_rule_that_trains_must_not_come_too_late():
    c = config(schedule=[("img/.*", None), ("img/head/.*", dict(decay_type="constant")), (".*", None)])
    message = "'img/head/.*' comes too late, since 'img/.*' before it decides about 'img/head/"
    with pytest.raises(ValueError, match=message):
        optim.trained_names(c, NAMES)


def test_clipping_is_of_the_norm_over_all_leaves():
    g = gradients(1)[0]
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in g.values()))
    assert_close(optim.global_norm(g), norm)
    for clip, scale in ((norm / 4, 0.25), (2 * norm, 1.0)):
        c = config(optax_name="identity", lr=1.0, grad_clip_norm=float(clip))
        after, before = run(c, [g]), params()
        for n in NAMES:
            np.testing.assert_allclose(after[n], before[n] - scale * g[n], rtol=1e-5, atol=1e-6)


def test_global_norm_is_float32():
    big = {"a": jnp.full(1000, 0.1, jnp.bfloat16)}
    found = optim.global_norm(big)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.sqrt(1000) * float(jnp.bfloat16(0.1)), rtol=1e-5)


@pytest.mark.parametrize("name", ["adam_w", "_src", "__name__", "GradientTransformation.x"])
def test_unknown_optax_name(name):
    with pytest.raises(ValueError, match="optax_name is"):
        optim.make(config(optax_name=name), NAMES, **KW)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(optax=dict(beta2=0.9)), "'scale_by_adam' doesn't take config.optax .*beta2"),
        (dict(optax_name="adam"), "'adam' doesn't take config.optax .*learning_rate"),
    ],
)
def test_optax_arguments_that_do_not_fit(kw, message):
    with pytest.raises(ValueError, match=message):
        optim.make(config(**kw), NAMES, **KW)


def test_five_steps_of_pytorchs_adamw():
    import torch

    lr, wd, betas, eps = 3e-2, 0.1, (0.8, 0.95), 1e-6
    before, grads = params(), gradients(5)
    c = config(lr=lr, wd=lr * wd, wd_mults=[(".*", 1.0)], optax=dict(b1=betas[0], b2=betas[1], eps=eps))
    after = run(c, grads, before)

    theirs = {n: torch.nn.Parameter(torch.tensor(np.array(before[n]))) for n in NAMES}
    optimizer = torch.optim.AdamW(theirs.values(), lr=lr, weight_decay=wd, betas=betas, eps=eps)
    for g in grads:
        for n, p in theirs.items():
            p.grad = torch.tensor(np.array(g[n]))
        optimizer.step()
    for n in NAMES:
        assert_close(after[n], theirs[n].detach().numpy())
        assert np.abs(np.asarray(after[n]) - before[n]).max() > 0.05


def test_moments_exist_for_given_parameters_alone():
    tx, _ = optim.make(config(wd=0.1, grad_clip_norm=1.0), NAMES[:1], **KW)
    state = tx.init({NAMES[0]: jnp.zeros((3, 2))})
    shapes = [x.shape for x in jax.tree.leaves(state)]
    assert sorted(s for s in shapes if s) == [(3, 2), (3, 2)]
