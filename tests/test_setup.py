"""What a config comes to: worked out once, and without a change to the caller's config."""

import pytest

from paligemma_med import evaluate, experiment, input_pipeline, predict, train, weights
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.input_pipeline import mixture, sets
from paligemma_med.setup import Setup, TrainingSetup
from paligemma_med.training import dry_run
from tests import tiny

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]


def test_types_kinds_and_what_is_trained():
    setup = TrainingSetup.without_data(tiny.config(schedule=HEAD, frozen_dtype="int8"))
    assert sorted(setup.trained_names) == ["img/head/bias", "img/head/kernel"]
    assert {str(setup.dtypes[n]) for n in setup.trained_names} == {"float32"}
    assert {str(x) for n, x in setup.dtypes.items() if n not in setup.trained_names} == {"bfloat16"}
    assert "llm/layers/mlp/linear" in setup.kinds and "img/head/kernel" not in setup.kinds
    answering = Setup(setup.config)
    assert not answering.trained_names and "img/head/kernel" in answering.kinds


def test_nothing_is_worked_out_before_it_is_asked_for(monkeypatch):
    """A run of eight devices can be read on a laptop, and a dry run needs no data."""
    c = tiny.config("/no/such/folder", mesh=[("data", 4096)], tokenizer="/no/such/file", schedule=HEAD)
    setup = TrainingSetup.without_data(c)
    assert len(setup.trained_names) == 2 and setup.tx and setup.to_steps(c.evals.val, "log") == 3
    for name in ("mesh", "tokenizer", "data"):
        with pytest.raises((ValueError, OSError)):
            getattr(setup, name)


def test_each_is_worked_out_once(monkeypatch):
    calls = []
    make_model = experiment.make_model
    monkeypatch.setattr(experiment, "make_model", lambda config: calls.append("model") or make_model(config))
    setup = TrainingSetup.without_data(tiny.config(schedule=HEAD))
    for _ in range(2):
        setup.shardings, setup.kinds, setup.tx, setup.flops_per_example  # noqa: B018
    assert calls == ["model"]


@pytest.mark.parametrize("accum, message", [(1, "into 8 devices .* 16 does"), (2, "into 2 microbatches .* 16 does")])
def test_a_batch_that_does_not_divide(accum, message):
    c = tiny.config(grad_accum_steps=accum)
    c.input.batch_size = 12
    with pytest.raises(ValueError, match=f"config.input.batch_size = 12 doesn't divide {message}"):
        dry_run.trace_step(TrainingSetup.without_data(c))


def mixed(data, **kw):
    """A config that draws from two data sets, without evaluations."""
    c = tiny.config(data, evals={}, total_steps=1, log_training_steps=0, **kw)
    one = c.input.data.to_dict()
    with c.unlocked():
        c.input.data = dict(a=1.0, b=2.0)
        c.input.a = dict(data=dict(one, split="train[:60]"))
        c.input.b = dict(data=dict(one, split="train[60:]"))
    return c


def test_a_start_opens_the_training_sets_once(tiny_data, tmp_path, monkeypatch):
    """Four times, once; a mixture was drawn twice, in a loop over every example of the run."""
    opened, drawn = [], []
    open_source, draw = sets.open_source, mixture.draw
    monkeypatch.setattr(sets, "open_source", lambda data: opened.append(data["split"]) or open_source(data))
    monkeypatch.setattr(mixture, "draw", lambda *args: drawn.append(args[1]) or draw(*args))
    train.train(mixed(tiny_data), str(tmp_path / "w"))
    assert opened == ["train[:60]", "train[60:]"]
    assert drawn == [16]


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """(workdir of a run with adapters, its config as the caller has it, the same as text)."""
    c = tiny.config(
        tiny_data,
        lora=[("img/head/kernel", dict(rank=2))],
        schedule=[(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)],
        total_steps=1,
        evals={},
    )
    before = c.to_json_best_effort()
    workdir = str(tmp_path_factory.mktemp("run") / "w")
    train.train(c, workdir)
    return workdir, c, before


def test_training_leaves_the_callers_config_as_it_is(run, tiny_data, tmp_path):
    workdir, c, before = run
    assert c.to_json_best_effort() == before
    # Resumed after the run that it started from has gone on: it keeps to the step it began with.
    other = tiny.config(tiny_data, model_init=workdir, lora=c.lora, schedule=c.schedule, total_steps=1, evals={})
    before = other.to_json_best_effort()
    train.train(other, str(tmp_path / "w"))
    train.train(other, str(tmp_path / "w"))
    assert other.to_json_best_effort() == before
    assert workdirs.read_config(tmp_path / "w")["model_init"] == f"{workdir}@1"


def test_answering_leaves_the_callers_config_as_it_is(run, tiny_data, tmp_path):
    workdir, *_ = run
    c = tiny.config(tiny_data)  # says nothing about adapters: those of the run count
    before = c.to_json_best_effort()
    model, *_ = weights.load(c, workdir)
    assert model.lora
    evaluate.evaluate(c, workdir, str(tmp_path), controls="all")
    image = input_pipeline.open_source(c.input.data)[0]["image"]
    predict.predict(c, workdir, image, ["what is it ?"], max_new_tokens=1)
    assert c.to_json_best_effort() == before
