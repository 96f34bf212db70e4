"""Evaluators in big_vision's loop: ours write what they do here, and its own agrees with them."""

import json

import pytest

from data_prep import build
from paligemma_med import experiment
from paligemma_med.config import values as config_values
from paligemma_med.evaluation import results
from tests.upstream import evals_config

OURS = ("phantom_validate", "short", "talks")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, run_python):
    """(folder of what big_vision trained and evaluated, folder of its checkpoint evaluated here):
    one set of questions, in the two formats of the two readers."""
    folder = tmp_path_factory.mktemp("evaluators")
    for name, form in (("tf", "tfrecord"), ("np", "array_record")):
        build.build("phantom", data_dir=folder / name, num_images=(12, 6, 2), file_format=form)
    there, here = folder / "there", folder / "here"
    config = "--config=tests/upstream/evals_config.py:data_dir="
    run_python("-m", "paligemma_med.upstream.train", f"{config}{folder / 'tf'}", f"--workdir={there}")
    run_python("-m", "paligemma_med.evaluate", f"{config}{folder / 'np'}", f"--checkpoint={there}", f"--out={here}")
    return there, here


def read(folder, name):
    """(rows, metrics, about) of an evaluation."""
    rows = results.read_rows(folder / "eval" / name / results.PREDICTIONS)
    return rows, *results.read_metrics(folder / "eval" / name / results.METRICS)


@pytest.mark.big_vision
@pytest.mark.slow
@pytest.mark.parametrize("name", OURS)
def test_ours_write_the_same_in_its_loop_and_here(runs, name):
    (there, found, about), (here, expected, about_here) = (read(run, name) for run in runs)
    assert there == here and len(there) > 20
    assert found == expected
    for key in ("fingerprint", "split", "split_hash", "prompt_hash", "controls"):
        assert about[key] == about_here[key]
    assert about["data"]["reader"] == "big_vision"


@pytest.mark.big_vision
@pytest.mark.slow
def test_prompts_that_are_cut_are_counted(runs):
    rows, metrics, _ = read(runs[0], "short")
    assert 0 < metrics["truncated"] < len(rows)


@pytest.mark.big_vision
@pytest.mark.slow
def test_its_own_evaluator_agrees_where_the_definitions_do(runs):
    rows, metrics, _ = read(runs[0], "phantom_validate")
    with open(runs[0] / "validate.json") as f:
        own = {x["question_id"]: x for x in json.load(f)}
    assert own.keys() == {row["question_id"] for row in rows}
    same = right = 0
    for row in rows:
        said, told = row["predictions"][0], own[row["question_id"]]
        assert told["gts"] == [row["answer"]]
        same += told["answer"] == said
        right += told["answer"] == row["answer"]
        if said == row["answer"]:  # it compares whole strings, ours forgive case and blanks
            assert row["correct"] and row["correct_strict"]
    assert same >= len(rows) - 2  # it reads images of TensorFlow's making, and ties may turn
    assert 0 < right < len(rows)
    logged = [json.loads(line) for line in open(runs[0] / "big_vision_metrics.txt")]
    logged = {k: v for line in logged for k, v in line.items()}
    assert logged["own/acc"] == pytest.approx(right / len(rows))
    assert logged["own/num"] == metrics["n"]
    assert metrics["model/overall/acc_strict"] == pytest.approx(logged["own/acc"], abs=2 / len(rows))
    assert logged["phantom_validate/model/overall/acc"] == metrics["model/overall/acc"]


MISTAKES = """
import types
from paligemma_med import upstream
upstream.install()
import jax
import numpy as np
from absl import flags
from paligemma_med.upstream import evaluators
from tests.upstream import evals_config

flags.DEFINE_string("workdir", None, "")
flags.FLAGS(["x"])
c = evals_config.get_config("data_dir=DATA")
section = c.evals.short.to_dict()
fn = types.SimpleNamespace(keywords=dict(model=None))
changes = dict(type="vqaa"), dict(promptt=1), dict(controls=["blank"]), dict(controls=["majority"])
for change in changes:
    try:
        evaluators.Evaluator(
            fn, section={k: v for k, v in (section | change).items() if k != "train_data"},
            name="short", tokenizer="tiny", devices=np.array(jax.devices()),
        )
    except ValueError as e:
        print(e)
"""


@pytest.mark.big_vision
@pytest.mark.slow
def test_mistakes_in_a_section_are_told_with_its_name(tmp_path, run_python):
    build.build("phantom", data_dir=tmp_path, num_images=(2, 2, 2), file_format="tfrecord")
    said = run_python("-c", MISTAKES.replace("DATA", str(tmp_path))).splitlines()
    kind, key, control, lacking = said[-4:]
    assert kind.startswith("config.evals.short.type is 'vqaa'; expected one of ['dialogue', 'vqa']")
    assert key.startswith("config.evals.short has unknown keys ['promptt']")
    assert control.startswith("config.evals.short: controls has 'blank'")
    assert lacking.startswith("config.evals.short: the majority control needs train_data")


@pytest.mark.big_vision
@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_its_predict_fns_run_on_our_model(run_python, devices):
    out = run_python("-m", "tests.upstream.predict_fns", devices=devices)
    assert json.loads(out.splitlines()[-1])["devices"] == devices


def test_a_section_of_its_own_is_left_to_it(capsys):
    """In a config of ours it is no mistake, and our programs say that they leave it out."""
    c = evals_config.get_config()
    assert [n for n, s in c.evals.items() if config_values.is_big_visions(s)] == ["own"]
    config_values.checked(c)
    c.evals = dict(own=c.evals.own)
    assert experiment.make_evaluators(c, None, None, None) == {}
    assert "config.evals.own is big_vision's own: left out." in capsys.readouterr().err
