"""The quickstart's weights fit its config; the whole of it runs, and goes on where it stopped."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

from configs import quickstart as quickstart_config
from configs import tiny_base
from paligemma_med import checkpoints, experiment
from paligemma_med.checkpoints import npz
from tools import quickstart

PREDICTION_KEYS = {"question_id", "question", "answer", "predictions", "majority_prediction"}


def test_base_fits_the_quickstarts_model_and_is_small():
    config = quickstart_config.get_config()
    assert os.path.getsize(quickstart_config.BASE) <= 4e6
    params = npz.flatten_tree(checkpoints.load_params(quickstart_config.BASE))
    abstract = experiment.abstract_params(config, experiment.make_model(config))
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in abstract.items()}
    for name, value in params.items():
        assert value.dtype == npz.BFLOAT16, name
        assert np.isfinite(value.astype(np.float32)).all(), name


def test_quickstart_and_base_are_the_same_model_and_prompt():
    adapted, base = quickstart_config.get_config(), tiny_base.get_config()
    for key in ("model", "res", "tokenizer", "predict_pp"):
        assert adapted[key] == base[key], key


def test_configs_take_a_data_dir_everywhere():
    for module in (quickstart_config, tiny_base):
        config = module.get_config("data_dir=/some/where,eval=validate")
        (section,) = config.evals.values()
        assert section.data.split == "validate" and section.train_data.split == "train"
        for data in (config.input.data, section.data, section.train_data):
            assert data.data_dir == "/some/where"


def test_table():
    metrics = {"n": 30, "n/answer_type/CLOSED": 20, "n/answer_type/OPEN": 10}
    for who, acc in (("model", 0.9), ("majority", 0.5)):
        for group in quickstart.GROUPS.values():
            for figure, delta in (("acc", 0), ("acc_low", -0.1), ("acc_high", 0.05)):
                metrics[f"{who}/{group}/{figure}"] = acc + delta
    rows = {"majority": quickstart._as_model(metrics, "majority"), "adapted": metrics}
    lines = quickstart.format_table(rows).split("\n")
    head, _, majority, adapted = lines
    assert "closed (n = 20)" in head and "overall (n = 30)" in head
    assert majority.count("50.0 (40.0–55.0)") == 3
    assert adapted.count("90.0 (80.0–95.0)") == 3
    assert len({len(line) for line in lines}) == 1


def _tiny_config():
    config = quickstart_config.get_config("epochs=0.5,size=8")
    config.lock()  # as one that comes from a flag
    return config


@pytest.mark.slow
def test_quickstart_runs_goes_on_and_refuses_other_settings(tmp_path, capsys):
    sizes = (20, 4, 6)
    results = quickstart.run(_tiny_config(), tmp_path, num_images=sizes)
    out = capsys.readouterr().out
    assert len(results) == 4 and results["adapted"]["n"] > 20
    table = (tmp_path / "table.md").read_text()
    assert table in out and table.count("\n") == 6
    # Every path that it names is there.
    listed = re.findall(r"^\S.{21} (\S+)$", out, flags=re.M)
    listed = [p for p in listed if p.startswith(str(tmp_path))]
    assert len(listed) == 7 and all(os.path.exists(p) for p in listed)
    rows = [json.loads(s) for s in open(next(p for p in listed if p.endswith(".jsonl")))]
    assert len(rows) == results["adapted"]["n"] and PREDICTION_KEYS <= rows[0].keys()

    # A second run trains and evaluates nothing, and says the same.
    again = quickstart.run(_tiny_config(), tmp_path, num_images=sizes)
    assert again == results
    assert "loss" not in capsys.readouterr().out
    config = _tiny_config()
    config.lr = 1e-5
    with pytest.raises(ValueError, match="other settings.*--overwrite"):
        quickstart.run(config, tmp_path, num_images=sizes)


def test_help_says_what_it_is():
    command = [sys.executable, "-m", "tools.quickstart", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "python -m tools.quickstart" in done.stdout and "--overwrite" in done.stdout
