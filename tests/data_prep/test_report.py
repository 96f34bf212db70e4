"""The report of built sets: numbers that hold, a picture that isn't empty."""

import gzip
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import tokenizers

from data_prep import report
from data_prep.build import build
from data_prep.datasets.pmc_vqa import fake
from data_prep.files import DataError


@pytest.fixture
def tokenizer(tmp_path):
    """One token a character."""
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(special, [], unk_token="<unk>", fuse_unk=False))
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(made.to_str().encode()))
    return str(path)


def test_report_of_two_sets(slake, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setenv(report.TOKENIZER, tokenizer)
    monkeypatch.setattr(report, "_BATCH", 3)
    slake.rows["train"][0]["answer"] = " "
    made = build("slake", manual_dir=slake.write(), data_dir=tmp_path / "d", config="en")
    raw = fake.write(tmp_path / "raw")
    made |= build("pmc_vqa", manual_dir=raw, data_dir=tmp_path / "d", config="v1")
    report.write(tmp_path / "out", made)

    found = json.loads((tmp_path / "out" / "report.json").read_text())
    train = found["slake/en"]["splits"]["train"]
    assert train["examples"] == 3
    # "What modality is used?" once, "Does it contain lung?" twice; answers CT, Yes, Yes.
    assert train["lengths"]["question_words"] == {"mean": 4.0, "median": 4, "p95": 4, "max": 4}
    assert train["lengths"]["question_tokens"]["max"] == len("What modality is used?")
    assert train["lengths"]["answer_tokens"] == {"mean": 2.67, "median": 3, "p95": 3, "max": 3}
    assert train["tables"]["Body part"] == {"Lung": 3}
    assert found["slake/en"]["build"]["splits"]["train"]["dropped"] == {"empty answer": {"count": 1, "first": ["0"]}}
    assert found["slake/en"]["shared"]["image"]["train+test"]["count"] == 0
    assert found["pmc_vqa/v1"]["panels"] == {"Question type": report.FIRST_WORD}
    assert found["pmc_vqa/v1"]["splits"]["test"]["tables"] == {"Question type": {"Which": 12}}

    text = (tmp_path / "out" / "report.md").read_text()
    assert "| train | 4 | 3 | 1 | 2 |" in text
    assert "| train | empty answer | 1 | 0 |" in text
    assert "| image | train and test | 0 |" in text
    assert "shuffle_choices=False" in text
    picture = np.asarray(PIL.Image.open(tmp_path / "out" / "distributions.png").convert("RGB"))
    blue = (picture == (0x00, 0x72, 0xB2)).all(-1)
    assert 0.02 < blue.mean() < 0.6


def test_build_command_makes_one(slake, tmp_path):
    args = (sys.executable, "-m", "data_prep.build", "slake", "--config=en")
    folders = (f"--manual_dir={slake.write()}", f"--data_dir={tmp_path / 'd'}")
    run = subprocess.run([*args, *folders, f"--report={tmp_path / 'out'}"], capture_output=True)
    assert run.returncode == 0, run.stderr
    first = (tmp_path / "out" / "report.json").read_text()
    args = (sys.executable, "-m", "data_prep.report", "slake/en", f"--out={tmp_path / 'two'}")
    run = subprocess.run([*args, f"--data_dir={tmp_path / 'd'}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "two" / "report.json").read_text() == first
    run = subprocess.run([*args[:-2], "slake/fr", *args[-1:]], capture_output=True, text=True)
    assert run.returncode == 1 and "slake/fr: not built; expected records" in run.stderr


def test_features_that_are_always_empty_are_not_drawn(slake, tmp_path):
    for rows in slake.rows.values():
        for row in rows:
            row["modality"] = row["content_type"] = " "
    made = build("slake", manual_dir=slake.write(), data_dir=tmp_path / "d", config="en")
    found = report.write(tmp_path / "out", made)["slake/en"]
    assert found["panels"] == {"Body part": "location", "Question type": report.FIRST_WORD}
    assert found["splits"]["train"]["tables"] == {
        "Body part": {"Lung": 4},
        "Question type": {"What": 2, "Does": 2},
    }
    assert "### Modality\n\nNot recorded." in (tmp_path / "out" / "report.md").read_text()


def test_lengths():
    assert report.summary({1: 90, 5: 9, 100: 1}) == {
        "mean": 2.35,
        "median": 1,
        "p95": 5,
        "max": 100,
    }
    assert report.summary({3: 1}) == {"mean": 3.0, "median": 3, "p95": 3, "max": 3}
    assert report.summary({}) == {}


def test_rare_values_are_put_together():
    shown = report._shown(report.Counter({f"v{i}": 100 - i for i in range(40)}))
    assert len(shown) == report._SHOWN + 1
    assert shown[-1] == ("28 others", sum(100 - i for i in range(12, 40)))
    assert sum(n for _, n in shown) == sum(100 - i for i in range(40))


def test_table_cells_stay_in_their_cell():
    assert report._table("a, b", [("x|y", "line\nbreak")]).splitlines()[-1] == ("| x\\|y | line break |")


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="x.json: no tokenizer .*expected .PALIGEMMA_TOKENIZER"):
        report.load_tokenizer(str(tmp_path / "x.json"))
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs matplotlib; pip install 'paligemma_med.report.'"):
        build("phantom", data_dir=tmp_path / "d", report=tmp_path / "out")
    assert not (tmp_path / "d").exists()
