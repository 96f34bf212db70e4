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
from paligemma_med.config import files as config_files
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.training import optim
from tools import quickstart

PREDICTION_KEYS = {"question_id", "question", "answer", "predictions", "majority_prediction"}


def test_base_fits_the_quickstarts_model_and_is_small():
    config = quickstart_config.get_config("stage=1")
    assert os.path.getsize(tiny_base.BASE) <= 4e6
    params = flatten_tree(checkpoints.load_params(tiny_base.BASE))
    abstract = experiment.abstract_params(config, experiment.make_model(config))
    assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in abstract.items()}
    for name, value in params.items():
        assert value.dtype == npz.BFLOAT16, name
        assert np.isfinite(value.astype(np.float32)).all(), name


def test_quickstart_and_base_are_the_same_model_and_prompt():
    adapted, base = quickstart_config.get_config(), tiny_base.get_config()
    for key in ("model", "res", "tokenizer", "predict_pp"):
        assert adapted[key] == base[key], key


def test_stage_1_trains_the_head_and_stage_2_the_adapters_alone():
    def trained(stage):
        config = quickstart_config.get_config(f"stage={stage}")
        names = experiment.abstract_params(config, experiment.make_model(config))
        return optim.trained_names(config, list(names)), list(names)

    names, everything = trained(1)
    assert sorted(names) == ["img/head/bias", "img/head/kernel"] and len(everything) > 20
    names, everything = trained(2)
    assert set(names) == {n for n in everything if lora.is_factor(n)}
    towers = {n.split("/")[0] for n in names}
    assert towers == {"img", "llm"}
    with pytest.raises(ValueError, match="stage=3: expected 1 or 2"):
        quickstart_config.get_config("stage=3")


def test_configs_take_a_data_dir_everywhere():
    stages = [(quickstart_config, f",stage={stage}") for stage in (1, 2)]
    for module, stage in (*stages, (tiny_base, "")):
        config = module.get_config("data_dir=/some/where,eval=validate" + stage)
        section, loss = config.evals.values()
        assert loss.type == "perplexity" and loss.data == section.data
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


def _tiny_configs():
    configs = [quickstart_config.get_config(f"stage={s},epochs=0.5,size=8") for s in (1, 2)]
    for config in configs:
        config.lock()  # as one that comes from a flag
    return configs


@pytest.mark.slow
def test_quickstart_runs_goes_on_and_refuses_other_settings(tmp_path, capsys):
    sizes = (20, 4, 6)
    results = quickstart.run(*_tiny_configs(), tmp_path, num_images=sizes)
    out = capsys.readouterr().out
    assert len(results) == 5 and all(m["n"] > 20 for m in results.values())
    table = (tmp_path / "table.md").read_text()
    assert table in out and table.count("\n") == 7
    # Every path that it names is there.
    listed = re.findall(r"^\S.{21} (\S+)$", out, flags=re.M)
    listed = [p for p in listed if p.startswith(str(tmp_path))]
    assert len(listed) == 8 and all(os.path.exists(p) for p in listed)
    rows = [json.loads(s) for s in open(next(p for p in listed if p.endswith(".jsonl")))]
    last = results["after stage 2 (LoRA in both towers)"]
    assert len(rows) == last["n"] and PREDICTION_KEYS <= rows[0].keys()
    # Stage 2 starts from stage 1, whose weights it leaves as they are.
    base, first, second = (
        flatten_tree(checkpoints.load_params(p))
        for p in (tiny_base.BASE, str(tmp_path / "stage1"), str(tmp_path / "stage2"))
    )
    assert {n for n in base if (base[n] != first[n]).any()} == {"img/head/kernel", "img/head/bias"}
    assert all((first[n] == second[n]).all() for n in first) and len(second) > len(first)

    # A second run trains and evaluates nothing, and says the same.
    again = quickstart.run(*_tiny_configs(), tmp_path, num_images=sizes)
    assert again == results
    assert "loss" not in capsys.readouterr().out
    for stage in (0, 1):
        configs = _tiny_configs()
        configs[stage].lr = 1e-5
        with pytest.raises(ValueError, match=f"stage{stage + 1} holds.*other settings.*--overwr"):
            quickstart.run(*configs, tmp_path, num_images=sizes)


def test_the_commands_it_names_have_the_configs_it_runs(tmp_path):
    used = [quickstart_config.get_config(f"stage={stage}") for stage in (1, 2)]
    quickstart.place(*used, tmp_path)
    for stage, config in enumerate(used, 1):
        file, _, argument = quickstart.config_argument(stage, tmp_path).partition(":")
        assert file == "configs/quickstart.py"
        named = quickstart_config.get_config(argument)
        assert config_files.to_json(named) == config_files.to_json(config)


def test_help_says_what_it_is():
    command = [sys.executable, "-m", "tools.quickstart", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "python -m tools.quickstart" in done.stdout and "--overwrite" in done.stdout
    assert "--stage1" in done.stdout and "--stage2" in done.stdout
