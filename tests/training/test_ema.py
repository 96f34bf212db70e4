"""The average of the trained weights (config.ema_decay): its numbers, in checkpoints, in evaluations, as weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import checkpoints, evaluate, train
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.config import values as config_values
from paligemma_med.evaluators import vqa
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.parallel import sharding
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import ema
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step
from tests import tiny

HEAD = dict(schedule=[("img/head/.*", dict(decay_type="constant")), (".*", None)])
LORA = dict(
    lora=[("llm/.*/attn/q_einsum/w", dict(rank=2, alpha=4.0))],
    schedule=[(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)],
)


def by_hand(values, decay):
    """The average of float64 `values`, of which the first is the start, by the formula that the docs give."""
    average = np.asarray(values[0], np.float64)
    for n, x in enumerate(values[1:]):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * np.asarray(x, np.float64)
    return average


def first_state(c, parts=1):
    mesh = sharding.make_mesh([("data", parts)], devices=jax.devices()[:parts])
    setup = TrainingSetup.without_data(c, mesh=mesh)
    return setup, states.initial(setup)


def test_average_of_what_is_trained():
    """With LoRA the factors alone; cut over devices as they are; once a step of two parts; not if it is skipped."""
    c = tiny.config(ema_decay=0.2, lr=0.05, grad_accum_steps=2, **LORA)
    c.sharding_strategy = [(".*", 'fsdp(axis="data", min_size_to_shard_mb=0)')]
    setup, state = first_state(c, parts=8)
    trained, opt_state = state.trained, state.opt_state
    step = train_step.jitted(setup, trained)
    seen = [jax.device_get(trained)]
    tiny.assert_trees_equal(ema.averages(opt_state), trained)
    for i in range(5):
        batch = jax.device_put(tiny.batch(16, seed=i), setup.batch_sharding)
        trained, opt_state, _ = step(trained, opt_state, state.frozen, batch, i)
        seen.append(jax.device_get(trained))
    found = ema.averages(opt_state)
    assert found.keys() == trained.keys() and all("/lora_" in n for n in found)
    for n, x in found.items():
        values = [leaves[n] for leaves in seen]
        np.testing.assert_allclose(np.asarray(x), by_hand(values, 0.2), rtol=0, atol=1e-6 * np.abs(values).max())
        assert x.sharding == trained[n].sharding and x.dtype == jnp.float32
    assert any(np.abs(np.asarray(found[n]) - seen[-1][n]).max() > 1e-3 for n in found)
    found = jax.device_get(found)
    bad = tiny.batch(16)
    bad["image"] *= np.nan
    _, opt_state, metrics = step(trained, opt_state, state.frozen, jax.device_put(bad, setup.batch_sharding), 5)
    assert not metrics["finite"] and int(opt_state[-1].count) == 5
    tiny.assert_trees_equal(ema.averages(opt_state), found)
    assert step._cache_size() == 1


def test_decay_rises_to_what_is_asked_for():
    rising = np.asarray(ema.decay_at(np.arange(20_000), 0.999))
    assert rising[0] == pytest.approx(0.1) and np.all(np.diff(rising) >= 0)
    assert rising[-1] == pytest.approx(0.999) and rising[90] == pytest.approx(0.91)


def test_without_it_nothing_is_kept():
    state = first_state(tiny.config(ema_decay=0.0, **HEAD))[1]
    assert ema.averages(state.opt_state) is None
    plain = first_state(tiny.config(**HEAD))[1]
    assert jax.tree.structure(state.opt_state) == jax.tree.structure(plain.opt_state)
    tiny.assert_trees_equal(state.averaged_params, plain.params)


# --- Runs, whose evaluators tell what they were given ---


class Evaluated:
    """Stands in for the evaluator's answers, which would take longest: a figure that tells weights apart."""

    def __init__(self, patch, stops=False):
        self.given, self.stops = [], stops
        patch.setattr(vqa.Evaluator, "run", lambda evaluator, params: self.run(evaluator, params))

    def run(self, evaluator, params):
        if self.stops:
            raise KeyboardInterrupt
        leaves = jax.device_get(flatten_tree(params))
        self.given.append((evaluator.outdir.name, leaves))
        return {"digest": sum(float(np.abs(x).sum(dtype=np.float64)) for x in leaves.values())}


