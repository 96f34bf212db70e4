"""Figures of judgements, worked by hand: means, intervals, agreement with people, tables."""

import csv
import json
import math
import re

import numpy as np
import pytest

from paligemma_med.judge import figures, judge
from paligemma_med.metrics import stats
from tests.judge.judge_servers import FakeJudge
from tests.judge.judging import QUICK, lines_of, row, write_rows


def test_figures_by_hand():
    """Three questions on two images, two runs."""
    rows = [row(i, ["x", "y"]) for i in range(3)]
    f = figures.summarise(lines_of([[1, 0], [1, None], [0, 0]]), rows, "binary")
    g = {k.removeprefix("model/overall/"): v for k, v in f.items() if "overall" in k}
    assert (g["n"], g["unjudged"], g["runs"]) == (6, 1, 2)
    assert g["mean"] == pytest.approx(2 / 5)
    # Runs: 2 of 3 and 0 of 2.
    assert g["sd"] == pytest.approx(math.sqrt((2 / 3 - 1 / 3) ** 2 + (1 / 3) ** 2))
    assert (g["mean_worst"], g["mean_best"]) == (2 / 6, 3 / 6)
    assert (g["count_0"], g["count_1"]) == (3, 2)
    assert (g["mean_low"], g["mean_high"]) == stats.wilson_clustered([1, 0, 1, 0, 0], ["k0", "k0", "k0", "k1", "k1"])
    assert f["model/answer_type/CLOSED/mean"] == 0.5  # q0
    assert f["model/answer_type/OPEN/mean"] == pytest.approx(1 / 3)


def test_wasm_is_the_weighted_mean():
    rows = [row(i, ["x"]) for i in range(6)]
    f = figures.summarise(lines_of([[4], [4], [3], [0], [2], [None]]), rows, "pefomed5")
    assert f["model/overall/mean"] == pytest.approx((4 + 4 + 3 + 0 + 2) / 5)
    assert [f[f"model/overall/count_{k}"] for k in range(5)] == [1, 0, 1, 1, 2]
    assert f["model/overall/mean_best"] == pytest.approx(17 / 6)
    assert "model/overall/sd" not in f


def test_a_few_verdicts_that_agree_are_not_sure():
    rows = [row(i, ["x"]) for i in range(4)]  # q0 and q1 are on one image, q2 and q3 on another
    f = figures.summarise(lines_of([[1]] * 4), rows, "binary")
    low, high = f["model/overall/mean_low"], f["model/overall/mean_high"]
    assert (low, high) == (pytest.approx(1 / (1 + 1.96**2 / 2)), 1)


def test_wasm_has_a_bootstrap_interval():
    rows = [row(i, ["x"]) for i in range(4)]
    f = figures.summarise(lines_of([[4], [1], [3], [0]]), rows, "pefomed5")
    ends = f["model/overall/mean_low"], f["model/overall/mean_high"]
    assert ends == stats.bootstrap([4, 1, 3, 0], ["k0", "k0", "k1", "k1"])


def test_nothing_judged_has_no_mean(tmp_path):
    f = figures.summarise(lines_of([[None]]), [row(0, ["x"])], "binary")
    assert math.isnan(f["model/overall/mean"]) and f["model/overall/mean_best"] == 1


def test_samples_of_an_image_do_not_narrow_the_interval():
    """The same verdict five times is one observation."""
    rng = np.random.default_rng(0)
    verdicts = [int(x) for x in rng.integers(0, 2, 60)]
    rows = [row(i, ["x"]) for i in range(60)]
    once = figures.summarise(lines_of([[v] for v in verdicts]), rows, "binary")
    often = figures.summarise(lines_of([[v] * 5 for v in verdicts]), rows, "binary")
    for name in ("mean_low", "mean_high"):
        assert often[f"model/overall/{name}"] == pytest.approx(once[f"model/overall/{name}"], 0.01)


def write_labels(path, rows):
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows(rows)
    return path


