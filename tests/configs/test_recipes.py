"""Each stage of PeFoMed, MedGemma and the ablation of towers at the tiny size: data in the layout of the releases, few
steps, an evaluation, the table of a report, and an explain page."""

import importlib
import json

import numpy as np
import pytest

from data_prep.datasets.pmc_vqa import fake as pmc_fake
from data_prep.datasets.roco import fake as roco_fake
from paligemma_med import evaluate, explain, train
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.explain import files as explain_files
from paligemma_med.input_pipeline import open_source
from paligemma_med.pp import rows as rows_lib
from tests import tiny
from tests.data_prep import made
from tests.data_prep.datasets.imageclef_caption import test_imageclef_caption as clef
from tests.data_prep.datasets.iu_xray import test_iu_xray as iu_xray
from tests.data_prep.datasets.medicat import test_medicat as medicat
from tests.data_prep.datasets.mimic_cxr import test_mimic_cxr as mimic
from tests.data_prep.datasets.vqa_rad import test_vqa_rad as vqa_rad
from tools.report import __main__ as report

pytestmark = pytest.mark.slow

# Each goes on from the one before.
STAGES = {
    "pefomed": ["stage=1", "data=vqa_rad/public", "task=report"],
    "medgemma": ["data=pmc_vqa/v1", "recipe=google,data=vqa_rad/public,version=1.0"],
    "towers": ["tower=biomedclip_224,data=phantom", "tower=biomedclip_224,stage=2,data=phantom"],
}
CONFIGS = dict(pefomed="pefomed", medgemma="medgemma_4b", towers="vision_ablation")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """A TFDS folder with every set that they train on."""
    raw, out = tmp_path_factory.mktemp("raw"), tmp_path_factory.mktemp("tfds")
    tiny.build_data(out)
    rad = vqa_rad.Folder(raw / "rad")
    rad.public()
    lines = [medicat.line(a, f) for a in range(12) for f in (1, 2)]
    for name, folder, config, options in (
        ("roco_v1", roco_fake.write_v1(raw / "roco"), "caption", {}),
        ("imageclef_caption", clef.release(raw / "clef"), "caption", {}),
        ("medicat", medicat.write(raw / "medicat", lines), "caption", dict(validate_fraction=0.3, test_fraction=0.1)),
        ("mimic_cxr", mimic.release(raw / "mimic"), None, {}),
        ("iu_xray", iu_xray.r2gen(raw / "iu"), "r2gen", {}),
        ("vqa_rad", rad.root, "public", {}),
        ("pmc_vqa", pmc_fake.write(raw / "pmc", "v1"), "v1", {}),
    ):
        made.built(name, folder, out, config, **options)
    return str(out)


@pytest.mark.parametrize("system", STAGES)
def test_every_stage_goes_from_data_to_a_page(system, data_dir, tmp_path):
    get_config = importlib.import_module(f"configs.{CONFIGS[system]}").get_config
    init = ""
    for i, arg in enumerate(STAGES[system]):
        folder = str(tmp_path / f"stage{i}")
        where = f"data_dir={data_dir},steps=3,micro=8,accum=1,lr=1e-2,max_new_tokens=4"
        c = get_config(f"{arg},tiny,{where}" + (f",init={init}" if init else ""))
        c.log_training_steps = 1
        train.train(c, folder)
        rows = [json.loads(line) for line in open(f"{folder}/metrics.jsonl", encoding="utf-8")]
        losses = [row["training_loss"] for row in rows]
        assert len(losses) == 3 and np.isfinite(losses).all()

        again = config_files.from_json(workdirs.read_config(folder))
        results = evaluate.evaluate(again, folder, folder)
        assert {*results} == {*c.evals} and all(found["n"] >= 1 for found in results.values())
        report.write(system, report.make([folder], data_dir=data_dir), str(tmp_path / f"report{i}"))
        page = (tmp_path / f"report{i}" / "report.md").read_text(encoding="utf-8").replace("\\", "")
        assert all(name in page for name in c.evals)

        init = folder
        name, section = next(iter(c.evals.items()))
        row = next(iter(open_source(section.data.to_dict())))
        question = row["question"] if isinstance(row["question"], str) else row["question"].decode()
        choices = {k: str(row[k]) for k in rows_lib.CHOICES if k in row}
        kw = dict(title=name, choices=choices, max_new_tokens=2, methods=("rollout",))
        page, _ = explain.explain(explain.load(again, folder), row["image"], question, **kw)
        explain_files.write_page(page, tmp_path / f"{i}.html")
        assert (tmp_path / f"{i}.html").stat().st_size > 10_000
