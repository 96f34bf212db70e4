"""From a config to evaluators: what each mistake says, and which rows the majorities are taken from."""

import ml_collections
import numpy as np
import pytest

from paligemma_med import experiment, input_pipeline
from paligemma_med.evaluators import vqa
from tests import tiny


@pytest.mark.parametrize(
    "section, message",
    [
        (dict(type="../x"), "config.evals.val.type is '../x'; expected one of"),
        (dict(type="vqb"), r"config.evals.val.type is 'vqb'; expected one of .*'vqa'"),
        (dict(type="__init__"), "config.evals.val.type is '__init__'; expected one of"),
    ],
)
def test_evaluators_that_are_none(section, message):
    c = tiny.config(evals=dict(val=section))
    with pytest.raises(ValueError, match=message):
        experiment.make_evaluators(c, None, None, None)


def test_images_that_are_trained_on_are_told_and_kept_for_metrics_json(tiny_data, monkeypatch, capsys):
    made = {}
    monkeypatch.setattr(vqa, "Evaluator", lambda *args, about, **kw: made.update(about=about))
    monkeypatch.setattr(input_pipeline, "evaluation", lambda *args, **kw: [])
    data = dict(name="phantom", split="train[:4]", data_dir=str(tiny_data))
    section = dict(type="vqa", data=data, pp_fn="", batch_size=1)
    c = ml_collections.ConfigDict(dict(evals=dict(x=section), input=dict(data=data)))
    monkeypatch.setattr(experiment, "_arguments", lambda evaluator: ["about"])
    experiment.make_evaluators(c, None, None, None)
    shared = made["about"].keywords["shared"]
    assert 0 < shared["images"] == shared["of"] and list(shared["in"]) == ["phantom train[:4]"]
    assert f"{shared['of']:,} images of the evaluation x are in what is trained on" in capsys.readouterr().out
    told = experiment.about(section, None, {"x": np.zeros(1, np.float32)}, shared=shared)
    assert told["shared_images"] == shared
    assert "shared_images" not in experiment.about(section, None, {"x": np.zeros(1, np.float32)}, shared={})


def test_training_rows_have_the_answer_that_is_asked_for(tiny_data, monkeypatch):
    made = {}
    monkeypatch.setattr(vqa, "Evaluator", lambda *args, train_data, **kw: made.update(rows=list(train_data)))
    monkeypatch.setattr(input_pipeline, "evaluation", lambda *args, **kw: [])
    data = dict(name="phantom", split="train[:4]", data_dir=str(tiny_data))
    section = dict(type="vqa", data=data, train_data=data, pp_fn="", batch_size=1)
    for extra, key in (({}, "answer"), ({"train_answer": "location"}, "location")):
        c = ml_collections.ConfigDict(dict(evals=dict(x={**section, **extra})))
        experiment.make_evaluators(c, None, None, None)
        source = input_pipeline.open_source(data)
        assert [r["answer"] for r in made["rows"]] == [source[i][key] for i in range(4)]
        assert all(isinstance(x, str) for r in made["rows"] for x in r.values())  # no images
    section["train_answer"] = "answr"
    c = ml_collections.ConfigDict(dict(evals=dict(x=section)))
    with pytest.raises(ValueError, match="config.evals.x: train_answer='answr': .* has no 'answr'"):
        experiment.make_evaluators(c, None, None, None)
