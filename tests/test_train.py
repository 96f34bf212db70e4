"""A training run: its files, how it stops and is resumed, and what it refuses. The step is training/test_step.py's."""

import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import checkpoints, evaluate, files, train, weights
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.evaluation.results import read_metrics
from paligemma_med.evaluators import vqa
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import progress
from paligemma_med.training import step as train_step
from tests import tiny

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]


class Stop:
    """Makes an evaluator raise once, at its n-th run, before it has written anything."""

    def __init__(self, monkeypatch, error, n=1):
        self.error, self.left = error, n
        run = vqa.Evaluator.run

        def patched(evaluator, params):
            self.left -= 1
            if self.left == 0:
                raise self.error
            return run(evaluator, params)

        monkeypatch.setattr(vqa.Evaluator, "run", patched)


def rows_of(workdir):
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def without_time(row):
    return {k: v for k, v in row.items() if k not in progress.TIMING}


def dropout_config(data):
    """With all that a resumed run must pick up: schedule, moments, dropout, order of the data."""
    model = {k: dict(v, dropout=0.1) for k, v in tiny.MODEL.items()}
    frozen = [("img/embedding/.*", None), (".*", dict(decay_type="cosine", warmup_steps=2))]
    return tiny.config(data, model=model, schedule=frozen, frozen_dtype="bfloat16")


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """(workdir of six steps straight, config, results, what was printed)."""
    c = dropout_config(tiny_data)
    workdir = str(tmp_path_factory.mktemp("finished") / "w")
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr("builtins.print", lambda *a, **_: printed.append(" ".join(map(str, a))))
        results = train.train(c, workdir)
    return workdir, c, results, "\n".join(printed)


def test_workdir(finished):
    workdir, c, results, printed = finished
    with open(os.path.join(workdir, "config.json"), encoding="utf-8") as f:
        assert json.load(f) == json.loads(config_files.to_json(c))
    rows = rows_of(workdir)
    assert [r["step"] for r in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        names = {
            "training_loss",
            "l2_grads",
            "l2_params",
            "l2_updates",
            "lr",
            "examples_per_second",
            "input_wait",
            "eta_seconds",
            "tokens_seen",
            "answer_tokens_seen",
        }
        assert names <= set(row) and "lost" not in row
        assert ("val/model/overall/acc" in row) == (row["step"] in (3, 6))
    seen = [(0, 0), *((r["tokens_seen"], r["answer_tokens_seen"]) for r in rows)]
    assert all(b[0] > a[0] and 16 * 2 <= b[1] - a[1] < b[0] - a[0] for a, b in itertools.pairwise(seen))
    assert [r["lr"] for r in rows[:3]] == pytest.approx([0, 5e-4, 1e-3])
    metrics, about = read_metrics(os.path.join(workdir, "eval", "val", "metrics.json"))
    assert metrics == results["val"]
    assert about["checkpoint"] == workdir and len(about["fingerprint"]) == 32
    assert metrics == {k[4:]: v for k, v in rows[-1].items() if k.startswith("val/")}
    with open(os.path.join(workdir, "eval", "val", "predictions.jsonl"), encoding="utf-8") as f:
        assert len(f.readlines()) == metrics["n"] > 0
    assert os.listdir(os.path.join(workdir, "checkpoints")) == ["6"]

    count = sum(x.size for x in jax.tree.leaves(checkpoints.load_params(workdir)))
    frozen = 16 * 16 * 3 * 32 + 32
    assert f"{count - frozen:,} parameters trained" in printed
    assert f"{frozen:,} parameters frozen" in printed
    assert "step 6/6" in printed


def test_resumed_run_equals_the_straight_one(finished, tmp_path, monkeypatch, capsys):
    """Ctrl-C in the evaluation of step 3; metrics of a step 4 that was never saved; then on."""
    straight, c, results, _ = finished
    workdir = str(tmp_path / "w")
    with monkeypatch.context() as patch:
        Stop(patch, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            train.train(c, workdir)
    assert "Stopped at step 3; run the same command to resume" in capsys.readouterr().err
    assert [r["step"] for r in rows_of(workdir)] == [1, 2, 3]
    with open(os.path.join(workdir, "metrics.jsonl"), "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": 4, "training_loss": -1.0}) + "\n" + '{"step": 5, "trai')

    assert train.train(c, workdir) == results
    assert "Resumed from step 3 of 6" in capsys.readouterr().out
    expected = [without_time(r) for r in rows_of(straight)]
    assert [without_time(r) for r in rows_of(workdir)] == expected
    tiny.assert_trees_equal(checkpoints.load_params(workdir), checkpoints.load_params(straight))
    tiny.assert_same_eval(*(os.path.join(w, "eval", "val") for w in (straight, workdir)))


