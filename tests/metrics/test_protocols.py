"""Protocols on cases worked by hand, and what holds for any answers."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.metrics import answers, protocols, scoring

# --- Several runs ---

CORRECT = [[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 1]]
SAID = [
    ["Yes", "yes", "yes.", " YES", "yes"],
    ["left", "right", "top", "left", "right"],
    ["CT", "MR", "CT", "MR", "CT"],
    ["a", "a", "a", "b", "a"],
]


def test_accuracy_over_runs():
    # The runs have 3, 2, 2, 2, 2 of 4 right: mean 0.55, squares 0.2² + 4 · 0.05² over 4.
    mean, sd = protocols.accuracy_over_runs(CORRECT)
    assert (mean, sd) == (pytest.approx(0.55), pytest.approx(math.sqrt(0.05 / 4)))
    mean, sd = protocols.accuracy_over_runs([[1], [0], [0]])
    assert mean == pytest.approx(1 / 3) and math.isnan(sd)
    for bad in ([], [[]], [[1, 0], [1]]):
        with pytest.raises(ValueError, match="expected"):
            protocols.accuracy_over_runs(bad)


def test_robustness():
    assert protocols.distinct_answers(SAID).tolist() == [1, 3, 2, 2]
    assert protocols.distinct_answers(SAID, form=None).tolist() == [4, 3, 2, 2]
    assert protocols.nonrobust(SAID).tolist() == [False, True, False, False]
    assert protocols.nonrobust(SAID, threshold=2).tolist() == [False, True, True, True]
    # Letters, and none as an answer of its own.
    letters = [["A", "A", None, "B", "A"], ["A", None, None, "A", "A"]]
    assert protocols.nonrobust(letters, form=None).tolist() == [True, False]


def test_penalised():
    # By item: question 2 is wrong throughout, so 2, 2, 2, 1, 2 of 4.
    mean, sd = protocols.penalised(CORRECT, SAID)
    assert mean == pytest.approx(0.45)
    assert sd == pytest.approx(np.std([0.5, 0.5, 0.5, 0.25, 0.5], ddof=1))
    # In total: 0.55 less a point of the score, the sd as it was.
    mean, sd = protocols.penalised(CORRECT, SAID, "total")
    assert (mean, sd) == (pytest.approx(0.54), pytest.approx(math.sqrt(0.05 / 4)))
    many = [["x", "y", "z"]] * 60
    assert protocols.penalised([[1, 0, 0]] * 60, many, "total")[0] == 0
    assert protocols.penalised([[1, 0, 0]] * 60, many, "item")[0] == 0
    with pytest.raises(ValueError, match="reading"):
        protocols.penalised(CORRECT, SAID, "both")
    with pytest.raises(ValueError, match="expected"):
        protocols.penalised(CORRECT, SAID[:3])
    with pytest.raises(ValueError, match="expected"):
        protocols.penalised(CORRECT, [row[:2] for row in SAID])


runs = st.lists(
    st.lists(st.tuples(st.booleans(), st.sampled_from("abcd")), min_size=5, max_size=5),
    min_size=1,
    max_size=20,
)


@given(runs, st.randoms())
def test_runs_in_any_order_and_penalties_only_take(table, random):
    correct = [[c for c, _ in row] for row in table]
    said = [[s for _, s in row] for row in table]
    mean, sd = protocols.accuracy_over_runs(correct)
    assert mean == pytest.approx(np.mean(correct))
    order = random.sample(range(5), 5)
    shuffled = [[row[i] for i in order] for row in correct]
    assert protocols.accuracy_over_runs(shuffled) == pytest.approx((mean, sd))
    bad = protocols.nonrobust(said)
    for reading in ("item", "total"):
        found = protocols.penalised(correct, said, reading)
        assert 0 <= found[0] <= mean + 1e-12
        if not bad.any():
            assert found == (mean, sd)
    # What is left by item are the robust questions.
    left = sum(np.mean(c) for c, b in zip(correct, bad) if not b) / len(correct)
    assert protocols.penalised(correct, said)[0] == pytest.approx(left)


def test_how_often_guessing_is_nonrobust():
    """The 82 % of `penalised`, five uniform letters of four; and by how the readings of
    `nonrobust` differ."""
    five = np.stack(np.unravel_index(np.arange(4**5), (4,) * 5), axis=1)
    assert protocols.nonrobust(five.tolist(), form=None).mean() == pytest.approx(840 / 1024)
    counts = np.sort([np.bincount(row, minlength=4) for row in five])[:, ::-1]
    differs = protocols.nonrobust(five.tolist(), form=None) != (5 - counts[:, 0] >= 3)
    assert differs.any() and (counts[differs] == [3, 1, 1, 0]).all()


# --- Multiple choice ---

CHOICES = ["pneumonia", "large mass", "hepatitis B", "normal"]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("b", "B"),
        (" (B) ", "B"),
        ("b.", "B"),
        ("**B**", "B"),
        ("（B）", "B"),
        ("C,", "C"),
        ("B: large mass", "B"),
        ("B:large mass", "B"),
        ("B) whatever", "B"),
        ("b. whatever", "B"),
        ("B - whatever", "B"),
        ("B large mass", "B"),
        ("A pneumonia", "A"),
        ("I see (C) here", "C"),
        ("option B", "B"),
        ("the option is a", "A"),
        ("I choose D.", "D"),
        ("I think it is option d", "D"),
        ("it's b", "B"),
        ("The answer is B", "B"),
        ("The answer is A because of it", "A"),
        ("Answer: (b)", "B"),
        ("Answer\nB", "B"),
        ("The correct answer is option C.", "C"),
        ("The answer is B, not A", "B"),
        ("Answer: B. Option A is wrong.", "B"),
        ("B. Option A is incorrect", "B"),
        # Markers of a final answer, and what models put around or after a letter.
        (r"\boxed{B}", "B"),
        (r"So $\boxed{\text{c}}$.", "C"),
        (r"\(B\)", "B"),
        ("<answer>B</answer>", "B"),
        ("B, because the area is dark", "B"),
        ("C\nExplanation: A and B do not fit.", "C"),
        ("The answer is 'C'", "C"),
        ("Ans: C", "C"),
        ("Answer- C", "C"),
        ("It must be C.", "C"),
        ("Answer seems to be A.", "A"),
        ("B<|im_end|>", "B"),
        ("<think>A? Or (C)?</think>\nB", "B"),
        ("Answer: rules out C, leaving D", "D"),
        ("答案：C", "C"),
        ("答案是B。", "B"),
        ("选B", "B"),
        ("Réponse : C", "C"),
        ("La respuesta correcta es C.", "C"),
        ("Die richtige Antwort ist b.", "B"),
        # None: another script would make a letter of each.
        (r"\boxed{A, C}", None),
        ("<answer>A large mass</answer>", None),
        ("不选B", None),
        ("A\nB", None),
        ("leaving A large cavity", None),
        ("his 'B' symptoms", None),
        ("No answer. It is normal", None),
        ("", None),
        ("E", None),
        ("AB", None),
        ("Both", None),
        ("A large mass", None),
        ("a large mass", None),
        ("It is a mass", None),
        ("The answer is a large mass", None),
        ("large mass", None),
        ("hepatitis B", None),
        ("most likely (hepatitis B)", None),
        ("this is hepatitis B: chronic", None),
        ("A-P view", None),
        ("C.T. scan", None),
        ("I don't know", None),
        ("not option B", None),
        ("option B is wrong", None),
        ("Option A isn't right", None),
        ("The answer is not B", None),
        ("neither A nor B", None),
        # Two.
        ("A or B", None),
        ("A, B", None),
        ("B/C", None),
        ("(A) or (B)", None),
        ("Answers: B and C", None),
        ("The answer is A or B", None),
        ("The answer is A. No, the answer is B.", None),
        ("A: yes, B: no", None),
        ("A: pneumonia\nB: large mass", None),
    ],
)
def test_letter(text, letter):
    assert protocols.letter(text, CHOICES) == letter


@given(st.integers(0, 3), st.sampled_from(["{}", "({})", "{}.", "Answer: {}", "{}: {c}", "{}) {c}"]))
def test_a_letter_is_found_in_either_case(i, form):
    for name in (protocols.letter_of(i), protocols.letter_of(i).lower()):
        assert protocols.letter(form.format(name, c=CHOICES[i]), CHOICES) == "ABCD"[i]


@given(st.text(alphabet="ABCDEabcde ().,:/\n-isotherwn", max_size=30))
def test_a_letter_is_one_of_the_choices(text):
    found = protocols.letter(text, CHOICES)
    assert found in (None, "A", "B", "C", "D")
    if found:
        assert found.lower() in text.lower()


@pytest.mark.parametrize(
    "text, option",
    [
        ("large mass", 1),
        ("Large  Mass.", 1),
        ("B: large mass", 1),
        ("a larger mass", 1),
        ("pneumonitis", 0),
        ("hepatitis", 2),
        ("abnormal", 3),  # difflib knows no medicine
        ("", None),
        ("???", None),
    ],
)
def test_closest_option(text, option):
    assert protocols.closest_option(text, CHOICES) == option
    labelled = [f" {letter}:{choice}" for letter, choice in zip("ABCD", CHOICES)]  # PMC-VQA's way
    assert protocols.closest_option(text, labelled) == option


def test_an_exact_option_goes_before_a_similar_one():
    assert protocols.closest_option("left", ["left lung", "left"]) == 1
    assert protocols.closest_option("x", ["xa", "xb"]) == 0  # the first among equals


def test_most_likely_option():
    sums, lengths = [-2.0, -3.0, -2.4], [1, 3, 2]
    assert protocols.most_likely_option(sums) == 0
    assert protocols.most_likely_option(sums, lengths) == 1  # -2, -1, -1.2 a token
    assert protocols.most_likely_option([-1, -1]) == 0
    assert protocols.most_likely_option([-math.inf, -900]) == 1
    for bad in (([-1],), ([-1, math.nan],), ([-1, -2], [1]), ([-1, -2], [1, 0])):
        with pytest.raises(ValueError):
            protocols.most_likely_option(*bad)


def test_qa_score():
    assert protocols.qa_score("Large mass in the lung", CHOICES, "large mass")
    assert not protocols.qa_score("Large mass in the lung", CHOICES, "normal")
    assert protocols.qa_score("YES", ["yes", "YES"], "YES")
    assert not protocols.qa_score("YES", ["yes", "YES"], "yes")  # case counts
    assert not protocols.qa_score("", CHOICES, "normal")
    assert not protocols.qa_score("???", CHOICES, "pneumonia")
    with pytest.raises(ValueError, match="among"):
        protocols.qa_score("x", CHOICES, "mass")


def test_bad_choices():
    for call in (protocols.letter, protocols.closest_option):
        for choices in ([], ["one"], ["x"] * 27):
            with pytest.raises(ValueError, match="2 to 26"):
                call("A", choices)
    assert protocols.letter("Z", ["x"] * 26) == "Z"


# --- Closed and open answers ---


@pytest.mark.parametrize(
    "prediction, answer, f1, recall",
    [
        ("the left lung", "Left lung.", 1, 1),
        ("lung", "left lung", 2 / 3, 1 / 2),
        ("left left left", "left lung", 2 / 5, 1 / 2),
        ("lung left", "left lung", 1, 1),
        ("it is in the left lung", "left lung", 4 / 7, 1),
        ("heart", "left lung", 0, 0),
        ("", "left lung", 0, 0),
        ("the", "a", 0, 0),  # of an answer without words, its text counts
        ("a", "A.", 1, 1),
        ("a", "A", 1, 1),
        ("lung", "the", 0, 0),
        ("", "the", 0, 0),
        ("", "...", 0, 0),
        ("...", "...", 1, 1),
        # Characters, where a script writes no blanks; its punctuation is dropped as ours is.
        ("左肺有结节。", "左肺结节", 8 / 9, 1),
    ],
)
def test_tokens(prediction, answer, f1, recall):
    assert protocols.token_f1(prediction, answer) == pytest.approx(f1)
    assert protocols.token_recall(prediction, answer) == pytest.approx(recall)


@pytest.mark.parametrize(
    "prediction, answer, right",
    [
        ("Yes, there is.", "Yes", True),
        ("No", "Yes", False),
        ("yes and no", "no", True),
        # What its substrings do.
        ("It looks normal", "No", True),
        ("I know", "No", True),
        ("MRI", "MRI", False),
        ("Unknown, maybe MRI", "MRI", True),
        ("", "Yes", False),
        ("Yes", "a", False),  # nothing is left of it, which every text holds
    ],
)
def test_llava_med_closed(prediction, answer, right):
    assert protocols.llava_med_closed(prediction, answer) == right


@pytest.mark.parametrize(
    "prediction, answer, f1, precision, recall",
    [
        ("left lung", "the left lung", 1, 1, 1),
        ("left left left", "left lung", 6 / 7, 1, 3 / 4),
        ("lungs, two", "2 lungs", 1, 1, 1),
        ("lungs: two", "2 lungs", 1 / 2, 1 / 2, 1 / 2),  # a colon stays
        ("it is in left lung", "left lung", 4 / 7, 2 / 5, 1),
        ("left", "left left lung", 2 / 3, 1, 1 / 2),
        ("heart", "lung", 0, 0, 0),
        ("", "lung", 0, 0, 0),
    ],
)
def test_llava_med_f1(prediction, answer, f1, precision, recall):
    assert protocols.llava_med_f1(prediction, answer) == pytest.approx((f1, precision, recall))


@pytest.mark.parametrize("answer", ["...", "?", "。", " . ", ", "])
def test_an_empty_prediction_is_no_answer_of_marks(answer):
    assert protocols.exact_match(answer, answer)
    for said in ("", " ", "yes"):
        assert not protocols.exact_match(said, answer)
        assert not any(scoring.score(said, answer).values())
    assert protocols.closest_option("", ["...", "x"]) is None


words = st.lists(st.sampled_from(["left", "right", "lung", "no", "mass", "yes"]), max_size=6)


@given(words, words)
def test_what_holds_for_overlaps(a, b):
    said, true = " ".join(a), " ".join(b)
    f1, recall = protocols.token_f1(said, true), protocols.token_recall(said, true)
    assert 0 <= f1 <= 1 and 0 <= recall <= 1
    assert f1 == protocols.token_f1(true, said)
    assert (f1 == 1) == (sorted(a) == sorted(b))
    assert protocols.exact_match(said, true) <= f1
    if a and b:
        assert f1 == pytest.approx(0 if not recall else 2 / (1 / recall + len(a) / (recall * len(b))))
    # More words never lower recall: it needs another figure beside it.
    if true:
        assert protocols.token_recall(f"{said} mass", true) >= recall
    if true and len(set(a)) == len(a) and len(set(b)) == len(b):
        assert protocols.llava_med_f1(said, true)[2] == pytest.approx(recall)


@given(st.text(max_size=30), st.text(max_size=30))
def test_any_text_has_its_scores(said, true):
    for call in (
        protocols.exact_match,
        protocols.token_f1,
        protocols.token_recall,
        protocols.llava_med_closed,
        lambda a, b: max(protocols.llava_med_f1(a, b)),
    ):
        assert 0 <= call(said, true) <= 1
    assert protocols.token_f1(true, true) == protocols.token_recall(true, true) == 1
    if answers.llava_med(true):
        assert protocols.llava_med_f1(true, true) == pytest.approx((1, 1, 1))
