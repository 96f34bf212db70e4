"""Other programs' protocols on cases worked by hand; test_peers_code.py compares with their code."""

import math

import numpy as np
import pytest

from paligemma_med.metrics import peers, scoring, stats, tables

NAN = pytest.approx(math.nan, nan_ok=True)


def row(answer, said, kind="OPEN", i=0):
    text = said if isinstance(said, list) else [said]
    return dict(question_id=f"q{i}", image_id=f"i{i // 2}", answer=answer, answer_type=kind, predictions=text)


@pytest.mark.parametrize(
    ("text", "form"),
    [
        ("X-Ray", "xray"),
        ("MRI (T2) scan.", "mri scan"),
        ("左肺，右肺（下）", "左肺 右肺"),
        ("TRUE", "yes"),
        ("没有", "no"),
        ("正常", "yes"),  # "normal", which is no yes
        ("Yes, it is", "yes it is"),  # only whole answers are folded
        ("an x ray", "an x ray"),
    ],
)
def test_lmms_eval_form(text, form):
    assert peers.lmms_eval_form(text) == form


def test_medevalkit():
    closed = dict(is_open=False)
    assert peers.medevalkit("Yes, it is.", "yes", **closed) == (True, None)
    assert peers.medevalkit("Yes, it is.", "Yes", **closed) == (False, None)  # as SLAKE writes it
    assert peers.medevalkit("It is normal.", "no", **closed) == (True, None)
    assert peers.medevalkit("yes and no", "no", **closed) == (False, None)
    assert peers.medevalkit("The answer is:\nLeft.", "left", **closed) == (False, None)  # ":" stays
    assert peers.medevalkit("so \\boxed{\\text{a} Left}", "\\text{a} left", **closed) == (True, None)
    assert peers.medevalkit("left lung.", "left lung", is_open=True) == (False, (0.5, 0.5, 0.5))
    right, overlap = peers.medevalkit("the left lung left", "Left lung", is_open=True)
    assert not right and overlap == pytest.approx((4 / 5, 2 / 3, 1.0))
    # SLAKE by answer type, VQA-RAD by what the truth is.
    assert peers.score(row("Yes", "yes it is", "CLOSED"), "yes it is", "medevalkit_slake")["medevalkit_slake"] is False
    assert peers.score(row("Yes", "yes it is", "OPEN"), "yes it is", "medevalkit_vqa_rad")["medevalkit_rad"] is True


def test_multimedeval():
    assert peers.multimedeval("It is not there", "No")["multimedeval_closed"]
    assert not peers.multimedeval("It is there", "no")["multimedeval_closed"]
    found = peers.multimedeval("the left upper lung", "Left lung, upper lobe")
    assert found["multimedeval_open"] and found["multimedeval_open_recall"] == 0.75
    assert found["multimedeval_closed"] == NAN
    assert not peers.multimedeval("left", "left lung")["multimedeval_open"]


def test_pefomed_form_and_medgemma():
    assert peers.pefomed_form("An X-ray, dont know") == "xray don't know"
    assert peers.pefomed_form("none") == peers.pefomed_form("zero") == "0"
    found = peers.score(row("Yes", "yes."), "yes.", "medgemma")
    assert found == dict(medgemma_f1=1.0, medgemma_closed=1.0)
    assert peers.score(row("left lung", "left"), "left", "medgemma")["medgemma_closed"] == NAN


def test_figures_are_of_the_questions_that_they_are_about():
    rows = [
        row("yes", ["yes", "no"], "CLOSED", 0),
        row("no", ["know", "no"], "CLOSED", 1),
        row("left lung", ["lung", "left lung"], "OPEN", 2),
        row("left", ["right", "left"], "OPEN", 3),
        row("liver", ["liver", "liver"], "OPEN", 4),
    ]
    found = scoring.summarise(rows, "multimedeval")
    assert found["model/overall/multimedeval_closed"] == 0.5
    assert found["model/overall/multimedeval_open_recall"] == pytest.approx(0.5)
    assert found["model/overall/multimedeval_open"] == pytest.approx(1 / 3)
    assert found["model/overall/multimedeval_open_mean"] == pytest.approx(2 / 3)
    assert found["model/overall/acc"] == 2 / 5  # ours is always there
    assert "model/answer_type/CLOSED/multimedeval_open" not in found
    low, high = stats.wilson_clustered([1, 0], ["i0", "i0"])
    assert [found[f"model/overall/multimedeval_closed_{end}"] for end in ("low", "high")] == [low, high]
    # The interval of a mean of some questions is that of them alone, in whatever draws have any.
    ends = [found[f"model/overall/multimedeval_open_recall_{end}"] for end in ("low", "high")]
    values, weights = np.array([0, 0, 0.5, 0, 1.0]), np.array([0, 0, 1.0, 1, 1])
    assert ends == pytest.approx(stats.bootstrap(values, ["i0", "i0", "i1", "i1", "i2"], weights=weights), abs=1e-12)
    assert "MultiMedEval, closed" in tables.format_table(found)


def test_all_at_once_are_the_same_as_each():
    rows = [row("Yes", "正常", "CLOSED", 0), row("left lung", "the left lung", "OPEN", 1)]
    everything = scoring.summarise(rows, "peers")
    for name in peers.PEERS:
        alone = scoring.summarise(rows, name)
        assert {k: everything[k] for k in alone} == pytest.approx(alone)
    assert set(peers.TITLES) <= {name.split("/")[-1] for name in everything}