def test_agreement_by_hand(tmp_path):
    rows = [row(i, ["x", "y"]) for i in range(6)]
    judged = lines_of([[1, 0], [1, 0], [0, 0], [0, 1], [1, 1], [None, 1]])
    table = [("question_id", "label"), *zip(["q0", "q1", "q2", "q3", "q4", "q5"], "100011")]
    path = write_labels(tmp_path / "l.csv", table)
    labels = figures.read_labels(path, rows, "binary")
    found = figures.agreement(judged, labels, "binary")
    # Human 1 0 0 0 1, judge 1 1 0 0 1: 0.8 observed, 2/5·3/5 + 3/5·2/5 = 0.48 by chance.
    assert found == dict(
        n=5, unjudged=1, agree=0.8, kappa=pytest.approx((0.8 - 0.48) / 0.52), table=[[0, 0, 2], [0, 1, 1], [1, 1, 2]]
    )
    path = write_labels(tmp_path / "l.csv", [("question_id", "sample", "label"), ("q3", 1, 1)])
    assert figures.read_labels(path, rows, "binary") == {("q3", 1): 1}
    path.write_text("\ufeffquestion_id;Label\r\nq3;1\r\n", encoding="utf-8")  # a spreadsheet set to a decimal comma
    assert figures.read_labels(path, rows, "binary") == {("q3", 0): 1}
    assert figures.agreement(judged, {("q3", 1): 1}, "binary")["agree"] == 1
    assert figures.agreement(judged, {("q3", 1): 1}, "binary")["kappa"] is None  # one label alone
    assert figures.agreement(judged, {("q3", 1): 1}, "pefomed5")["kappa_quadratic"] is None
    with pytest.raises(ValueError, match="sample 5 of question 'q3'"):
        figures.agreement(judged, {("q3", 5): 1}, "binary")


@pytest.mark.parametrize(
    "table, says",
    [
        ([("question", "label"), ("q0", 1)], "no column question_id; found question, label"),
        ([("question_id", "label"), ("q9", 1)], "line 2: no question 'q9'"),
        ([("question_id", "label"), ("q0", 1), ("q1", 2)], r"line 3: label is '2'; expected"),
        ([("question_id", "label"), ("q0", "")], "label is ''"),
        ([("question_id", "label"), ("q0",)], "line 2: another number of cells"),
        ([("question_id", "label"), ("q0", 1), ("q0", 0)], "'q0' has a label already"),
        ([("question_id", "label", "sample"), ("q0", 1, "a")], "sample is 'a'"),
        ([("question_id", "label")], "has no labels"),
    ],
)
def test_mistakes_in_labels_are_named(tmp_path, table, says):
    path = write_labels(tmp_path / "l.csv", table)
    with pytest.raises(ValueError, match=says):
        figures.read_labels(path, [row(0, ["x"]), row(1, ["x"])], "binary")


def test_the_tables_are_markdown(tmp_path):
    rows = [row(i, ["lung", "no"]) for i in range(4)]
    folder = write_rows(tmp_path / "eval", rows)
    path = write_labels(tmp_path / "l.csv", [("question_id", "label"), ("q0", 1), ("q1", 0)])
    with FakeJudge() as server:
        entry = judge.judge_folder(
            folder, "binary", base_url=server.url, human=path, price_in=1.0, price_out=1.0, **QUICK
        )
    table = figures.format_table(json.loads(json.dumps(entry)))
    assert "| model, overall | 50.0 (21.5–78.5) |" in re.sub(" +", " ", table)
    assert "2 texts, 2 replies, 0 of them unusable" in table and "cost 0.00" in table
    assert "Human labels: 2 compared, 50.0 % equal, Cohen's kappa 0.000." in table


def test_a_table_without_verdicts(tmp_path):
    folder = write_rows(tmp_path / "eval", [row(0, ["lung"])])
    with FakeJudge(lambda texts: "no idea") as server:
        entry = judge.judge_folder(folder, "pefomed5", base_url=server.url, **QUICK)
    json.dumps(entry, allow_nan=False)
    table = re.sub(" +", " ", figures.format_table(entry))
    assert "| model, overall | – | – | 1 | 1 |" in table and "4 of them unusable" in table
