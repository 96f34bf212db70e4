"""IoU, pointing and average precision of boxes in texts: against examples worked out by hand, and pycocotools."""

import contextlib
import io

import numpy as np
import pytest

from paligemma_med.metrics import detection, scoring, tables
from paligemma_med.pp import boxes as boxes_lib


def say(*boxes, name="liver", answer=""):
    """A text of boxes in tenths of the image."""
    return boxes_lib.to_text(np.array(boxes) / 10, [name] * len(boxes) if name and not answer else (), answer)


TWO = say([0, 0, 2, 2], [5, 5, 9, 9])


@pytest.mark.parametrize(
    "prediction, iou, pointing, equal",
    [
        (TWO, 1, 1, True),
        (say([5, 5, 9, 9], [0, 0, 2, 2]), 1, 1, True),  # the order doesn't count
        (say([0, 0, 2, 2]), 0.5, 1, False),
        (say([0, 0, 2, 2], [5, 5, 9, 9], [2, 2, 3, 3]), 2 / 3, 1, False),
        (say([0, 0, 2, 1.2], [5, 5, 9, 9]), 0.8, 1, True),
        (say([0, 0, 2, 2], [5, 5, 9, 9], name="Liver"), 1, 1, True),
        (say([0, 0, 2, 2], [5, 5, 9, 9], name="spleen"), 0, 0, False),
        (say([2, 2, 4, 4], [5, 5, 9, 9]), 0.5, 0, False),
        (TWO + " ; <loc0001>", 1, 1, False),
        ("liver", 0, 0, False),
        ("", 0, 0, False),
    ],
)
def test_one_answer(prediction, iou, pointing, equal):
    found = detection.score(prediction, TWO)
    assert found["iou"] == pytest.approx(iou, abs=0.01) and found["pointing"] == pointing
    assert detection.equal(prediction, TWO) == equal
    assert found["no_box"] == ("<loc" not in prediction) and found["malformed"] == prediction.endswith("<loc0001>")


def test_answers_with_words():
    truth = say([1, 1, 5, 5], answer="Left lung")
    assert detection.score(say([1, 1, 5, 5], answer="left lung."), truth)["words"] == 1
    assert scoring.score(say([1, 1, 5, 5], answer="left lung"), truth) == dict(acc=True, acc_strict=True, acc_set=True)
    for wrong in (say([1, 1, 5, 5], answer="right lung"), say([5, 5, 9, 9], answer="left lung"), "left lung"):
        assert not scoring.score(wrong, truth)["acc"]
    assert scoring.score("Left lung", "left lung")["acc"]


@pytest.mark.parametrize("truth, found", [("Left lung", "has no box"), ("<loc0001> x", "'<loc0001> x' in it")])
def test_truths_without_boxes(truth, found):
    with pytest.raises(ValueError, match=found):
        detection.check(truth)


def test_sizes_and_names():
    assert [detection.size_of(say([0, 0, s, s])) for s in (0.5, 1, 5)] == ["small", "medium", "large"]
    assert detection.size_of(say([0, 0, 0.5, 0.5], [1, 1, 9, 9])) == "large"
    assert detection.name_of(TWO) == "liver" and detection.name_of(say([0, 0, 1, 1], answer="Yes")) == ""


# --- Average precision ---


def test_precision_by_hand():
    """Three livers: the surer box misses, the other finds one. A recall of 1/3 at a precision of 0.5, then none."""
    truth = say([0, 0, 4, 4])
    found = detection.Matches([say([5, 5, 9, 9]), truth, "no"], [truth, truth, truth], [-0.1, -0.2, -0.05])
    ap50, ap = found.precision()
    third = 34 / 101 * 0.5  # 34 of the 101 recalls are at most 1/3
    assert (ap50, ap) == pytest.approx((third, third))
    assert found.precision([0, 1, 0])[0] == 1.0 and found.precision([1, 0, 1])[0] == 0.0
    assert np.isnan(found.precision([0, 0, 0])).all()
    # The mean over names, of which each counts the same.
    other = say([0, 0, 4, 4], name="lung")
    both = detection.Matches([truth, other, "", ""], [truth, other, other, other], [0, 0, 0, 0]).precision()[0]
    assert both == pytest.approx((1 + 34 / 101) / 2)


