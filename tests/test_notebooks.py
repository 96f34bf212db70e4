"""The notebooks of the docs, run from top to bottom as scripts, on the tiny model."""

import json
import subprocess
import sys

import pytest

from tests import environ


def run(repo_root, folder, name):
    script = repo_root / "docs" / "notebooks" / f"{name}.py"
    done = subprocess.run(
        [sys.executable, script],
        cwd=folder,
        env=environ.of_program(PYTHONPATH=str(repo_root)),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder / f"{name}_out", done.stdout


def accuracies(folder):
    [path] = folder.glob("eval/*/metrics.json")
    metrics = json.loads(path.read_text("utf-8"))
    return {name.split("/")[0]: value for name, value in metrics.items() if name.endswith("/overall/acc")}


def test_every_notebook_is_run(repo_root):
    names = {path.stem for path in (repo_root / "docs" / "notebooks").iterdir()}
    assert names == {"own_data", "served_model"}


@pytest.mark.slow
def test_own_data(repo_root, tmp_path):
    out, _ = run(repo_root, tmp_path, "own_data")
    before, after = accuracies(out / "before"), accuracies(out / "after")
    assert (
        after["model"] > 0.8 > max(before["model"], after["shuffled_images"], after["blank_image"], after["majority"])
    )
    assert (out / "report" / "report.html").stat().st_size and (out / "page.html").stat().st_size


@pytest.mark.slow
def test_served_model(repo_root, tmp_path):
    out, said = run(repo_root, tmp_path, "served_model")
    served = accuracies(out / "served")
    # The grey image is 128, which isn't above 128: "No"; without an image it says "Yes" to everything.
    assert (served["model"], served["blank_image"], served["question_only"]) == (1, 0.75, 0.75)
    assert 0.5 <= served["shuffled_images"] < 1
    assert "served   model            1.00" in said and (out / "report" / "report.html").stat().st_size
