"""Model cards: in exports of runs; figures with controls; names from outside stay texts."""

import json
import re

import numpy as np

from paligemma_med.checkpoints import hf, npz, workdir
from tests.models import hf as reference
from tools import model_card
from tools.convert_checkpoint import convert

HOSTILE = "a|b\n# <script>x</script> [c](http://d) `e` ![f](g)"


def make_run(folder, **config):
    """A workdir with a checkpoint of nothing much and one evaluation."""
    (folder / "eval" / "slake").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    metrics = {"n": 4, "images": 2, f"n/modality/{HOSTILE}": 4}
    for who, x in dict(model=0.75, majority=0.25).items():
        for group in ("overall", f"modality/{HOSTILE}"):
            key = f"{who}/{group}/acc"
            metrics |= {key: x, f"{key}_cluster_low": x - 0.25, f"{key}_cluster_high": x + 0.25}
    about = dict(split=HOSTILE, fingerprint="12ab", command=HOSTILE, checkpoint="out/run@5")
    (folder / "eval" / "slake" / "metrics.json").write_text(json.dumps({**metrics, "about": about}))
    with workdir.Checkpoints(folder) as saved:
        saved.save(5, {"img/head/bias": np.zeros(2, np.float32)}, {})
    return folder


def test_recipe_and_figures_with_controls_and_hostile_names(tmp_path, capsys):
    data = dict(data=[dict(name="slake", split="train"), dict(name=HOSTILE, split="x")], batch_size=8)
    config = dict(model_init="base.npz", lr=0.004, lora=[[".*", dict(rank=2)]], input=data, tokenizer=HOSTILE)
    run = make_run(tmp_path / "run", **config)
    (run / "eval" / "broken").mkdir()
    (run / "eval" / "broken" / "metrics.json").write_text("{")
    card = model_card.make(run, "peft")
    assert card.startswith("---\nlibrary_name: peft\n") and "Not a medical device" in card
    assert "began with: base.npz" in card and "slake train" in card and "0.004" in card and "rank=2" in card
    assert "75.0 (50.0–100.0)" in card and "25.0 (0.0–50.0)" in card  # the model's and its control's
    assert "fingerprint: 12ab" in card and "weights: out/run@5" in card
    assert "### broken\n\nIts metrics.json can't be read." in card
    assert "broken/metrics.json is not in the model card" in capsys.readouterr().err
    assert not re.search(r"(?<!\\)(<script|\]\(http|`e|!\[)", card) and "\n# <" not in card
    for block in re.findall(r"(?:^\|.*\n)+", card, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_an_export_of_a_run_has_its_card(tmp_path):
    case, _, _, params, _ = reference.reference("mqa")
    base, run = tmp_path / "base.npz", tmp_path / "run"
    npz.save_npz(base, params)
    model = dict(img=dict(variant=None, **case["img"]), llm=dict(variant=None, **case["llm"]))
    run.mkdir()
    (run / "config.json").write_text(json.dumps(dict(model=model, model_init=str(base))))
    with workdir.Checkpoints(run) as saved:
        saved.save(5, {"img/head/bias": np.asarray(params["img"]["head"]["bias"]) + 1}, {})
    convert(str(run), tmp_path / "w", "hf")
    assert "The run's folder has no evaluation." in (tmp_path / "w/README.md").read_text()
    assert hf.open_hf(tmp_path / "w")
    convert(base, tmp_path / "plain", "hf")  # of which nothing is known
    assert not (tmp_path / "plain/README.md").exists()
