"""The detection evaluator: its controls, what it writes, and truths that it refuses."""

import json

import pytest

from paligemma_med.evaluation import controls
from paligemma_med.evaluators import detection
from tests.evaluators.answering import TOKENIZER, answer_with, make_inputs, question, train_row

A, B = "<loc0000><loc0000><loc0512><loc0512>", "<loc0512><loc0512><loc1023><loc1023>"
ROWS = [
    question(0, "ct", "detect liver", f"{A} liver", "OPEN"),
    question(1, "mr", "detect liver", f"{B} liver", "OPEN"),
    question(2, "mr", "detect mass", "<loc0000><loc0000><loc0040><loc0040> mass", "OPEN"),
    question(3, "xr", "ground Where is it?", f"Left {A} ; {B}", "OPEN"),
]
TRAIN = [
    train_row("0", "detect liver", "<loc0000><loc0000><loc0400><loc0512> liver"),
    train_row("1", "detect liver", "<loc0000><loc0000><loc0624><loc0512> liver"),
    train_row("2", "ground Where is it?", f"Right {A}"),
    train_row("3", "ground Where is it?", f"Left {A}"),
    train_row("4", "ground Where is it?", f"Left {A}"),
    train_row("5", "Is it normal?", "Yes"),
]


def look(prompt, pixel, sample=0):
    """Finds the liver; says nonsense of a mass, and half of the truth of the third."""
    if "liver" in prompt:
        return {0.1: f"{A} liver", 0.2: f"{B} liver"}.get(pixel, "liver")
    return "<loc0000><loc0000> mass" if "mass" in prompt else f"Left {A}"


def evaluator(rows=ROWS, **kw):
    kw = dict(inputs=list(make_inputs(rows, text_len=60)), train_data=TRAIN, pred_kw=dict(max_new_tokens=120)) | kw
    return detection.Evaluator(None, TOKENIZER, **kw)


def test_figures_controls_and_files(monkeypatch, tmp_path):
    answer_with(monkeypatch, look)
    found = evaluator(outdir=tmp_path).run({})
    assert found["model/overall/iou"] == pytest.approx((1 + 1 + 0 + 0.5) / 4, abs=0.01)
    assert found["model/box_name/liver/ap50"] == 1.0 and found["model/box_size/small/iou"] == 0.0
    assert found["model/overall/malformed"] == 0.25 and found["model/overall/words"] == 1.0
    assert found["blank_image/box_name/liver/no_box"] == 1.0
    assert found["shuffled_images/box_name/liver/iou"] < 0.5
    assert found["mean_box/box_name/liver/iou"] == pytest.approx(0.5, abs=0.01)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [r["mean_box_prediction"] for r in rows] == [
        f"{A} liver",
        f"{A} liver",
        rows[2]["mean_box_prediction"],
        f"Left {A}",
    ]
    assert rows[2]["mean_box_prediction"].endswith("> mass")
    assert [r["box_size"] for r in rows] == ["large", "large", "small", "large"]
    assert [r["box_name"] for r in rows] == ["liver", "liver", "mass", ""]


def test_truths_without_boxes_are_refused(monkeypatch):
    answer_with(monkeypatch, look)
    with pytest.raises(ValueError, match="question 'q9': the answer 'Yes' has no box"):
        evaluator([*ROWS, question(9, "ct", "Is it normal?", "Yes", "CLOSED")]).run({})


def test_mean_box_needs_boxes_in_training():
    with pytest.raises(ValueError, match="mean_box control needs train_data"):
        evaluator(train_data=None)
    with pytest.raises(ValueError, match="no answer of train_data has a box"):
        controls.mean_boxes(TRAIN[-1:])
