"""Wilson's interval: worked by hand, and by its definition."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.evaluators import stats


def test_by_hand():
    # k = 8, n = 10, z = 2: p = 0.8, z²/n = 0.4, so centre = (0.8 + 0.2) / 1.4 and
    # half = 2 / 1.4 · sqrt(0.16/10 + 4/400) = 2 / 1.4 · sqrt(0.026).
    low, high = stats.wilson(8, 10, z=2)
    assert low == pytest.approx((1 - 2 * math.sqrt(0.026)) / 1.4, abs=1e-12)
    assert high == pytest.approx((1 + 2 * math.sqrt(0.026)) / 1.4, abs=1e-12)
    # Nothing right of n: the upper limit is z² / (n + z²).
    assert stats.wilson(0, 12, z=2) == (0.0, pytest.approx(4 / 16))
    assert stats.wilson(12, 12, z=2) == (pytest.approx(12 / 16), 1.0)
    assert stats.wilson(0, 0) == (0.0, 1.0)


def test_published_example():
    # Newcombe, Statistics in Medicine 17 (1998), 857-872, table I: 81 of 263, 15 of 148.
    assert stats.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert stats.wilson(15, 148) == pytest.approx((0.0624, 0.1605), abs=5e-5)


@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0.1, 4))
def test_limits_are_where_the_score_test_turns(n, part, z):
    # The defining property: |p - limit| is z standard errors *of the limit*.
    k = round(part * n)
    low, high = stats.wilson(k, n, z)
    assert 0 <= low <= k / n <= high <= 1
    for limit in (low, high):
        if 0 < limit < 1:
            assert abs(k / n - limit) == pytest.approx(
                z * math.sqrt(limit * (1 - limit) / n), rel=1e-6, abs=1e-9
            )
    assert stats.wilson(n - k, n, z) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("k, n, z", [(3, 2, 1.96), (-1, 2, 1.96), (1, 2, 0), (1, 2, float("nan"))])
def test_bad_arguments(k, n, z):
    with pytest.raises(ValueError, match="expected"):
        stats.wilson(k, n, z)
