"""tools.report: two runs side by side, questions, confidence."""

import pytest

from tests.tools.report.reports import report, row, rows, save, table, warnings
from tools.report import (
    evaluations,
    pictures,
    sections,
)

# --- Two runs ---


def test_two_runs_are_compared_question_by_question(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(wrong=lambda i: i in (0, 1)))
    made, *_ = report(tmp_path / "a", tmp_path / "b")
    cells = table(made, "Paired on the same questions")["overall"]
    # a is wrong at 0, 3, 6, 9; b at 0, 1.
    assert (cells["a"], cells["b"]) == ("66.7", "83.3")
    assert cells["gain, points (95 %)"].startswith("+16.7 (")
    assert (cells["only this right"], cells["only the other"]) == ("3", "1")
    assert cells["p, McNemar"] == "0.625"  # 2 · (1 + 4) / 2^4
    other, *_ = report(tmp_path / "b", tmp_path / "a", compare=(tmp_path / "b", tmp_path / "a"))
    assert table(other, "Paired on the same")["overall"]["gain, points (95 %)"].startswith("-16.7")
    with pytest.raises(ValueError, match="--compare names"):
        report(tmp_path / "a", compare=(tmp_path / "a", tmp_path / "c"))


def test_two_evaluations_of_other_names_are_compared_when_asked_for(tmp_path):
    one = save(tmp_path / "a", rows(), name="slake_test[:12]")
    two = save(tmp_path / "b", rows(wrong=lambda i: i in (0, 1)))
    made, *_ = report(one, two, compare=(one, two))
    assert table(made, "Paired on the same questions")["overall"]["b"] == "83.3"
    save(tmp_path / "b", rows(), name="slake_validate")
    with pytest.raises(ValueError, match="no evaluation of one name.*slake_validate"):
        report(tmp_path / "a", tmp_path / "b", compare=(tmp_path / "a", tmp_path / "b"))


def test_runs_that_were_asked_in_other_ways_are_told_apart(tmp_path):
    save(tmp_path / "a", rows(samples=1))
    save(tmp_path / "b", [r | dict(prompt=f"Q: {r['question']}") for r in rows(samples=5)])
    made, markdown, *_ = report(tmp_path / "a", tmp_path / "b")
    (text,) = warnings(made)
    assert "a, 1 answer a question, temperature 1; b, 5 answers a question, temperature 1" in text
    assert "Their prompts differ." in markdown
    save(tmp_path / "b", rows(samples=1), protocol="open")
    made, markdown, *_ = report(tmp_path / "a", tmp_path / "b")
    assert not warnings(made) and "prompts differ" not in markdown


def test_different_questions_are_not_compared(tmp_path):
    save(tmp_path / "a", rows())
    save(tmp_path / "b", rows(9))
    assert "Not the same split: 12 and 9 questions, of which 9" in " ".join(
        warnings(report(tmp_path / "a", tmp_path / "b")[0])
    )
    changed = rows()
    changed[2] = row(2, ["yes"] * 5, "maybe")
    for other in changed:
        for key in [k for k in other if k.startswith(("majority", "shuffled"))]:
            del other[key]
    save(tmp_path / "b", changed)
    made, *_ = report(tmp_path / "a", tmp_path / "b")
    assert "1 other questions or answers" in " ".join(warnings(made))


# --- Questions, confidence ---


def test_worst_and_least_robust_questions_come_first(tmp_path):
    made = [
        row(0, ["yes"] * 5),
        row(1, ["no"] * 5),
        row(2, ["no", "yes", "no", "no", "no"]),
        row(3, ["a", "b", "c", "yes", "yes"]),
        row(4, ["no"] * 5) | {"logprobs": [-0.01] * 5},
        row(5, ["yes", "a", "yes", "yes", "yes"]),
    ]
    save(tmp_path / "a", made)
    (e,) = evaluations.load_all([tmp_path / "a"])
    # Wrong in all samples, the surer first; right in the first sample is no worst answer.
    assert [r["question_id"] for r in sections.worst(e, 9)] == ["q4", "q1", "q2", "q3"]
    assert [r["question_id"] for r in sections.least_robust(e, 9)] == ["q3", "q2", "q5"]
    assert len(sections.worst(e, 2)) == 2


def test_bins_hold_their_upper_end_and_their_mean():
    found = sections.bins([0.2, 0.20000000000000004, 0.15, 1.0, 0.0], [1, 0, 1, 1, 0])
    assert [b[4] for b in found] == [1, 3, 1]
    assert found[1][0] == pytest.approx(0.55 / 3) and found[1][1] == pytest.approx(2 / 3)
    assert found[-1][:2] == (1.0, 1.0)
    # Of perfectly calibrated answers the distance is 0.
    assert sections._ece(sections.bins([0.5] * 4, [1, 0, 1, 0])) == 0
    assert sections._ece(sections.bins([0.9] * 2, [0, 0])) == pytest.approx(0.9)


def test_images_come_from_the_built_data_set(tiny_data, tmp_path):
    from paligemma_med import input_pipeline

    data = dict(name="phantom", split="validate")
    source = input_pipeline.open_source(data | dict(data_dir=str(tiny_data)))
    lookup = pictures.Lookup(data, tiny_data)
    assert lookup.note == ""
    assert lookup.image(source[1]["question_id"])[:2] == b"\xff\xd8"
    assert lookup.image("none such") is None
    assert lookup.column("answer_type")[source[1]["question_id"]] == source[1]["answer_type"]
    assert lookup.column("none such") == {}
    assert "not built" in pictures.Lookup(data, tmp_path).note
    assert pictures.Lookup({}).note