def random_set(seed):
    """(predictions, truths, confidences) with several boxes a question, boxes said twice, and equal confidences."""
    rng = np.random.default_rng(seed)
    names = ["liver", "left lung", "heart", "mass"][: rng.integers(1, 5)]
    predictions, truths, confidences = [], [], []
    for _ in range(rng.integers(3, 30)):
        low = rng.uniform(0, 0.6, (rng.integers(1, 4), 2))
        true = np.concatenate([low, low + rng.uniform(0.1, 0.35, low.shape)], 1)
        said = np.clip(np.concatenate([true, true]) + rng.normal(0, 0.03, (2 * len(true), 4)), 0, 1)
        said = said[(said[:, 2:] - said[:, :2] > 0.01).all(1)][: rng.integers(0, 5)]
        if seed % 3 == 0 and len(said) > 1:
            said[1] = said[0]
        name = names[rng.integers(len(names))]
        truths.append(boxes_lib.to_text(true, [name] * len(true)))
        predictions.append(boxes_lib.to_text(said, [name] * len(said)))
        confidences.append(round(float(rng.uniform(-3, 0)), 1 if seed % 2 else 6))
    return predictions, truths, confidences


def by_pycocotools(predictions, truths, confidences):
    coco, evaluation = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    names = sorted({name for text in truths for name in boxes_lib.read(text).labels})
    annotations, said = [], []
    for i, (prediction, truth, confidence) in enumerate(zip(predictions, truths, confidences)):
        for text, out in ((truth, annotations), (prediction, said)):
            found = boxes_lib.read(text)
            for name, (y0, x0, y1, x1) in zip(found.labels, found.boxes):
                box = [v * 1000 for v in (x0, y0, x1 - x0, y1 - y0)]
                more = dict(id=len(out) + 1, area=box[2] * box[3], iscrowd=0, score=confidence)
                out.append(dict(image_id=i + 1, category_id=names.index(name) + 1, bbox=box) | more)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco.COCO()
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(names)]
        images = [dict(id=i + 1, width=1000, height=1000) for i in range(len(truths))]
        truth.dataset = dict(images=images, annotations=annotations, categories=categories)
        truth.createIndex()
        made = evaluation.COCOeval(truth, truth.loadRes(said), "bbox")
        made.params.areaRng, made.params.areaRngLbl = [[0, 1e10]], ["all"]
        made.evaluate()
        made.accumulate()
    precision = made.eval["precision"][..., 0, -1]
    return [float(x[x > -1].mean()) for x in (precision[0], precision)]


@pytest.mark.parametrize("seed", range(8))
def test_precision_is_that_of_pycocotools(seed):
    found = random_set(seed)
    assert detection.Matches(*found).precision() == pytest.approx(by_pycocotools(*found), abs=1e-12)


def test_precision_of_a_part_is_that_of_its_questions_alone():
    found = random_set(5)
    times = np.random.default_rng(0).integers(0, 2, len(found[0]))
    part = [[x for x, t in zip(values, times) if t] for values in found]
    assert detection.Matches(*found).precision(times) == detection.Matches(*part).precision()


# --- Figures of an evaluation ---


def rows():
    truth = [say([0, 0, 4, 4]), say([5, 5, 9, 9]), say([0, 0, 4, 4], name="lung")]
    said = [truth[0], say([0, 0, 4, 4]), "lung"]
    out = []
    for i in range(3):
        row = dict(question_id=str(i), image_id=f"i{i // 2}", question="detect", answer=truth[i], answer_type="OPEN")
        row |= dict(predictions=[said[i]], logprobs=[-1.0 * i], mean_box_prediction=truth[0], mean_box_correct=i == 0)
        out.append(row | dict(box_name=detection.name_of(truth[i]), unfinished=0))
    return out


def test_figures_of_an_evaluation_and_their_table():
    found = scoring.summarise(rows(), "detection", groups=("box_name",))
    assert found["model/overall/iou"] == pytest.approx(1 / 3) and found["model/box_name/liver/iou"] == 0.5
    assert found["model/overall/acc"] == pytest.approx(1 / 3) and found["model/overall/no_box"] == pytest.approx(1 / 3)
    assert found["model/box_name/liver/ap50"] == pytest.approx(51 / 101)
    assert found["model/overall/ap50"] == pytest.approx(51 / 101 / 2)
    assert found["mean_box/box_name/lung/iou"] == 0.0 and found["mean_box/overall/pointing"] == pytest.approx(1 / 3)
    assert 0 <= found["model/overall/ap_low"] <= found["model/overall/ap"] <= found["model/overall/ap_high"]
    table = tables.format_table(found)
    for text in ("IoU, %", "mean box", "overall, AP50:95", "| liver", "overall, pointing"):
        assert text in table, text


def test_more_names_than_other_groups_may_have():
    many = [dict(rows()[0], question_id=str(i), box_name=f"organ {i:02}", content_type=f"t{i}") for i in range(40)]
    found = scoring.summarise(many, "detection", groups=("box_name", "content_type"))
    assert found["n/box_name/organ 39"] == 1 and "n/content_type/t0" not in found
