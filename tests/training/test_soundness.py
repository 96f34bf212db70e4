"""What is looked at after every step, although only some are logged."""

import json

import jax.numpy as jnp
import pytest

from paligemma_med.training.soundness import Soundness
from tests import tiny


class Batches:
    def question_ids(self, step):
        return [f"q{step}a", f"q{step}b"]


def metrics(finite=True, lost=0, loss=1.0, params=3):
    return {
        "finite": jnp.asarray(finite),
        "lost": jnp.int32(lost),
        "training_loss": jnp.float32(loss),
        "l2_grads": jnp.float32(2),
        "l2_params": jnp.float32(params),
    }


def rows(folder):
    path = folder / "nonfinite.jsonl"
    return [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []


def test_answers_longer_than_supervised_len_are_an_error_on_any_step(tmp_path):
    s = Soundness(tiny.config(supervised_len=3), str(tmp_path), Batches())
    s.add(1, metrics(lost=2))
    s.add(2, metrics())
    with pytest.raises(ValueError, match="Step 1: 2 supervised tokens.*supervised_len = 3 .*raise"):
        s.check()


def test_not_finite_names_step_and_questions(tmp_path):
    s = Soundness(tiny.config(), str(tmp_path), Batches())
    s.add(1, metrics())
    s.check()
    assert rows(tmp_path) == []
    s.add(2, metrics(finite=False, loss=jnp.nan))
    s.add(3, metrics())
    with pytest.raises(FloatingPointError, match="Step 2: training_loss is nan.*q1a, q1b;"):
        s.check()
    expected = {
        "step": 2,
        "training_loss": "nan",
        "l2_grads": 2.0,
        "l2_params": 3.0,
        "question_ids": ["q1a", "q1b"],
    }
    assert rows(tmp_path) == [expected]


def test_some_may_be_skipped_also_across_restarts(tmp_path):
    c = tiny.config(skip_nonfinite=2)
    s = Soundness(c, str(tmp_path), Batches())
    s.add(1, metrics(finite=False))
    s.check()
    assert s.skipped == 1
    s = Soundness(c, str(tmp_path), Batches(), skipped=s.skipped)
    s.add(2, metrics(finite=False))
    s.check()
    s.add(3, metrics(finite=False))
    with pytest.raises(FloatingPointError, match="let 3 or more such steps be skipped"):
        s.check()
    assert [r["step"] for r in rows(tmp_path)] == [1, 2, 3]


def test_parameters_that_are_not_finite_always_stop(tmp_path):
    """A step can't be skipped any more whose update has spoilt them."""
    s = Soundness(tiny.config(skip_nonfinite=9), str(tmp_path), Batches())
    s.add(1, metrics(params=jnp.inf))
    with pytest.raises(FloatingPointError, match="Step 1: l2_params is inf.*Lower config.lr"):
        s.check()
