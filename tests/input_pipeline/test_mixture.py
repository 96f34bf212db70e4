"""Shares of a mixture: exact at every point, whatever the weights, sets and phases."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.input_pipeline import mixture

WEIGHT = st.one_of(st.just(0.0), st.floats(1e-4, 1e3))


@st.composite
def cases(draw):
    names = "abcdefgh"[: draw(st.integers(1, 8))]
    weights = st.fixed_dictionaries({n: WEIGHT for n in names}).filter(lambda w: any(w.values()))
    fractions = draw(st.lists(st.floats(0.01, 0.99), max_size=3, unique=True).map(sorted))
    return draw(weights), [(f, draw(weights)) for f in fractions], draw(st.integers(1, 700))


def due_of(phases, total):
    """float[total, sets]: what is due to each set after each example."""
    starts = [round(s * total) for s, _ in phases] + [total]
    share = np.zeros((total, len(phases[0][1])))
    for (_, shares), a, b in zip(phases, starts, starts[1:]):
        share[a:b] = list(shares.values())
    return np.cumsum(share, axis=0)


@given(cases())
@settings(max_examples=150, deadline=None)
def test_no_set_is_ever_a_whole_example_away_from_its_due(case):
    weights, anneal, total = case
    phases = mixture.check_phases(weights, anneal)
    which, place = mixture.draw(phases, total)
    sets = len(weights)
    drawn = np.cumsum(which[:, None] == np.arange(sets), axis=0)
    bound = 1 - 1 / (2 * sets - 2) if sets > 1 else 0
    assert np.abs(drawn - due_of(phases, total)).max() <= bound + 1e-6
    # Each set's examples come in order, none left out or twice.
    for i in range(sets):
        np.testing.assert_array_equal(place[which == i], np.arange((which == i).sum()))


def test_a_longer_run_begins_as_a_shorter_one():
    phases = mixture.check_phases(dict(a=0.7, b=0.2, c=0.1), None)
    short, long = mixture.draw(phases, 100), mixture.draw(phases, 1000)
    for a, b in zip(short, long):
        np.testing.assert_array_equal(a, b[:100])


def test_phases_are_shares():
    phases = mixture.check_phases(dict(b=1, a=3), [(0.5, dict(b=1, a=0))])
    assert phases == [(0.0, dict(a=0.75, b=0.25)), (0.5, dict(a=0.0, b=1.0))]
    assert all([*shares] == ["a", "b"] for _, shares in phases)


@pytest.mark.parametrize(
    "weights, anneal, message",
    [
        (dict(a=-1), None, "input.data.a=-1; expected a weight of 0 or more"),
        (dict(a=float("inf")), None, "expected a weight"),
        (dict(a=True), None, "expected a weight"),
        (dict(a=0), None, "expected a weight above 0"),
        (
            dict(a=1),
            [(0.5, dict(b=1))],
            r"input.anneal\[0\] has the names \['b'\]; expected \['a'\]",
        ),
        (dict(a=1), [(0, dict(a=1))], "fraction 0; expected numbers that rise within"),
        (dict(a=1), [(0.5, dict(a=1)), (0.5, dict(a=1))], r"anneal\[1\]: fraction 0.5"),
        (dict(a=1), [(1.0, dict(a=1))], "fraction 1.0"),
        (dict(a=1), [0.5], r"expected \(fraction, {name: weight}\)"),
    ],
)
def test_errors(weights, anneal, message):
    with pytest.raises(ValueError, match=message):
        mixture.check_phases(weights, anneal)