def test_evaluating_the_workdir_gives_the_metrics_of_training(finished, tmp_path):
    workdir, _, results, _ = finished
    c = config_files.from_json(workdirs.read_config(workdir))
    c.frozen_dtype = "float32"  # what was trained is loaded as it was
    assert evaluate.evaluate(c, workdir, str(tmp_path)) == results
    assert (tmp_path / "eval" / "val" / "predictions.jsonl").exists()


def test_finished_run_started_again_changes_nothing(finished):
    workdir, c, *_ = finished
    before = rows_of(workdir)
    assert train.train(c, workdir) == {}
    assert rows_of(workdir) == before


def test_a_second_run_in_a_workdir_is_refused(finished):
    workdir, c, *_ = finished
    before = pathlib.Path(workdir, "metrics.jsonl").read_bytes()
    message = f"in use by process {os.getpid()} on .* give another --workdir"
    with files.sole_use(workdir, "x"), pytest.raises(OSError, match=message):
        train.train(c, workdir)
    assert pathlib.Path(workdir, "metrics.jsonl").read_bytes() == before
    assert not os.path.exists(os.path.join(workdir, ".lock"))


def test_failing_evaluator_costs_no_training(finished, tmp_path, monkeypatch):
    """The checkpoint is written before; started again, the eval that failed is made up for."""
    straight, c, results, _ = finished
    workdir = str(tmp_path / "w")
    with monkeypatch.context() as patch:
        Stop(patch, RuntimeError("out of memory"), n=2)
        with pytest.raises(RuntimeError, match="out of memory"):
            train.train(c, workdir)
    assert "val/n" not in rows_of(workdir)[-1]
    assert train.train(c, workdir) == results
    assert without_time(rows_of(workdir)[-1]) == without_time(rows_of(straight)[-1])


def test_workdir_of_another_config(finished):
    workdir, c, *_ = finished
    other = c.copy_and_resolve_references()
    other.schedule = HEAD
    message = "trained parameters differ from the config's, the first is img/"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        train.train(other, workdir)
    other = c.copy_and_resolve_references()
    other.optax_name = "identity"
    with pytest.raises(checkpoints.CheckpointError, match="optimizer"):
        train.train(other, workdir)
    assert len(rows_of(workdir)) == 6


def test_a_run_that_is_refused_keeps_its_config(finished):
    workdir, c, *_ = finished
    path = os.path.join(workdir, "config.json")
    with open(path, encoding="utf-8") as f:
        before = f.read()
    refused = {
        "seed": (4, "seed was 3 and is now 4"),
        "total_steps": (5, "at step 6 already, but by the config the run has only 5 steps"),
    }
    for key, (value, message) in refused.items():
        other = c.copy_and_resolve_references()
        other[key] = value
        with pytest.raises(ValueError, match=message):
            train.train(other, workdir)
        with open(path, encoding="utf-8") as f:
            assert f.read() == before


def test_what_changed_in_the_config_is_told(finished, tmp_path, caplog):
    straight, c, *_ = finished
    workdir = str(tmp_path / "w")
    shutil.copytree(straight, workdir)
    other = c.copy_and_resolve_references()
    other.lr = 2e-3
    other.evals.val.pred_kw.max_new_tokens = 5
    train.train(other, workdir)
    assert (
        "continues with the new one: config.evals.val.pred_kw.max_new_tokens was 4 and is now 5; "
        "config.lr was 0.001 and is now 0.002"
    ) in caplog.text


