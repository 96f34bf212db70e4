"""Figures from rows: what counts as equal, what stands in a table, worked by hand."""

import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.metrics import answers, scoring, stats, tables, text_metrics

SENTENCES = (
    "no",
    "",
    "a mass in the left lung",
    "the left lung has a mass of 2 cm.",
    "Left lung,",
    "there is a mass in the left lung and one in the liver",
)


@pytest.mark.parametrize(
    "a, b, figures",
    [
        ("Yes", "yes", "strict acc set"),
        (" Yes\n", "yes", "strict acc set"),
        ("Yes.", "yes", "acc set"),
        ("yes !?", "Yes", "acc set"),
        ("Transverse  Plane", "transverse plane", "acc set"),
        ("Lung,Heart", "lung , heart", "acc set"),
        ("肺，心脏。", "肺、心脏", "acc set"),
        ("Heart, Lung", "Lung, Heart", "set"),
        ("Heart,Lung", "Lung, Heart.", "set"),
        ("Lung", "Lung, Heart", ""),
        ("No", "Yes", ""),
        ("the lung", "lung", ""),
        ("2", "two", ""),
        ("1.5", "15", ""),
        (".5", "5", ""),
        ("", "yes", ""),
    ],
)
def test_what_is_equal(a, b, figures):
    found = scoring.score(a, b)
    assert found == {
        f"acc{x}": f.strip("_") in figures.split() or (x == "" and "acc" in figures.split())
        for x, f in (("", "acc"), ("_strict", "strict"), ("_set", "set"))
    }
    assert found == scoring.score(b, a)


@given(st.text(), st.text())
def test_normalise_is_a_normal_form_and_figures_are_nested(a, b):
    assert answers.normalise(answers.normalise(a)) == answers.normalise(a)
    assert not re.search(r"\s\s|^\s|\s$", answers.normalise(a))
    for x, y in ((a, b), (a, a.upper()), (a, f" {a} ."), (a, a.lower())):
        found = scoring.score(x, y)
        assert found["acc_strict"] <= found["acc"] <= found["acc_set"]
    if not answers.is_empty(a):
        assert scoring.score(a, f"  {a.lower()} . ")["acc"]


# --- Figures, worked by hand ---


def row(i, answer, said, image="a", controls=(), **more):
    """Of predictions.jsonl, with what a model said: a list, one a sample."""
    out = dict(
        question_id=f"q{i}",
        question="Where?",
        answer=answer,
        answer_type="OPEN",
        image_id=image,
        image_key=image,
        predictions=said,
        **more,
    )
    for who, text in controls:
        out[f"{who}_prediction"] = text
        out |= scoring.correct(text, answer, f"{who}_")
    return out


