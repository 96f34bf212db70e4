"""The evals of a config on weights: tables, files, and the arguments that name them."""

import json
import subprocess
import sys

import pytest

from paligemma_med import evaluate, experiment
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.evaluators import scoring
from paligemma_med.evaluators.results import read_metrics, read_rows
from tests import tiny


@pytest.fixture(scope="module")
def run(tiny_data, tmp_path_factory):
    """(workdir, its config with two evals)."""
    folder = tmp_path_factory.mktemp("evaluate") / "w"
    c = tiny.config(tiny_data)
    c.evals.test = c.evals.val.to_dict()
    c.evals.test.data.split = "test[:8]"
    tiny.write_workdir(folder, c)
    return str(folder), experiment.config_from_json(workdirs.read_config(folder))


def test_tables_and_files(run, tmp_path, capsys):
    workdir, config = run
    results = evaluate.evaluate(config, workdir, str(tmp_path))
    assert set(results) == {"val", "test"}
    assert results["test"]["n"] == 8 < results["val"]["n"]
    out = capsys.readouterr().out
    for name in ("val", "test"):
        assert f"{name} on {workdir}" in out
        metrics, about = read_metrics(tmp_path / "eval" / name / "metrics.json")
        assert (
            metrics
            == results[name]
            == scoring.summarise(read_rows(tmp_path / "eval" / name / "predictions.jsonl"))
        )
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


def test_only_some(run, tmp_path):
    workdir, config = run
    assert set(evaluate.evaluate(config, workdir, str(tmp_path), only=["test"])) == {"test"}
    assert not (tmp_path / "eval" / "val").exists()


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
