"""configs/slake_grounded.py from SLAKE's layout to a table of boxes: built, trained for a few steps, evaluated."""

import json

import numpy as np
import pytest

from configs import common_boxes, slake_grounded
from data_prep.build import build
from paligemma_med import train
from paligemma_med.pp import boxes as boxes_lib
from tests import tiny
from tests.data_prep.conftest import SlakeFolder


def built(folder):
    """The three sets of the config, of five images with two boxes each."""
    raw = SlakeFolder(folder / "slake")
    raw.root.mkdir()
    raw.write()
    (raw.image(2).parent / "detection.json").write_text('[{"Lung": [5, 6, 7, 8]}]')
    for config in ("en", "en_detect", "en_ground"):
        build("slake", config=config, manual_dir=raw.root, data_dir=folder)
    return folder


@pytest.mark.slow  # three kinds of questions, two programs: 14 s of processor time
def test_a_run_ends_with_a_table_of_boxes(tmp_path):
    c = slake_grounded.get_config(f"tiny,res={tiny.RES},batch=8,eval=test,data_dir={built(tmp_path)}")
    del c.total_epochs, c.ckpt_epochs
    c.total_steps = 2
    c.model = tiny.MODEL
    c.model.llm.vocab_size = common_boxes.TINY_VOCAB
    sets = ("slake_en_test", "slake_detect_test", "slake_ground_test")
    for name in sets:  # one program for all: of a few tokens
        c.evals[name].pred_kw.max_new_tokens = 5
    found = train.train(c, str(tmp_path / "w"))
    assert set(found) == {*sets, *(f"{name}_loss" for name in sets)}
    boxes = found["slake_detect_test"]
    assert boxes["n"] == 4  # a liver and a lung on two images
    for who in ("model", "mean_box", *common_boxes.DETECTION_CONTROLS[1:]):
        assert {f"{who}/overall/{key}" for key in ("iou", "pointing", "ap50", "ap", "malformed")} <= set(boxes)
        assert 0 <= boxes[f"{who}/overall/iou"] <= 1
    # made boxes lie at the same place on images of nearly the same size
    assert boxes["mean_box/overall/iou"] > 0.8 and boxes["mean_box/overall/ap50"] == 1.0
    assert boxes["mean_box/box_name/lung/pointing"] == 1.0
    rows = [json.loads(line) for line in (tmp_path / "w/eval/slake_detect_test/predictions.jsonl").open()]
    assert sorted(row["question"] for row in rows) == ["detect liver"] * 2 + ["detect lung"] * 2
    no_box = np.mean([not boxes_lib.read(row["predictions"][0]).boxes for row in rows])
    assert boxes["model/overall/no_box"] == no_box