def test_runs():
    said = [
        ["Lung", "lung.", "Heart", "lung", "lung"],  # right 4 of 5, two different
        ["left", "right", "top", "left", "left"],  # 3 of 5, three different: not robust
        ["no", "no", "no", "no", "no"],  # never
        ["yes", "no", "yes", "no", "yes"],  # 3 of 5, two different
    ]
    rows = [row(i, a, x, image=str(i // 2)) for i, (a, x) in enumerate(zip(["lung", "left", "yes", "yes"], said))]
    found = scoring.summarise(rows)
    runs = [0.75, 0.25, 0.25, 0.5, 0.75]
    assert found["model/overall/acc"] == 0.75  # of the first samples
    assert found["model/overall/acc_mean"] == pytest.approx(sum(runs) / 5)
    variance = sum((x - 0.5) ** 2 for x in runs) / 4
    assert found["model/overall/acc_sd"] == pytest.approx(math.sqrt(variance))
    assert found["model/overall/acc_strict_mean"] == pytest.approx(0.45)  # "lung." isn't
    assert found["model/overall/nonrobust"] == 0.25
    assert found["model/overall/acc_penalised_item"] == pytest.approx(7 / 20)
    assert found["model/overall/acc_penalised_total"] == pytest.approx(0.49)
    shares = [4 / 5, 3 / 5, 0, 3 / 5]
    low, high = stats.wilson_clustered(shares, "0011")
    assert found["model/overall/acc_mean_low"] == low
    assert found["model/overall/acc_mean_high"] == high
    assert found["images"] == 2
    table = tables.format_table(found)
    assert f"50.0 ± 25.0 ({100 * low:.1f}–{100 * high:.1f})" in table
    assert "| overall, non-robust " in table and "by 2 images. ±:" in table
    with pytest.raises(ValueError, match=r"questions have \[4, 5\] samples of model"):
        scoring.summarise([rows[0], row(9, "a", ["a"] * 4)])


def test_one_sample_has_no_runs():
    found = scoring.summarise([row(0, "a", ["a"]), row(1, "b", ["c"], controls=[])])
    assert found["model/overall/acc"] == 0.5
    assert not [k for k in found if k.endswith(("_mean", "_sd")) or "nonrobust" in k]


def test_questions_of_one_patient_count_together():
    rows = [row(i, "a", ["a" if i < 5 else "b"], image=str(i)) | {"patient_id": "xy"[i // 5]} for i in range(10)]
    found = scoring.summarise(rows)
    assert (found["images"], found["patients"]) == (10, 2)
    same = scoring.summarise([row(i, "a", ["a" if i < 5 else "b"], image="xy"[i // 5]) for i in range(10)])
    assert "patients" not in same
    for end in ("low", "high"):
        assert found[f"model/overall/acc_cluster_{end}"] == same[f"model/overall/acc_cluster_{end}"]


def test_questions_on_one_image_count_together():
    """Ten questions on two images, all right on one and all wrong on the other: two independent
    answers, not ten."""
    rows = [row(i, "a", ["a" if i < 5 else "b"], image="xy"[i // 5]) for i in range(10)]
    found = scoring.summarise(rows)
    assert (found["model/overall/acc_low"], found["model/overall/acc_high"]) == stats.wilson(5, 10)
    low, high = found["model/overall/acc_cluster_low"], found["model/overall/acc_cluster_high"]
    assert low < stats.wilson(1, 2)[0] and high > stats.wilson(1, 2)[1]
    alone = scoring.summarise([x | {"image_key": str(i)} for i, x in enumerate(rows)])
    assert alone["model/overall/acc_cluster_low"] == pytest.approx(stats.wilson(5, 10)[0])
    assert f"50.0 ({100 * low:.1f}–{100 * high:.1f})" in tables.format_table(found)


def test_groups_and_controls():
    controls = [("majority", "left"), ("echo", "Where?")]
    rows = [
        row(0, "left", ["left"], "a", controls, modality="CT", content_type="Position"),
        row(1, "right", ["left"], "b", controls, modality="MRI"),
        row(2, "left", ["top"], "c", controls, modality="MRI", unfinished=1, tokens_cut=0),
    ]
    rows[0] |= dict(tokens_cut=4, unfinished=2)
    assert scoring.controls_of(rows) == ("majority", "echo")
    found = scoring.summarise(rows[:1] + rows[2:])
    assert (found["truncated"], found["unfinished"]) == (1, 3)
    rows = [{k: v for k, v in x.items() if k not in ("tokens_cut", "unfinished")} for x in rows]
    found = scoring.summarise(rows)
    assert found["n/modality/MRI"] == 2 and found["n/content_type/Position"] == 1
    assert found["majority/modality/MRI/acc"] == 0.5 and found["model/modality/MRI/acc"] == 0.0
    assert found["echo/overall/acc"] == 0 and "truncated" not in found
    assert not [k for k in found if "location" in k]
    assert not [k for k in scoring.summarise(rows, groups=()) if "modality" in k]
    only = scoring.summarise(rows, controls=["echo"])
    assert "majority/overall/acc" not in only and "echo/overall/acc" in only


def test_order_of_rows_and_other_rows_mean_nothing():
    rows = [row(i, "ab"[i % 2], ["a", "b"], image=str(i % 3), modality="XY"[i // 4]) for i in range(8)]
    found = scoring.summarise(rows)
    assert scoring.summarise(rows[::-1]) == pytest.approx(found)
    part = scoring.summarise([x for x in rows if x["modality"] == "X"])
    for k, x in part.items():
        if k.startswith("model/overall/"):
            assert found[k.replace("overall", "modality/X")] == pytest.approx(x)


def test_closed_by_others_rule():
    rows = [row(0, "no", ["I know"]), row(1, "yes", ["Yes, left"]), row(2, "CT", ["CT"])]
    found = scoring.summarise(rows, "closed")
    assert found["model/overall/acc"] == pytest.approx(1 / 3)
    low, middle, high = (found[f"model/overall/llava_closed{x}"] for x in ("_low", "", "_high"))
    assert middle == pytest.approx(2 / 3) and low < middle < high


def test_closed_by_others_rule_is_shown_of_closed_questions():
    rows = [row(0, "no", ["I know"]), row(1, "no", ["I know"]) | dict(answer_type="CLOSED")]
    text = tables.format_table(scoring.summarise(rows, "closed"))
    (line,) = [x for x in text.splitlines() if "LLaVA-Med's closed" in x]
    assert line.startswith("| CLOSED, ") and line.endswith(" 1 |")


def test_means_over_runs_have_intervals_of_their_own():
    choices = ["CT", "MRI"]
    rows = [
        row(0, "A", ["A", "B"], "x", choices=choices, answer_letter="A"),
        row(1, "B", ["B", "A"], "x", choices=choices, answer_letter="B"),
        row(2, "A", ["A", "A"], "y", choices=choices, answer_letter="A"),
    ]
    found = scoring.summarise(rows, "multiple_choice")
    ends = [found[f"model/overall/acc_letter_mean{end}"] for end in ("_low", "_high")]
    assert tuple(ends) == stats.wilson_clustered([0.5, 0.5, 1], ["x", "x", "y"])
    assert ends[1] < found["model/overall/acc_letter_high"] == 1  # the first run is all right
    found = scoring.summarise(rows, "open")
    ends = [found[f"model/overall/f1_mean{end}"] for end in ("_low", "_high")]
    assert tuple(ends) == stats.bootstrap([0.5, 0.5, 1], ["x", "x", "y"])


def test_robustness_has_intervals():
    rows = [row(0, "a", ["a", "a", "a"], "x"), row(1, "a", ["a", "b", "c"], "y")]
    found = scoring.summarise(rows)
    for name in ("nonrobust", "acc_penalised_item"):
        ends = tuple(found[f"model/overall/{name}{end}"] for end in ("_low", "_high"))
        assert found[f"model/overall/{name}"] == 0.5 and ends == stats.wilson(1, 2)


def test_what_did_not_fit_is_said():
    rows = [row(0, "a", ["a"], tokens_cut=2, unfinished=1)]
    text = tables.format_table(scoring.summarise(rows))
    assert "1 prompts lost tokens" in text and "1 answers were cut off" in text


def test_open():
    rows = [
        row(0, "left lung", ["the left lung", "left"], image="x"),
        row(1, "a mass in the liver", ["a mass in the liver", "spleen"], image="y"),
        row(2, "no", ["maybe", "no"], image="z"),
    ]
    found = scoring.summarise(rows, "open")
    assert found["model/overall/acc"] == pytest.approx(1 / 3)
    # SQuAD drops articles: f1 of 1, 1, 0; then 2/3, 0, 1.
    assert found["model/overall/f1"] == pytest.approx(2 / 3)
    assert found["model/overall/f1_mean"] == pytest.approx((2 / 3 + 5 / 9) / 2)
    assert found["model/overall/recall"] == pytest.approx(2 / 3)
    assert found["model/overall/rouge1"] == pytest.approx((0.8 + 1 + 0) / 3)
    first = [x["predictions"][0] for x in rows], [x["answer"] for x in rows]
    _, corpus = text_metrics.score(*first)
    for name in ("bleu", "cider", "rougeL"):
        assert found[f"model/overall/{name}"] == pytest.approx(corpus[name])
    assert found["model/overall/rougeL_low"] == 0 and found["model/overall/rougeL_high"] == 1
    assert "F1" in tables.format_table(found)
    alone = scoring.summarise([x | {"image_key": "x"} for x in rows], "open")
    assert not [k for k in alone if "f1_low" in k]  # one image says nothing of others


def choice_row(i, letter, said, truth="letter", **more):
    choices = ["CT scan", "MRI scan", "X-ray", "Ultrasound"]
    answer = letter if truth == "letter" else choices["ABCD".index(letter)]
    return row(i, answer, said, str(i), choices=choices, answer_letter=letter, **more)


def test_multiple_choice_by_letter():
    rows = [
        choice_row(0, "B", ["(B)", "C", "b: MRI scan"]),  # B, C, B: two different
        choice_row(1, "A", ["MRI scan", "B", "A"]),  # none, B, A: three
    ]
    rows[0] |= dict(option_logprobs=[-3.0, -4.0, -9.0, -9.0], option_tokens=[1, 2, 1, 1])
    rows[1] |= dict(option_logprobs=[-1.0, -2.0, -3.0, -4.0], option_tokens=[1, 1, 1, 1])
    found = scoring.summarise(rows, "multiple_choice")
    assert found["model/overall/acc_letter"] == 0.5 and found["model/overall/no_letter"] == 0.5
    assert found["model/overall/acc_letter_mean"] == pytest.approx(0.5)
    assert found["model/overall/acc"] == 0  # "(B)" isn't "B" to the letter
    assert found["model/overall/nonrobust"] == 0.5
    assert found["model/overall/acc_penalised_item"] == pytest.approx(1 / 3)
    assert found["model/overall/acc_likelihood"] == 0.5
    assert found["model/overall/acc_likelihood_token"] == 1.0
    assert "overall, by likelihood a token" in tables.format_table(found)
    with pytest.raises(ValueError, match="'q5' has no 'choices'"):
        scoring.summarise([*rows, row(5, "B", ["B"] * 3)], "multiple_choice")


def test_multiple_choice_by_text():
    rows = [choice_row(0, "B", ["MRI"], "text"), choice_row(1, "D", ["x-ray"], "text")]
    found = scoring.summarise(rows, "multiple_choice")
    assert found["model/overall/acc"] == 0 and found["model/overall/acc_text"] == 0.5
    assert found["model/overall/qa_score"] == 0.5 and found["model/overall/no_letter"] == 1


@pytest.mark.parametrize(
    "rows, protocol, message",
    [
        ([], "vqa", "no questions"),
        ([row(0, "a", ["a"])], "vqb", "protocol is 'vqb'; expected one of"),
    ],
)
def test_mistakes(rows, protocol, message):
    with pytest.raises(ValueError, match=message):
        scoring.summarise(rows, protocol)


@given(st.lists(st.tuples(st.sampled_from(SENTENCES), st.sampled_from(SENTENCES)), min_size=1))
@settings(max_examples=25, deadline=None)
def test_bleu_of_counts_is_that_of_the_corpus(pairs):
    said, true = zip(*pairs)
    rows, counts = text_metrics.bleu_counts(said, true)
    assert text_metrics.bleu_of_counts(counts) == text_metrics.corpus_bleu(said, true)
    assert rows.tolist() == text_metrics.sentence_bleu(said, true).tolist()


def test_thoughts_are_not_scored():
    said = "<unused94>No, or rather<unused95> Yes."
    assert scoring.score(said, "yes")["acc"] and not scoring.score(said, "no")["acc"]
    assert scoring.texts(dict(predictions=[said, "no"]), "model") == ["Yes.", "no"]
    assert scoring.texts(dict(blank_image_predictions=[said]), "blank_image") == ["Yes."]
