"""Intervals, tests and sample sizes: worked by hand, by their definitions, and by what they promise
when the truth is known."""

import math

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med.metrics import stats


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
            assert abs(k / n - limit) == pytest.approx(z * math.sqrt(limit * (1 - limit) / n), rel=1e-6, abs=1e-9)
    assert stats.wilson(n - k, n, z) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@pytest.mark.parametrize("k, n, z", [(3, 2, 1.96), (-1, 2, 1.96), (1, 2, 0), (1, 2, float("nan"))])
def test_bad_arguments(k, n, z):
    with pytest.raises(ValueError, match="expected"):
        stats.wilson(k, n, z)


# --- Answers that share images ---


def test_clustered_interval_by_hand():
    # Images of 3, 1 and 2 answers: residuals from p = 1/2 add up to 1/2, 1/2 and -1.
    correct, images = [1, 1, 0, 1, 0, 0], ["x", "x", "x", "y", "z", "z"]
    effect = (3 / 2 * (0.25 + 0.25 + 1)) / (6 / 5 * 1.5)
    assert stats.design_effect(correct, images) == pytest.approx(effect)
    n = 6 / effect
    assert stats.wilson_clustered(correct, images) == pytest.approx(stats.wilson(n / 2, n))
    # Nothing to estimate from: an image's answers are taken for one.
    assert stats.design_effect([1] * 6, images) == pytest.approx(14 / 6)
    assert stats.design_effect(correct, ["x"] * 6) == 6
    assert stats.wilson_clustered([0] * 6, images) == pytest.approx(stats.wilson(0, 36 / 14))
    # Images that vary less than chance would: no bonus for it.
    assert stats.design_effect([0, 1, 0, 1], ["x", "x", "y", "y"]) == 1


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(2, 4))
def test_clustered_interval_between_its_extremes(correct, copies):
    own = range(len(correct))
    plain = stats.wilson(sum(correct), len(correct))
    assert stats.wilson_clustered(correct) == pytest.approx(plain)
    assert stats.wilson_clustered(correct, own) == pytest.approx(plain)
    # The same answers over again tell nothing new, and the interval knows it.
    low, high = stats.wilson_clustered(correct * copies, [*own] * copies)
    naive = stats.wilson(copies * sum(correct), copies * len(correct))
    assert low <= naive[0] + 1e-9 and high >= naive[1] - 1e-9
    if len(correct) > 10:
        assert (low, high) == pytest.approx(plain, abs=0.02)


def test_clustered_intervals_cover():
    """40 images of 8 questions each, some images hard: 95 % intervals hold the truth 95 % of the
    times, those that take questions for independent far less often."""
    rng = np.random.default_rng(0)
    images = np.repeat(np.arange(40), 8)
    held = dict(wilson=0, wilson_clustered=0, bootstrap=0)
    for _ in range(300):
        correct = rng.random(320) < np.repeat(rng.beta(1.2, 0.8, 40), 8)
        for name, (low, high) in dict(
            wilson=stats.wilson(correct.sum(), 320),
            wilson_clustered=stats.wilson_clustered(correct, images),
            bootstrap=stats.bootstrap(correct, images, resamples=300),
        ).items():
            held[name] += low <= 0.6 <= high
    assert held["wilson"] < 240
    assert 276 <= held["wilson_clustered"] <= 296
    assert 273 <= held["bootstrap"] <= 296


# --- Bootstrap ---


def test_bootstrap_by_hand():
    # Two images: a draw has one of them twice (1/4 each) or both.
    assert stats.bootstrap([0, 0, 1, 1], [7, 7, 8, 8]) == (0, 1)
    assert stats.bootstrap([0, 0, 1, 1], [7, 7, 8, 8], level=0.4) == (0.5, 0.5)
    # A ratio, the second image weighing three times as much.
    assert stats.bootstrap([1, 0], weights=[1, 3], level=0.4) == (0.25, 0.25)
    assert stats.bootstrap([1, 0], weights=[1, 0]) == (1, 1)
    assert np.isnan(stats.bootstrap([1, 0], [7, 7])).all()


