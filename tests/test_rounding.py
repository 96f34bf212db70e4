"""The bound for two programs' results: rounding passes, and mistakes don't."""

import numpy as np
import pytest

from tests.rounding import UNIT, assert_close, distance


def test_rounding_passes_and_mistakes_do_not():
    want = np.linspace(-3, 3, 50, dtype=np.float32)
    assert_close(want + np.float32(15 * UNIT * 3), want)
    for wrong in (want + np.float32(20 * UNIT * 3), want.astype(np.float16), want[::-1], want[:, None]):
        with pytest.raises(AssertionError):
            assert_close(wrong, want)
    assert_close(want + np.float32(20 * UNIT * 3), want, units=32)
    assert_close(want * 0, 0)
    assert 2 < distance(want * np.float32(1 + 3 * UNIT), want) < 4


def test_infinite_numbers_stay_where_they_are():
    want = np.array([-np.inf, 1, 2], np.float32)
    assert_close(want, want)
    for wrong in ([-np.inf, np.inf, 2], [0, 1, 2], [np.nan, 1, 2]):
        with pytest.raises(AssertionError):
            assert_close(np.array(wrong, np.float32), want)