def test_a_best_metric_that_no_eval_gives(tiny_data, tmp_path):
    """Told after the first eval; mended, the run goes on from there."""
    c = tiny.config(tiny_data, keep_best=dict(metric="val/model/overall/ac"))
    message = "val gives no 'model/overall/ac'; it has 'model/overall/acc'"
    with pytest.raises(ValueError, match=message):
        train.train(c, str(tmp_path))
    assert [r["step"] for r in rows_of(tmp_path)] == [1, 2, 3]
    c.keep_best.metric = "val/model/overall/acc"
    train.train(c, str(tmp_path))
    assert [r["step"] for r in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_fresh_start_replaces_what_a_run_without_checkpoint_left(tiny_data, tmp_path, monkeypatch):
    """A stale base.npz would give checkpoints the frozen leaves of another seed."""
    workdir = str(tmp_path / "w")
    c = tiny.config(tiny_data, schedule=HEAD, total_steps=1, evals={})
    with monkeypatch.context() as patch:
        patch.setattr(train.Soundness, "add", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.train(c, workdir)
    assert os.path.exists(os.path.join(workdir, "base.npz"))
    c.seed = 4
    train.train(c, workdir)
    saved = checkpoints.load_params(workdir)
    expected, _ = weights.initial_params(TrainingSetup.without_data(c))
    np.testing.assert_array_equal(saved["llm"]["embedder"]["input_embedding"], expected["llm/embedder/input_embedding"])


def test_not_finite_stops_and_is_not_saved(tiny_data, tmp_path):
    c = tiny.config(
        tiny_data,
        lr=1e38,
        log_training_steps=0,
        ckpt_steps=2,
        evals={},
        optax_name="identity",
        schedule=dict(decay_type="constant"),
    )
    with pytest.raises(FloatingPointError, match=r"Step \d: \w+ is (nan|inf)"):
        train.train(c, str(tmp_path / "w"))
    assert os.listdir(tmp_path / "w" / "checkpoints") == []


def test_a_step_that_is_not_finite_can_be_skipped(tiny_data, tmp_path, monkeypatch):
    """As if it had not been taken, but for its number: the third of these six is spoilt."""
    make = train_step.make_train_step

    def spoilt(*args):
        step = make(*args)

        def run(trained, opt_state, frozen, batch, i):
            bad = jnp.where(i == 2, jnp.nan, 1.0)
            return step(trained, opt_state, frozen, {**batch, "image": batch["image"] * bad}, i)

        return run

    monkeypatch.setattr(train_step, "make_train_step", spoilt)
    c = tiny.config(tiny_data, evals={}, log_training_steps=2, ckpt_steps=1)
    with pytest.raises(FloatingPointError, match="Step 3: training_loss is nan"):
        train.train(c, str(tmp_path / "stops"))
    assert max(os.listdir(tmp_path / "stops" / "checkpoints")) == "2"
    c.skip_nonfinite = 1
    train.train(c, str(tmp_path / "stops"))  # goes on where it stopped
    train.train(c, str(tmp_path / "straight"))
    rows = rows_of(tmp_path / "straight")
    assert [r["skipped_steps"] for r in rows] == [0, 0, 1, 1, 1, 1]
    assert [r["training_loss"] is None for r in rows] == [r["step"] == 3 for r in rows]
    assert rows[2]["l2_params"] == rows[1]["l2_params"] != rows[3]["l2_params"]
    (bad,) = map(json.loads, (tmp_path / "straight" / "nonfinite.jsonl").read_text().splitlines())
    assert bad["step"] == 3 and len(bad["question_ids"]) == 16
    tiny.assert_trees_equal(*(checkpoints.load_params(str(tmp_path / n)) for n in ("stops", "straight")))


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(learning_rate=1), "unknown keys \\['learning_rate'\\]"),
        (dict(total_steps=None), "nothing about total_steps, total_epochs or total_examples"),
        (dict(total_epochs=1), "Only one of"),
        (dict(grad_accum_steps=3), "batch_size = 16 doesn't divide by config.grad_accum_steps = 3"),
        (dict(tokenizer='gemma(model="/no/such/file")'), "/no/such/file"),
        (dict(schedule=[("img/.*", None)]), "config.schedule says nothing about"),
    ],
)
def test_mistakes_in_a_config(tiny_data, tmp_path, kw, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(tiny.config(tiny_data, **kw), str(tmp_path / "w"))
    assert not (tmp_path / "w" / "metrics.jsonl").exists()


@pytest.mark.parametrize("key", ["lr", "optax_name", "input", "model", "res"])
def test_missing_key(tiny_data, tmp_path, key):
    c = tiny.config(tiny_data)
    del c[key]
    with pytest.raises(ValueError, match=f"config lacks \\['{key}'\\]"):
        train.train(c, str(tmp_path / "w"))


def test_tokenizer_with_more_tokens_than_the_model(tiny_data, tmp_path):
    model = dict(tiny.MODEL, llm=dict(tiny.MODEL["llm"], vocab_size=100))
    with pytest.raises(ValueError, match="only 100 rows"):
        train.train(tiny.config(tiny_data, model=model), str(tmp_path / "w"))


CONFIG_FILE = """
from tests import tiny
def get_config(arg=None):
    return tiny.config(arg, total_steps=100000, evals={}, log_training_steps=5)
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_run_that_goes_on(tiny_data, tmp_path, repo_root):
    (tmp_path / "c.py").write_text(CONFIG_FILE)
    command = [
        sys.executable,
        "-m",
        "paligemma_med.train",
        f"--workdir={tmp_path / 'w'}",
        f"--config={tmp_path / 'c.py'}:{tiny_data}",
    ]
    last = 0
    for _ in range(2):
        run = subprocess.Popen(command, cwd=repo_root, stderr=subprocess.PIPE, text=True, stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline and run.poll() is None:
                path = tmp_path / "w" / "metrics.jsonl"
                if path.exists() and (rows := rows_of(path.parent)) and rows[-1]["step"] > last + 5:
                    break
                time.sleep(0.2)
            run.send_signal(signal.SIGINT)
            _, err = run.communicate(timeout=60)
        finally:
            run.kill()
        assert "run the same command to resume" in err, err
        step = max(map(int, os.listdir(tmp_path / "w" / "checkpoints")))
        assert f"Stopped at step {step};" in err
        assert step > last
        last = step
