"""Each stage 2 config trains and evaluates on data in the layouts of its sets, with a tiny model.

The data are drawn by the sets' own `fake` modules in the layouts of the releases; with
PALIGEMMA_MED_REAL_DATA, MedPix 2.0 is the real one.
"""

import importlib
import json
import os

import pytest

from configs import common, common_3b
from data_prep import build
from data_prep.datasets.medpix2 import fake as medpix_fake
from data_prep.datasets.pmc_vqa import fake as pmc_fake
from data_prep.datasets.roco import fake as roco_fake
from paligemma_med import checkpoints, evaluate, train
from paligemma_med.config import files as config_files
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from tests import tiny

pytestmark = pytest.mark.slow

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]
RUNS = {
    "rocov2": ("stage2_rocov2", ""),
    "roco_v1": ("stage2_rocov2", "version=v1,lora=script"),
    "medpix2": ("stage2_medpix2", "lora=draft,norm=token"),
    "mixture": ("stage2_rocov2_medpix2", "medpix=0.3"),
    "pmc_vqa": ("stage2_pmc_vqa", "lora=figure"),
    "pmc_vqa_open": ("stage2_pmc_vqa", "version=v2_open,lora=llm"),
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS folder with every set that stage 2 trains on."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("tfds")

    def made(name, folder, config, **options):
        build.build(name, manual_dir=folder, data_dir=out, config=config, options=options)

    made("rocov2", roco_fake.write_v2(raw / "v2"), "qa", qa=str(roco_fake.write_qa(raw / "2.jsonl")))
    qa = str(roco_fake.write_qa(raw / "1.jsonl", v2=False))
    made("roco_v1", roco_fake.write_v1(raw / "v1"), "qa", qa=qa)
    real = os.environ.get("PALIGEMMA_MED_REAL_DATA")
    if real:
        qa = os.path.join(real, "medm", "qa_pairs_generated_all.json")
        folder = os.path.join(real, "medpix2")
        made("medpix2", folder, "qa", qa=qa, allow_missing_images=True)
    else:
        qa = str(medpix_fake.write_qa(raw / "medpix.jsonl"))
        made("medpix2", medpix_fake.write(raw / "medpix2"), "qa", qa=qa)
    for version, config in (("v1", "v1"), ("v2", "v2_open")):
        made("pmc_vqa", pmc_fake.write(raw / f"pmc_{version}", version), config)
    return str(out)


@pytest.fixture(scope="module")
def stage1(tiny_data, tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("stage1") / "w")
    train.train(tiny.config(tiny_data, schedule=HEAD, total_steps=1, evals={}), folder)
    return folder


def small(c, res, base):
    """In place of PaliGemma-3B."""
    del res, base
    c.res, c.tokenizer, c.model = tiny.RES, "tiny", tiny.MODEL


@pytest.mark.parametrize("run", RUNS)
def test_stage2_runs_from_end_to_end(run, data_dir, stage1, tmp_path, monkeypatch):
    monkeypatch.setattr(common_3b, "model", small)
    monkeypatch.setattr(common, "GEMMA", "tiny")
    name, arg = RUNS[run]
    arg = f"{arg},stage1={stage1},data_dir={data_dir},micro=8,accum=2,epochs=2,lr=1e-3".lstrip(",")
    c = importlib.import_module(f"configs.{name}").get_config(arg)
    c.input.num_workers, c.log_training_steps = 0, 1
    folder = str(tmp_path / "w")
    results = train.train(c.copy_and_resolve_references(), folder)
    assert set(results) == set(c.evals)
    for key, metrics in results.items():
        assert metrics["n"] > 0, key
        if c.evals[key].type == "perplexity":
            assert metrics["avg"] > 0 and metrics["tokens"] >= metrics["n"]
            continue
        with open(os.path.join(folder, "eval", key, "predictions.jsonl"), encoding="utf-8") as f:
            rows = [json.loads(line) for line in f]
        assert all("answer" in r["prompt"] and r["answer"] for r in rows)
    with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
        steps = [json.loads(line) for line in f]
    losses = [row["training_loss"] for row in steps]
    assert losses[-1] < losses[0]
    if run == "mixture":
        # None in the first third, then more and more.
        epochs = [row["epochs_of_medpix2"] for row in steps]
        assert epochs[0] == 0 < epochs[-1] and all(row["epochs_of_rocov2"] for row in steps)
    params = flatten_tree(checkpoints.load_params(folder))
    start = flatten_tree(checkpoints.load_params(stage1))
    assert all((params[n] == x).all() for n, x in start.items())
    assert any(lora.is_factor(n) for n in params)
    again = config_files.from_json(checkpoints.workdir.read_config(folder))
    assert evaluate.evaluate(again, folder, str(tmp_path / "e")) == results
