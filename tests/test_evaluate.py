"""The evals of a config on weights: tables, files, and the arguments that name them."""

import json
import shutil
import subprocess
import sys

import pytest

from paligemma_med import evaluate
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.evaluation.results import read_metrics, read_rows
from paligemma_med.metrics import scoring, tables
from tests import tiny


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """(workdir, its config with two evals)."""
    folder = tmp_path_factory.mktemp("evaluate") / "w"
    c = tiny.config(tiny_data)
    c.evals.test = c.evals.val.to_dict()
    c.evals.test.data.split = "test[:8]"
    tiny.write_workdir(folder, c)
    return str(folder), config_files.from_json(workdirs.read_config(folder))


def test_tables_and_files(run, tmp_path, capsys):
    workdir, config = run
    results = evaluate.evaluate(config, workdir, str(tmp_path))
    assert set(results) == {"val", "test"}
    assert results["test"]["n"] == 8 < results["val"]["n"]
    out = capsys.readouterr().out
    for name in ("val", "test"):
        assert f"{name} on {workdir}" in out
        metrics, about = read_metrics(tmp_path / "eval" / name / "metrics.json")
        assert metrics == results[name] == scoring.summarise(read_rows(tmp_path / "eval" / name / "predictions.jsonl"))
        assert about["checkpoint"] == f"{workdir}@2" and about["command"].startswith("python")
        assert about["section"]["data"]["split"] in about["split"]
        assert about["section"]["type"] == "vqa" and about["protocol"] == "vqa"
        with open(tmp_path / "eval" / name / "predictions.jsonl", encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        assert len(rows) == results[name]["n"]
        hits = sum(r["correct"] for r in rows) / len(rows)
        assert results[name]["model/overall/acc"] == pytest.approx(hits)
        # The prompt is the question's; the ground truth is elsewhere.
        assert all(r["prompt"] == f"answer en {r['question']}\n" for r in rows)
    assert "images shuffled" in out and "majority answer" in out


def test_dialogues_take_no_other_images(run):
    config = run[1].copy_and_resolve_references()
    config.evals.test.type = "dialogue"
    evaluate._set_controls(config, ["echo", "shuffled_images"])
    assert config.evals.test.controls == ["echo"]
    assert config.evals.val.controls == ["echo", "shuffled_images"]


def test_only_some(run, tmp_path):
    workdir, config = run
    assert set(evaluate.evaluate(config, workdir, str(tmp_path), only=["test"])) == {"test"}
    assert not (tmp_path / "eval" / "val").exists()


def test_only_some_need_only_their_own_data(run, tmp_path):
    """The others may have data that aren't here, or an evaluator that is another project's."""
    workdir, config = run
    config = config.copy_and_resolve_references()
    config.evals.val.data.data_dir = config.evals.val.train_data.data_dir = "/no/such/folder"
    config.evals.far = dict(config.evals.test.to_dict(), type="unknown")
    before = config.to_json_best_effort()
    assert set(evaluate.evaluate(config, workdir, str(tmp_path), only=["test"])) == {"test"}
    assert config.to_json_best_effort() == before


@pytest.mark.parametrize("kind", ["vqb", "stats", "scoring", "../vqa"])
def test_an_evaluator_that_is_none(run, tmp_path, kind):
    """`stats` was a helper in the evaluators' folder once, and any name a traceback."""
    workdir, config = run
    config = config.copy_and_resolve_references()
    config.evals.test.type = kind
    with pytest.raises(
        ValueError, match=f"config.evals.test.type is '{kind}'; expected one of .*'dialogue', 'perplexity', 'vqa'."
    ):
        evaluate.evaluate(config, workdir, str(tmp_path))


def test_all_controls_but_where_a_config_names_its_own(run, tmp_path, capsys):
    workdir, config = run
    config = config.copy_and_resolve_references()
    config.evals.own = {**config.evals.test.to_dict(), "controls": ["echo"]}
    config.evals.bare = {k: v for k, v in config.evals.test.to_dict().items() if k != "train_data"}
    names = ["test", "own", "bare"]

    def found(**kw):
        results = evaluate.evaluate(config, workdir, str(tmp_path), only=names, **kw)
        columns = {k.split("/")[0] for name in names for k in results[name]} & {*tables.COLUMNS}
        by_name = {name: [w for w in tables.COLUMNS if f"{w}/overall/acc" in results[name]] for name in names}
        return columns, by_name

    columns, by_name = found(controls="all")
    assert columns == {"model", *scoring.CONTROLS}
    assert by_name["test"] == [w for w in tables.COLUMNS if w in ("model", *scoring.CONTROLS)]
    assert by_name["own"] == ["model", "echo"]
    assert not [w for w in by_name["bare"] if "majority" in w] and "grey image" in capsys.readouterr().out
    # The same again asks nothing; other controls do.
    found(controls="all")
    assert capsys.readouterr().err.count("is there for these weights") == 3
    columns, _ = found(controls=["blank_image"])
    assert columns == {"model", "blank_image"}
    err = capsys.readouterr().err
    assert "is there" not in err
    found(controls=["blank_image"], resume=False)
    assert "is there" not in capsys.readouterr().err


def test_other_weights_start_anew(run, tmp_path, capsys):
    """What is finished is of these weights, wherever they lie; of others it's asked again."""
    workdir, config = run
    evaluate.evaluate(config, workdir, str(tmp_path), only=["test"])
    about = [read_metrics(tmp_path / "eval/test/metrics.json")[1]]
    shutil.copytree(workdir, tmp_path / "copy")
    evaluate.evaluate(config, str(tmp_path / "copy"), str(tmp_path), only=["test"])
    assert "is there for these weights" in capsys.readouterr().err
    about.append(read_metrics(tmp_path / "eval/test/metrics.json")[1])
    assert about[0]["fingerprint"] == about[1]["fingerprint"]
    assert about[0]["checkpoint"] != about[1]["checkpoint"]
    other = config.copy_and_resolve_references()
    other.seed = 1
    other.model_init = None
    tiny.write_workdir(tmp_path / "other", other, seed=1)
    evaluate.evaluate(config, str(tmp_path / "other"), str(tmp_path), only=["test"])
    assert "is there" not in capsys.readouterr().err
    about.append(read_metrics(tmp_path / "eval/test/metrics.json")[1])
    assert about[1]["fingerprint"] != about[2]["fingerprint"]
    for key in ("split_hash", "prompt_hash", "section", "data", "versions", "controls"):
        assert about[0][key] == about[2][key]


def test_unknown_or_no_evals(run, tmp_path):
    workdir, config = run
    with pytest.raises(ValueError, match="config.evals has no \\['tset'\\]; it has"):
        evaluate.evaluate(config, workdir, str(tmp_path), only=["tset"])
    with pytest.raises(ValueError, match="config.evals is empty"):
        evaluate.evaluate(tiny.config(evals={}), workdir, str(tmp_path))


def test_command_line(run, repo_root):
    """Without arguments it says what is missing; with a workdir it writes there."""
    workdir, _ = run

    def program(*args):
        command = [sys.executable, "-m", "paligemma_med.evaluate", *args]
        return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)

    done = program("--only=test", f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "| exact match, %" in done.stdout
    with open(f"{workdir}/eval/test/metrics.json", encoding="utf-8") as f:
        assert json.load(f)["n"] == 8
    done = program("--only=test")
    assert done.returncode != 0
    assert "Give --workdir, or both --config and --checkpoint." in done.stdout + done.stderr