def test_bootstrap_of_a_mean_has_its_standard_error():
    rng = np.random.default_rng(1)
    values = rng.gamma(2.0, size=400)
    low, high = stats.bootstrap(values, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(400)
    assert low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.1 * half)
    # Each value five times over: as wide if they are known to belong together, else 5 ** -0.5.
    again, images = np.tile(values, 5), np.tile(np.arange(400), 5)
    low5, high5 = stats.bootstrap(again, images, resamples=4000)
    assert high5 - low5 == pytest.approx(high - low, rel=0.1)
    low0, high0 = stats.bootstrap(again, resamples=4000)
    assert high0 - low0 == pytest.approx((high - low) * 5**-0.5, rel=0.1)


def test_bootstrap_of_several_figures_and_seeds():
    rng = np.random.default_rng(2)
    values, images = rng.random((50, 3)), rng.integers(20, size=50).tolist()
    low, high = stats.bootstrap(values, images)
    for k in range(3):
        assert stats.bootstrap(values[:, k], images) == pytest.approx((low[k], high[k]))
    assert stats.bootstrap(values[:, 0], images, seed=1) != (low[0], high[0])
    # Only who is together with whom counts, not what images are called.
    names = [f"image {i}" for i in images]
    assert stats.bootstrap(values[:, 0], names) == stats.bootstrap(values[:, 0], images)
    assert stats.bootstrap(3 * values[:, 0], images, weights=[3] * 50) == pytest.approx(
        stats.bootstrap(values[:, 0], images)
    )


# --- Two runs ---


