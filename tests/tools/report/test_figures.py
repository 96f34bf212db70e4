"""tools.report: its figures are those of the rows, and what does not follow from them is said."""

import json
import math

import pytest

from paligemma_med.metrics import scoring, tables
from tests.tools.report.reports import edit, report, row, rows, save, table, warnings
from tools.report import (
    evaluations,
    figures,
    sections,
)

# --- Figures ---


def test_tables_show_what_the_rows_say(tmp_path):
    save(tmp_path / "a", rows())
    made, markdown, page, files = report(tmp_path / "a")
    assert not warnings(made)
    cells = table(made, "5 answers a question, temperature 1")
    # 8 of 12 right in every run, so ± 0; the majority never; the interval is clustered Wilson's.
    low, high = (100 * scoring.summarise(rows())[f"model/overall/acc_mean_{x}"] for x in ("low", "high"))
    assert cells["overall"]["model"] == f"66.7 ± 0.0 ({low:.1f}–{high:.1f})"
    assert cells["overall"]["majority answer"].startswith("0.0 (")
    assert cells["overall"]["n"] == "12"
    # 1, 5, 7, 11 of the odd ones are right.
    assert cells["CLOSED"]["model"].startswith("66.7 ± 0.0 (")
    assert cells["CLOSED"]["n"] == "6"
    against = table(made, "The model against its controls")
    assert against["majority answer"]["gain, points (95 %)"].startswith("+66.7 (")
    assert against["majority answer"]["only this right"] == "8"
    # 2 · (1/2)^8: McNemar's exact p.
    assert against["majority answer"]["p, McNemar"] == "0.008"
    assert against["images shuffled"]["gain, points (95 %)"].startswith("+0.0 (")
    assert "8 of 12" not in markdown and "66.7" in markdown and "66.7" in page
    assert len(files) == 2 and all(f"figures/{name}" in markdown for name in files)


def test_figures_of_several_runs_are_means_with_clustered_intervals():
    made = [row(0, ["yes", "no"]), row(1, ["yes", "yes"]), row(2, ["no", "no"])]
    metrics = scoring.summarise(made)
    value, sd, low, high = tables.value_of(metrics, "model", "overall")
    assert value == pytest.approx(0.5) and sd == pytest.approx(math.sqrt(2) / 6)
    assert low == metrics["model/overall/acc_mean_low"]
    single = scoring.summarise([row(i, ["yes"]) for i in range(3)])
    assert tables.value_of(single, "model", "overall")[2] == (single["model/overall/acc_cluster_low"])
    assert tables.as_text(single, "echo", "overall") == "–"
    assert set(figures.names(single)) == {"acc", "acc_strict", "acc_set"}
    assert {"nonrobust", "acc_penalised_item"} < set(figures.names(metrics))


def test_multiple_choice_is_told_by_its_letters(tmp_path):
    choices = dict(choices=["CT", "MRI", "X-ray", "PET"], answer_letter="B")
    made = [
        # By exact match all but the first would be wrong.
        row(0, ["B"] * 3, "B", **choices),
        row(1, ["B: MRI", "(b)", "The answer is B"], "B", **choices),
        row(2, ["A", "C: X-ray", "B"], "B", **choices),
        row(3, ["A or B", "A", "A"], "B", **choices),
    ]
    folder = save(tmp_path / "a", made, name="pmc", data="pmc_vqa/v1", protocol="multiple_choice")
    sections_ = report(tmp_path / "a")[0]
    assert not warnings(sections_)
    # Right: all three of 0 and 1, one of 2.
    cells = table(sections_, "3 answers a question, temperature 1")
    assert cells["overall"]["model"].startswith("58.3 ± 14.4 (")
    assert table(sections_, "Table 1")["PMC-VQA (Short)"]["a: model"].startswith("58.3 ± 14.4 (")
    assert table(sections_, "Table 1")["PMC-VQA (Short)"]["a: model"].endswith(", by letter")
    (e,) = evaluations.load_all([folder])
    assert [r["question_id"] for r in sections.worst(e, 9)] == ["q3", "q2"]
    # Three letters; none and A. "B: MRI" and "(b)" are no different answers.
    assert [r["question_id"] for r in sections.least_robust(e, 9)] == ["q2", "q3"]
    by_text = row(0, ["it is MRI", "CT"], "MRI", **choices)
    assert figures.rule_of([by_text]) == "acc_text"
    assert figures.hits(by_text, "acc_text") == [True, False]


# --- Metrics that don't follow ---


def test_a_metric_that_does_not_follow_is_said_loudly(tmp_path):
    folder = save(tmp_path / "a", rows())
    edit(folder / "metrics.json", lambda m: m.update({"model/overall/acc": 0.9}))
    made, markdown, page, _ = report(tmp_path / "a")
    (text, again) = warnings(made)
    assert "metrics.json does NOT follow from predictions.jsonl" in text
    assert "model/overall/acc is 0.9, from the predictions 0.66" in text and text[-20:] in again
    assert "NOT follow" in markdown and 'class="warning"' in page and "NOT follow" in page
    # What is shown is still what the predictions say.
    assert table(made, "5 answers")["overall"]["model"].startswith("66.7")


def test_a_mark_that_does_not_follow_from_its_answer_is_said(tmp_path):
    changed = rows()
    changed[3]["correct"] = True
    save(tmp_path / "a", changed)
    made, *_ = report(tmp_path / "a")
    assert "marks in predictions.jsonl do NOT follow from its answers: question q3 (model)" in (warnings(made)[0])


def test_other_intervals_and_unknown_figures_and_hashes_are_told_apart(tmp_path):
    folder = save(tmp_path / "a", rows())

    def change(m):
        m["model/overall/acc_low"] += 0.01
        m["model/overall/invented"] = 1.0
        m["truncated"] = 3  # predictions don't tell
        m["about"]["prompt_hash"] = "0" * 64

    edit(folder / "metrics.json", change)
    made, *_ = report(tmp_path / "a")
    said = " ".join(warnings(made))
    assert "does NOT follow" not in said and "truncated" not in said
    assert "intervals in metrics.json differ" in said
    assert "can't be made from predictions: model/overall/invented" in said
    assert "the prompt_hash in metrics.json is NOT that of predictions.jsonl" in said


def test_files_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="has no eval/.*expected a workdir"):
        evaluations.load_all([tmp_path])
    folder = save(tmp_path / "a", rows())
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    broken = json.loads(lines[1])
    del broken["prompt"]
    (folder / "predictions.jsonl").write_text("\n".join([lines[0], json.dumps(broken)]) + "\n")
    with pytest.raises(ValueError, match="line 2: has no 'prompt'"):
        evaluations.load_all([tmp_path / "a"])
    broken = json.loads(lines[1]) | {"predictions": ["yes"]}
    (folder / "predictions.jsonl").write_text("\n".join([lines[0], json.dumps(broken)]) + "\n")
    with pytest.raises(ValueError, match="line 2: 1 predictions; expected 5"):
        evaluations.load_all([tmp_path / "a"])
    (folder / "metrics.json").unlink()
    (folder / "predictions.jsonl").write_text("\n".join(lines) + "\n")
    assert evaluations.load_all([folder])[0].problems == ["there is no metrics.json"]