def averaging(data, **kw):
    c = tiny.config(data, **dict(ema_decay=0.5, lr=0.02, ckpt_steps=1, keep_ckpt=6) | HEAD | kw)
    if c.evals:
        c.evals.as_trained = {**c.evals.val.to_dict(), "ema": False}
    return c


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """(workdir, config, results, [(name, what that evaluator was given)])"""
    workdir, c = str(tmp_path_factory.mktemp("ema") / "w"), averaging(tiny_data)
    with pytest.MonkeyPatch.context() as patch:
        evaluated = Evaluated(patch)
        results = train.train(c, workdir)
    return workdir, c, results, evaluated.given


def saved(workdir, c, step):
    """What the run had at `step`: (trained leaves, their average)."""
    expected = states.abstract(TrainingSetup(c))
    with workdirs.Checkpoints(workdir, keep=6) as ckpt:
        trained, opt_state, _ = ckpt.restore(step, expected.trained, expected.opt_state)
    return jax.device_get(trained), jax.device_get(ema.averages(opt_state))


def test_the_weights_of_a_run_are_its_average(finished):
    workdir, c, _, _ = finished
    first = jax.device_get(states.initial(TrainingSetup(c)).trained)
    steps = [first, *(saved(workdir, c, step)[0] for step in range(1, 7))]
    for spec, last in ((workdir, 6), (f"{workdir}@3", 3)):
        found = flatten_tree(checkpoints.load_params(spec))
        assert len(found) > len(first)  # frozen leaves, too
        for n in first:
            values = [leaves[n] for leaves in steps[: last + 1]]
            np.testing.assert_allclose(found[n], by_hand(values, 0.5), rtol=0, atol=1e-6 * np.abs(values).max())
            assert np.abs(found[n] - steps[last][n]).max() > 1e-4


def test_evaluations_are_given_the_average_unless_asked_otherwise(finished, tmp_path, capsys, monkeypatch):
    workdir, c, results, given = finished
    assert [name for name, _ in given] == ["as_trained", "val"] * 2
    for (name, params), step in zip(given, (3, 3, 6, 6)):
        trained, average = saved(workdir, c, step)
        expected = average if name == "val" else trained
        tiny.assert_trees_equal({n: params[n] for n in expected}, expected)
    assert results["val"] != results["as_trained"]
    Evaluated(monkeypatch)
    monkeypatch.setattr(evaluate.tables, "format_table", str)
    of_run = config_files.from_json(workdirs.read_config(workdir))
    assert evaluate.evaluate(of_run, workdir, str(tmp_path)) == {"val": results["val"]}
    assert "config.evals.as_trained has ema=False" in capsys.readouterr().err
    with pytest.raises(ValueError, match="config.evals.as_trained has ema=False"):
        evaluate.evaluate(of_run, workdir, str(tmp_path), only=["as_trained"])


@pytest.mark.slow  # two runs more; that a resumed run has its optimizer's state is tested in test_train.py, too
def test_a_resumed_run_has_the_same_average(finished, tiny_data, tmp_path, monkeypatch):
    straight, c, results, _ = finished
    workdir = str(tmp_path / "w")
    evaluated = Evaluated(monkeypatch, stops=True)
    with pytest.raises(KeyboardInterrupt):
        train.train(c, workdir)
    assert workdirs.newest_step(workdir) == 3
    evaluated.stops = False
    assert train.train(c, workdir) == results
    tiny.assert_trees_equal(checkpoints.load_params(workdir), checkpoints.load_params(straight))
    tiny.assert_trees_equal(saved(workdir, c, 6), saved(straight, c, 6))
    with pytest.raises(checkpoints.CheckpointError, match="grad_clip_norm and ema_decay"):
        train.train(averaging(tiny_data, total_steps=8, ema_decay=0.0, evals={}), workdir)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(ema_decay=1.0), "config.ema_decay is 1.0; expected a number from 0 up to below 1"),
        (dict(ema=True), "config.evals.val.ema is True, but config.ema_decay, which makes an average, isn't set"),
    ],
)
def test_mistakes(change, message):
    c = tiny.config("no/data")
    (c.evals.val if "ema" in change else c).update(change)
    with pytest.raises(ValueError, match=message):
        config_values.checked_for_training(c)
