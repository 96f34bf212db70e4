"""The forms in which answers are compared."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.metrics import answers


@pytest.mark.parametrize(
    "text, form",
    [
        ("The Heart.", "heart"),
        ("an X-ray of the chest", "xray of chest"),
        ("a  b\tc", "b c"),
        ("theory and anatomy", "theory and anatomy"),
        ("don't", "dont"),
        ("3.5 cm", "35 cm"),
        ("The.", ""),
    ],
)
def test_squad(text, form):
    assert answers.squad(text) == form


@pytest.mark.parametrize(
    "text, form",
    [
        ("Yes.", "yes"),
        ("The left lung", "left lung"),
        ("X-ray", "x ray"),  # no blank beside it: a blank in its place
        ("x - ray", "x ray"),
        ("chest X-ray - frontal", "chest xray frontal"),  # one has a blank beside it: none stays
        ("lung,heart", "lung heart"),
        ("lung, heart", "lung heart"),
        ("1,000 and X-ray", "1000 and xray"),
        ("Two, or none", "2 or 0"),
        ("3.5 cm.", "3.5 cm"),
        ("a", ""),
    ],
)
def test_llava_med(text, form):
    """Worked by its rules; equal to upstream's normalize_word on SLAKE's and MedPix' 19,806 texts
    when it was written."""
    assert answers.llava_med(text) == form


@given(st.text())
def test_forms_are_normal_forms(text):
    for form in (answers.squad, answers.llava_med):
        once = form(text)
        assert once == " ".join(once.split())
        assert form(f"  {text} ") == once or form is answers.llava_med
    assert answers.squad(answers.squad(text)) == answers.squad(text)


@pytest.mark.parametrize(
    "text, empty", [("", True), (" . ", True), ("...", True), ("。", True), ("+", False), ("0", False)]
)
def test_what_has_no_answer(text, empty):
    assert answers.is_empty(text) == empty


def test_characters_of_scripts_without_blanks_stand_alone():
    assert answers.spaced("CT示左肺。").split() == ["CT", "示", "左", "肺", "。"]
    assert answers.spaced("左肺").split() == ["左", "肺"] and answers.spaced("ปอด").split() == ["ป", "อ", "ด"]
    for text in ("left lung, 3.5 cm", "café – β-blocker", "сердце", "폐 결절"):
        assert answers.spaced(text) == text


@pytest.mark.parametrize(
    "text, answer",
    [
        ("<unused94>thought\nIt is a lung.<unused95>Yes", "Yes"),
        ("\n<unused94>a<unused95>\n no <unused94>", "no <unused94>"),
        ("<unused94>it goes on", ""),
        ("yes <unused94>a<unused95>", "yes <unused94>a<unused95>"),
        ("", ""),
    ],
)
def test_an_answer_without_the_thought_before_it(text, answer):
    assert answers.without_thought(text) == answer
