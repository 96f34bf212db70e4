"""Each stage of systems 002 and 003 at the tiny size: data in the layouts of the releases, few steps from the stage
before, the evaluations of its config with their table, and an explain page.

With PALIGEMMA_MED_REAL_DATA, OmniMedVQA and SLAKE are the real ones.
"""

import functools
import importlib
import json
import os
import pathlib

import numpy as np
import pytest

from data_prep import build
from data_prep.datasets.pmc_vqa import fake as pmc_fake
from paligemma_med import checkpoints, evaluate, explain, train
from paligemma_med.config import files as config_files
from paligemma_med.explain import files as explain_files
from paligemma_med.input_pipeline import open_source
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree
from tests.configs.test_systems import random_weights
from tests.data_prep import made
from tests.data_prep.conftest import SlakeFolder
from tests.data_prep.datasets.omnimedvqa import test_omnimedvqa as omnimedvqa
from tests.data_prep.datasets.vqa_rad import test_vqa_rad as vqa_rad
from tools.report import __main__ as report

pytestmark = pytest.mark.slow

# Stage → (config, its argument, the stage before, evaluations).
STAGES = {
    "002 stage 1": ("llama_clip", "stage=1", None, {"omnimedvqa_validate", "omnimedvqa_validate_choices"}),
    "002 stage 2": ("llama_clip", "stage=2,link=linear", "002 stage 1", {"omnimedvqa_test", "omnimedvqa_test_choices"}),
    "003 stage 1": ("bloom_qformer", "stage=1", None, {"pmc_oa_validate"}),
    "003 stage 2": ("bloom_qformer", "stage=2", "003 stage 1", {"pmc_vqa_validate"}),
    "003 stage 3, SLAKE": ("bloom_qformer", "stage=3", "003 stage 2", {"slake_test"}),
    "003 stage 3, VQA-RAD": ("bloom_qformer", "stage=3,data=vqa_rad/public", "003 stage 2", {"vqa_rad_validate"}),
}
_FIGURE = {"omnimedvqa": "recall", "pmc_oa": "cider", "pmc_vqa": "recall", "slake": "acc", "vqa_rad": "acc"}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS folder with every set that a stage is trained on."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("tfds")
    real = os.environ.get("PALIGEMMA_MED_REAL_DATA")
    omni = pathlib.Path(real, "omnimedvqa") if real else omnimedvqa.Release(raw / "omni").write()
    slake = pathlib.Path(real, "slake") if real else SlakeFolder(raw / "slake").write()
    rad = vqa_rad.Folder(raw / "rad")
    rad.public()
    shares = dict(validate_fraction=0.3, test_fraction=0.3)
    drawn = shares | dict(seed=3)  # two real images in each split
    for name, folder, config, options in (
        ("omnimedvqa", omni, "open_access", drawn),
        ("omnimedvqa", omni, "open_access_open", drawn),
        ("pmc_oa", _pmc_oa(raw / "pmc_oa"), "split_captions", shares),
        ("pmc_vqa", pmc_fake.write(raw / "pmc_vqa", "v1"), "v1_open", dict(validate_fraction=0.1)),
        ("slake", slake, "en", {}),
        ("vqa_rad", rad.root, "public", {}),
    ):
        build.build(name, manual_dir=folder, data_dir=out, config=config, options=options)
    return str(out)


def _pmc_oa(root):
    rows = [dict(image=f"PMC{100 + a}_Fig1_{k}.jpg", caption=f"Shadow {k} of {a}.") for a in range(12) for k in (0, 1)]
    for i, row in enumerate(rows):
        made.write(root / "images" / row["image"], made.image(i))
    made.write(root / "pmc_oa.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Function: stage → (config, workdir) of three steps, which begin where the stage before ended."""

    @functools.cache
    def stage(which):
        name, arg, before, _ = STAGES[which]
        folder = str(tmp_path_factory.mktemp("runs") / which)
        init = stage(before)[1] if before else f"{folder}.npz"
        c = _config(name, f"{arg},init={init}", data_dir)
        if not before:
            random_weights(c, init)
        evals, c.evals = c.evals, {}
        train.train(c, folder)
        c.evals = evals
        return c, folder

    return stage


def _config(name, arg, data_dir):
    where = f"data_dir={data_dir},steps=3,micro=8,accum=1,lr=1e-2,max_new_tokens=4"
    c = importlib.import_module(f"configs.{name}").get_config(f"{arg},tiny,{where}")
    c.log_training_steps = 1
    return c


@pytest.mark.parametrize("which", STAGES)
def test_a_stage_goes_from_data_to_a_page(which, trained, data_dir, tmp_path):
    name, arg, before, expected = STAGES[which]
    c, folder = trained(which)
    rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
    losses = [row["training_loss"] for row in rows]
    assert len(losses) == 3 and np.isfinite(losses).all() and losses[-1] < losses[0]
    params = flatten_tree(checkpoints.load_params(folder))
    assert any(lora.is_factor(n) for n in params)
    if before:  # what this stage doesn't train is as the stage before left it
        start = flatten_tree(checkpoints.load_params(trained(before)[1]))
        assert params.keys() == start.keys()
        same = {n for n, x in start.items() if (params[n] == x).all()}
        assert any(n.endswith("embedder/input_embedding") for n in same) and len(same) < len(params)

    split = min(expected).split("_")[-1]
    asked = _config(name, f"{arg},split={split}", data_dir)
    for section in asked.evals.values():
        if section.data.name == "slake/en" and os.environ.get("PALIGEMMA_MED_REAL_DATA"):
            section.data.split += "[:12]"  # of 1,061
        if section.type == "vqa":
            section.controls = ("majority", "echo", "shuffled_images")
    assert {*asked.evals} == expected | {f"{min(expected)}_loss"}
    out = str(tmp_path / "e")
    results = evaluate.evaluate(asked, folder, out)
    assert {*results} == {*asked.evals} and all(found["n"] >= 1 for found in results.values())
    for key in expected:
        figure = "qa_score" if key.endswith("_choices") else _FIGURE[key.rpartition("_")[0]]
        assert 0 <= results[key][f"model/overall/{figure}"] <= 10
    report.write(which, report.make([out], data_dir=data_dir), str(tmp_path / "report"))
    table = (tmp_path / "report" / "report.md").read_text(encoding="utf-8").replace("\\", "")
    assert not [key for key in asked.evals if key not in table]

    row = next(iter(open_source(next(iter(asked.evals.values())).data.to_dict())))
    again = config_files.from_json(checkpoints.workdir.read_config(folder))
    question = row["question"] if isinstance(row["question"], str) else row["question"].decode()
    kw = dict(title=which, max_new_tokens=2, methods=("rollout",), num_samples=0)
    page, _ = explain.explain(explain.load(again, folder), row["image"], question, **kw)
    explain_files.write_page(page, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size > 10_000
