"""Figures from rows: what counts as equal, what stands in a table, worked by hand."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.evaluators import answers, scoring


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
    assert scoring.score(a, f"  {a.lower()} . ")["acc"]