def test_mcnemar():
    a, b = [1, 1, 0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1]
    assert stats.mcnemar(a, b) == (1, 5, pytest.approx(2 * (1 + 6) / 2**6))
    assert stats.mcnemar(b, a) == (5, 1, pytest.approx(2 * (1 + 6) / 2**6))
    assert stats.mcnemar([1, 0], [0, 1]) == (1, 1, 1.0)
    assert stats.mcnemar(a, a) == (0, 0, 1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_mcnemar_is_a_binomial_test(pairs):
    only_a, only_b, p = stats.mcnemar(*zip(*pairs))
    if n := only_a + only_b:
        assert p == pytest.approx(scipy.stats.binomtest(only_a, n).pvalue)
    assert (only_b, only_a, p) == stats.mcnemar(*zip(*((b, a) for a, b in pairs)))


def test_paired_bootstrap():
    rng = np.random.default_rng(3)
    images = np.repeat(np.arange(60), 5)
    easy = np.repeat(rng.random(60), 5)
    a = rng.random(300) < easy
    b = np.where(rng.random(300) < 0.15, True, a)  # better by what a pair shows, not two intervals
    gain, low, high, p = stats.paired_bootstrap(a, b, images)
    assert gain == pytest.approx(b.mean() - a.mean())
    assert 0 < low < gain < high and p < 0.01
    assert stats.bootstrap(b, images)[0] < stats.bootstrap(a, images)[1]
    assert stats.bootstrap(b.astype(int) - a, images) == pytest.approx((low, high))
    back = stats.paired_bootstrap(b, a, images)
    assert back == pytest.approx((-gain, -high, -low, p), abs=1e-12)
    assert stats.paired_bootstrap(a, a, images) == (0, 0, 0, 1)
    assert stats.paired_bootstrap([1, 0], [1, 1], [5, 5])[0] == 0.5


def test_paired_bootstrap_under_no_difference():
    """Runs that are equally good: about 5 % of the p-values are below 0.05. With whole images
    right or wrong, a test of single questions finds differences where there are none."""
    rng = np.random.default_rng(4)
    images = np.repeat(np.arange(50), 6)
    clustered, single = 0, 0
    for _ in range(200):
        a, b = (np.repeat(rng.random(50) < 0.5, 6) for _ in range(2))
        clustered += stats.paired_bootstrap(a, b, images, resamples=200)[3] < 0.05
        single += stats.mcnemar(a, b)[2] < 0.05
    assert clustered <= 20  # expected 10
    assert single > 50


# --- How many questions ---


def test_needed_by_hand():
    # z = 1.959964, 0.841621. Paired: (z sqrt(0.2) + z' sqrt(0.19))² / 0.01 = 154.6.
    assert stats.needed(0.5, 0.6, 0.2) == 155
    # Unpaired: (z sqrt(2 · 0.55 · 0.45) + z' sqrt(0.49))² / 0.01 = 387.3, of the textbooks.
    assert stats.needed(0.5, 0.6, paired=False) == 388
    assert stats.needed(0.5, 0.6, paired=False) == stats.needed(0.6, 0.5, paired=False)
    assert stats.needed(0.5, 0.6, 0.2, design_effect=2) == 310
    assert stats.needed(0.5, 0.6) == stats.needed(0.5, 0.6, 0.5)
    assert stats.needed(0.4, 0.4) == math.inf
    assert stats.needed(0, 1) == 4  # z²: all differ, and it takes 3.84 to see it
    # The paper's gain of stage 1 on ROCO, 32.25 to 34.00: of 200 questions it had.
    assert stats.needed(0.3225, 0.34, paired=False) > 11_000


def test_needed_gives_the_power_it_promises():
    rng = np.random.default_rng(5)
    only_a, only_b = 0.05, 0.15
    n = stats.needed(0.5, 0.6, only_a + only_b)
    found = 0
    for _ in range(500):
        kind = rng.choice(3, size=n, p=[only_a, only_b, 1 - only_a - only_b])
        found += stats.mcnemar(kind == 0, kind == 1)[2] < 0.05
    assert 0.70 < found / 500 < 0.85  # the exact test is a little more careful than the formula


# --- Agreement ---


def test_kappa():
    # 20 and 15 agree; shares 0.5, 0.6 of "yes": (0.7 - 0.5) / (1 - 0.5).
    a = ["yes"] * 25 + ["no"] * 25
    b = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert stats.kappa(a, b) == pytest.approx(0.4)
    assert stats.kappa(b, a) == pytest.approx(0.4)
    assert stats.kappa([1, 2], [1, 2]) == 1
    assert stats.kappa([1, 2], [2, 1]) == -1
    assert math.isnan(stats.kappa([1, 1], [1, 1]))
    assert stats.kappa([1, 1], [1, 2]) == 0
    # Far off counts for more: observed 0, 1, 2 (squared 0, 1, 4) against the 9 pairs of chance.
    a, b = [1, 2, 3], [1, 3, 1]
    assert stats.kappa(a, b) == pytest.approx(1 - (2 / 3) / (6 / 9))
    assert stats.kappa(a, b, "linear") == pytest.approx(1 - (3 / 3) / (9 / 9))
    assert stats.kappa(a, b, "quadratic") == pytest.approx(1 - (5 / 3) / (15 / 9))
    with pytest.raises(ValueError, match="as many"):
        stats.kappa([1], [1, 2])
    with pytest.raises(ValueError, match="weights"):
        stats.kappa([1], [1], "cubic")


@pytest.mark.parametrize(
    "call",
    [
        lambda: stats.wilson_clustered([1, 2], [0, 0]),
        lambda: stats.wilson_clustered([1, 0], [0]),
        lambda: stats.design_effect([], []),
        lambda: stats.bootstrap([]),
        lambda: stats.bootstrap([1, math.nan]),
        lambda: stats.bootstrap([1, 2], [0]),
        lambda: stats.bootstrap([1, 2], weights=[1, -1]),
        lambda: stats.bootstrap([1, 2], weights=[0, 0]),
        lambda: stats.bootstrap([1, 2], level=1),
        lambda: stats.mcnemar([1], [1, 0]),
        lambda: stats.mcnemar([0.5], [1]),
        lambda: stats.paired_bootstrap([1], [1, 0]),
        lambda: stats.needed(0.5, 1.1),
        lambda: stats.needed(0.5, 0.6, 0.05),
        lambda: stats.needed(0.5, 0.6, power=1),
        lambda: stats.needed(0.5, 0.6, design_effect=0.5),
    ],
)
def test_bad_arguments_of_the_others(call):
    with pytest.raises(ValueError, match="expected|must"):
        call()
