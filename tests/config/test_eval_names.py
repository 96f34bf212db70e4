"""Evaluations may have names like big_vision's "vqav2/minival" and "vqav2/minival/pplx": training,
resuming, the best checkpoint, `evaluate` and reports all know them."""

import json

import pytest

from paligemma_med import evaluate, train
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import eval_names
from paligemma_med.config import values as config_values
from paligemma_med.evaluators import vqa
from tests import tiny
from tools.report import __main__ as report
from tools.report import evaluations

NAMES = ["val", "vqav2/minival", "vqav2/minival/pplx", "vqav2"]


@pytest.mark.parametrize(
    "metric, expected",
    [
        ("val/model/overall/acc", ("val", "model/overall/acc")),
        ("vqav2/minival/model/acc", ("vqav2/minival", "model/acc")),
        ("vqav2/minival/pplx/avg", ("vqav2/minival/pplx", "avg")),
        ("vqav2/minivalue", ("vqav2", "minivalue")),
        ("valid/acc", ("", "valid/acc")),
        ("val", ("", "val")),
        ("training_loss", ("", "training_loss")),
    ],
)
def test_which_evaluation_a_metric_is_of(metric, expected):
    for names in (NAMES, NAMES[::-1], dict.fromkeys(NAMES)):
        assert eval_names.split_metric(metric, names) == expected


@pytest.mark.parametrize("name", ["", "/abs", "a//b", "a/", "..", "a/../../b", "./a", "a\\b", "a\nb"])
def test_names_that_are_no_path_below_a_folder_are_refused(name):
    with pytest.raises(ValueError, match="config.evals has the name .* expected one like"):
        eval_names.check(name)
    if "." in name:  # which a ConfigDict refuses by itself
        return
    c = tiny.config("/no/data")
    c.evals[name] = c.evals.val
    with pytest.raises(ValueError, match="config.evals has the name"):
        config_values.checked(c)


@pytest.fixture(scope="module")
def finished(tiny_data, tmp_path_factory):
    """(workdir, config, names of the evaluators that ran, in order): nested names, the second eval
    of step 3 killed once."""
    c = tiny.config(tiny_data, keep_ckpt=1)
    section = {**c.evals.val.to_dict(), "controls": []}
    c.evals = {"val/mini": section, "val/mini/again": section, "end": section | {"log_steps": 6}}
    c.keep_best = dict(metric="val/mini/again/model/overall/acc")
    workdir, ran = tmp_path_factory.mktemp("names") / "w", []
    run = vqa.Evaluator.run

    def watched(evaluator, params):
        ran.append(evaluator.outdir.relative_to(workdir / "eval").as_posix())
        if len(ran) == 2:
            raise RuntimeError("out of memory")
        return run(evaluator, params)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vqa.Evaluator, "run", watched)
        with pytest.raises(RuntimeError, match="out of memory"):
            train.train(c, str(workdir))
        train.train(c, str(workdir))
    return workdir, c, ran


def test_a_resumed_run_repeats_only_the_evals_that_are_missing(finished):
    workdir, _, ran = finished
    at_the_end = ["end", "val/mini", "val/mini/again"]
    assert ran == ["val/mini", "val/mini/again", "val/mini/again", *at_the_end]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert {"val/mini/n", "val/mini/again/n"} <= rows[2].keys() and "end/n" not in rows[2]


def test_the_best_checkpoint_is_by_a_metric_of_a_nested_name(finished):
    workdir, c, _ = finished
    kept = sorted(p.name for p in (workdir / "checkpoints").iterdir())
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = {r["step"]: r[c.keep_best.metric] for r in rows if c.keep_best.metric in r}
    best = max(scores, key=scores.get)
    assert workdirs.split_spec(f"{workdir}@best") == (str(workdir), best)
    assert kept == sorted({str(best), "6"})


@pytest.mark.parametrize(
    "metric", ["val/model/overall/acc", "val/mini", "val/mini/again/", "mini/again/model/overall/acc"]
)
def test_a_best_metric_of_no_evaluation_is_refused(finished, metric, tmp_path):
    c = finished[1].copy_and_resolve_references()
    c.keep_best.metric = metric
    with pytest.raises(ValueError, match=r"expected NAME/METRIC.*\['end', 'val/mini', 'val/mini/again'\]"):
        train.train(c, str(tmp_path / "w"))


def test_evaluate_takes_the_names(finished, tmp_path):
    workdir, c, _ = finished
    results = evaluate.evaluate(c, str(workdir), str(tmp_path), only=["val/mini/again"], controls=[])
    assert set(results) == {"val/mini/again"}
    assert (tmp_path / "eval" / "val" / "mini" / "again" / "metrics.json").is_file()


def test_reports_find_every_evaluation_under_its_name(finished):
    workdir, c, _ = finished
    found = evaluations.load_all([workdir])
    assert sorted(e.name for e in found) == ["end", "val/mini", "val/mini/again"]
    assert all(e.run == "w" and e.section for e in found)
    (alone,) = evaluations.load_all([workdir / "eval" / "val" / "mini" / "again"])
    assert (alone.name, alone.run) == ("val/mini/again", "w") and alone.config["keep_best"]
    assert report._belongs(alone, workdir) and not report._belongs(alone, workdir / "eval" / "val")


def test_a_report_is_written_on_them(finished, tmp_path):
    workdir, _, _ = finished
    report.write("Report", report.make([str(workdir)]), tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "val/mini/again" in text and (tmp_path / "report.html").is_file()
