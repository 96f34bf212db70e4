"""Which checkpoints of a run stay: the newest, and the best by a metric, one that wasn't finite included."""

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import keep, workdir
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.training import run_files
from tests import tiny

METRIC = "val/acc"


def weights(step):
    return {"img/head/kernel": np.full((4, 3), step, np.float32)}


def run(folder, values, *, newest=1, **keep_best):
    """A run in `folder` whose evaluator gives one of `values` after each of its steps, saved before."""
    os.makedirs(folder, exist_ok=True)
    config = {"keep_best": {"metric": METRIC, **keep_best}}
    (folder / "config.json").write_text(json.dumps(config))
    with workdir.Checkpoints(folder, keep=newest, best=keep.best_of(folder, config)) as ckpt:
        for step, value in enumerate(values, 1):
            ckpt.save(step, {n: jnp.asarray(x) for n, x in weights(step).items()}, {})
            ckpt.wait()
            run_files.add_metrics(folder, step, {METRIC: value, "training_loss": 1.0})
    return sorted(os.listdir(folder / "checkpoints"))


def assert_best(folder, step):
    tiny.assert_trees_equal(checkpoints.load_params(f"{folder}@best"), unflatten_tree(weights(step)))
    assert workdir.pin(f"{folder}@best") == f"{folder}@{step}"


def test_the_best_one_is_kept_beside_the_newest(tmp_path):
    assert run(tmp_path, [0.2, 0.7, 0.5, 0.7, 0.6]) == ["2", "5"]
    assert_best(tmp_path, 2)
    assert keep.best_of(tmp_path, {"keep_best": {"metric": METRIC, "mode": "min"}})([2, 5]) == 5
    with pytest.raises(ValueError, match="is 'val/typo', but the evaluators give \\['val/acc'\\]"):
        keep.best_of(tmp_path, {"keep_best": {"metric": "val/typo"}})([2, 5])


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode, kept, best", [("max", ["3", "5"], 3), ("min", ["1", "5"], 1)])
def test_a_metric_that_is_not_finite_once_is_never_the_best(tmp_path, odd, mode, kept, best):
    assert run(tmp_path, [0.2, odd, 0.7, odd, 0.6], mode=mode) == kept
    assert_best(tmp_path, best)


def test_a_metric_that_is_never_finite_keeps_the_newest_alone(tmp_path):
    assert run(tmp_path, [float("nan")] * 4, newest=2) == ["3", "4"]
    with pytest.raises(checkpoints.CheckpointError, match="@best: none of its checkpoints has a finite val/acc"):
        checkpoints.load_params(f"{tmp_path}@best")


def test_best_of_a_run_that_keeps_none(tmp_path):
    run(tmp_path, [0.2])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(checkpoints.CheckpointError, match="@best: .* set config.keep_best"):
        checkpoints.load_params(f"{tmp_path}@best")


@pytest.mark.parametrize(
    "best, says",
    [
        ("val/acc", "keep_best is 'val/acc'; expected dict"),
        (dict(metric="val/acc", wrong=1), r"unknown keys \['wrong'\]"),
        (dict(metric="other/acc"), "metric is 'other/acc'; expected NAME/METRIC"),
        (dict(metric="val"), "metric is 'val'; expected NAME/METRIC"),
        (dict(metric="val/"), "metric is 'val/'; expected NAME/METRIC"),
        (dict(mode="max"), "metric is ''; expected NAME/METRIC"),
        (dict(metric="val/acc", mode="mean"), "mode is 'mean'"),
    ],
)
def test_settings_that_mean_nothing(best, says):
    with pytest.raises(ValueError, match=says):
        keep.check({"keep_best": best}, ["val", "vqav2/minival"])


def test_settings_that_mean_something():
    for best in (None, dict(metric="val/acc"), dict(metric="vqav2/minival/model/acc", mode="min")):
        keep.check({"keep_best": best}, ["val", "vqav2/minival"])
