"""How far a measured figure can be trusted: intervals, paired tests, sample sizes, agreement.

Questions share images, so answers aren't independent; functions that take `clusters` (one key per
question, such as image_key) account for that. Plain functions on lists and numpy arrays.
"""

import collections
import math

import numpy as np
import scipy.stats


def wilson(k, n, z=1.96) -> tuple[float, float]:
    """Wilson's score interval for a proportion.

    centre ± half, with p = k / n:
      centre = (p + z²/2n) / (1 + z²/n)
      half = z / (1 + z²/n) · sqrt(p(1 - p)/n + z²/4n²)

    Unlike p ± z·sqrt(p(1 - p)/n) it stays within [0, 1] and has a width at p = 0 and p = 1. It assumes
    independent trials; for questions that share images see `wilson_clustered`. E. B. Wilson, JASA 22
    (1927), 209-212.

    Args:
      k: successes, 0 to n.
      n: trials. Neither needs to be an integer, for effective sample sizes.
      z: quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
      (low, high); (0.0, 1.0) for n = 0, when nothing is known.

    Raises:
      ValueError: k outside 0 to n, or a z that isn't positive.
    """
    if not 0 <= k <= n:
        raise ValueError(f"k is {k} of n = {n}; expected 0 <= k <= n.")
    if not z > 0:
        raise ValueError(f"z is {z}; expected a number above 0.")
    if n == 0:
        return 0.0, 1.0
    p, z2 = k / n, z * z
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    # At k = 0 and k = n one limit is exactly 0 or 1; the formula gives it up to rounding.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)


def wilson_clustered(correct, clusters=None, z=1.96) -> tuple[float, float]:
    """Wilson's interval for an accuracy whose questions share images.

    The n answers count as n / design_effect independent ones: the effective sample size of Rao and
    Scott, Biometrics 48 (1992), 577-585, put into Wilson's formula as in Dean and Pagano, J. Survey
    Statistics and Methodology 3 (2015), 484-503. Equals `wilson` if every question has an image of its
    own. If all answers are right or all wrong, nothing shows how alike an image's answers are; they are
    then treated as fully alike: n² / Σ m² independent answers, with m answers per image.

    Args:
      correct: [Q] bools, or shares in [0, 1] (means over several runs, which vary less than bools;
        the interval is then wider than necessary).
      clusters: [Q] anything hashable, such as image keys; None: each answer is independent.
      z: as in `wilson`.

    Returns:
      (low, high); (0.0, 1.0) for no questions.

    Raises:
      ValueError: lengths that differ, values outside 0 to 1, a z that isn't positive.
    """
    values = _numbers(correct, "correct")
    if values.ndim != 1 or (values < 0).any() or (values > 1).any():
        raise ValueError(f"correct has shape {values.shape}; expected one value in 0 to 1 each.")
    n = len(values)
    if n == 0:
        return wilson(0, 0, z)
    n_effective = n / design_effect(values, clusters)
    p = float(np.clip(values.mean(), 0, 1))
    # p · n and not the sum, whose rounding could push k past n.
    return wilson(min(p * n_effective, n_effective), n_effective, z)


def design_effect(values, clusters=None) -> float:
    """By how much sharing images inflates the variance of a mean; at least 1.

      [C/(C-1) · Σ_c (Σ_{i in c} (x_i - x̄))²] / [n/(n-1) · Σ_i (x_i - x̄)²]

    the cluster-robust variance divided by that of independent values, for C clusters. Estimates below 1
    are treated as chance. Equal values, or a single cluster, say nothing; the result is then Σ m² / n,
    with m the sizes of the clusters, as if a cluster's values were one. L. Kish, Survey Sampling
    (1965), 8.2.

    Args:
      values: [Q] numbers.
      clusters: [Q] hashables, or None: 1.0.

    Raises:
      ValueError: no values, or lengths that differ.
    """
    values = _numbers(values, "values")
    codes, count = _codes(clusters, len(values))
    n = len(values)
    if n == 0:
        raise ValueError("values is empty; expected at least one.")
    if count == n:
        return 1.0
    residuals = values - values.mean()
    spread = float(np.sum(residuals**2))
    if count == 1 or spread < 1e-12 * n:
        return float(np.sum(np.bincount(codes) ** 2) / n)
    between = float(np.sum(np.bincount(codes, residuals) ** 2))
    return max(1.0, (count / (count - 1) * between) / (n / (n - 1) * spread))


def bootstrap(values, clusters=None, *, weights=None, resamples=2000, level=0.95, seed=0) -> tuple:
    """Percentile bootstrap interval of a mean or a ratio, whole clusters drawn with replacement.

    The figure is Σ values / Σ weights, or the mean without weights. Drawing images rather than
    questions keeps questions about one image together, as in reality. B. Efron, Annals
    of Statistics 7 (1979), 1-26; for clusters A. C. Davison, D. V. Hinkley, Bootstrap Methods and
    their Application (1997), 3.8. With fewer than about 20 clusters the interval is too narrow.

    Args:
      values: [Q] numbers, or [Q, K] for K figures from the same draws.
      clusters: [Q] hashables; None: each value by itself.
      weights: the denominators of a ratio, shaped like values or [Q], not negative. Draws in which
        they add up to 0 are left out.
      resamples: how many draws.
      level: share of draws within the interval.
      seed: for the draws; the same rows in the same order give the same interval.

    Returns:
      (low, high): floats, or arrays [K]. NaN with fewer than two clusters: one image can't show how
      images differ.

    Raises:
      ValueError: no values, values that aren't finite, lengths that differ, negative weights.
    """
    draws = _draws(values, clusters, weights, resamples, seed)
    low, high = _interval(draws, level)
    return (low, high) if np.ndim(values) > 1 else (float(low[0]), float(high[0]))


def resampled(figures, clusters, *, resamples=200, level=0.95, seed=0) -> tuple:
    """The interval of `bootstrap` for figures that are no means, such as average precision; each draw computes them.

    Args:
      figures: function of int[Q], how often each value is drawn, that gives K numbers; NaN is left out.
      clusters: [Q] hashables.
      resamples: how many draws; fewer, since each costs a computation.
      level, seed: as in `bootstrap`.

    Returns:
      (low, high): arrays [K]; NaN with fewer than two clusters.
    """
    codes, number = _codes(clusters, len(clusters))
    rng, draws = np.random.default_rng(seed), []
    for _ in range(resamples if number > 1 else 0):
        draws.append(figures(np.bincount(rng.integers(number, size=number), minlength=number)[codes]))
    return _interval(np.reshape(draws, (-1, len(figures(np.ones(len(codes), int))))), level)


def mcnemar(a, b) -> tuple[int, int, float]:
    """McNemar's exact test of two runs on the same questions.

    Only questions that one run has right and the other wrong carry information. If both runs were
    equally good, each of those n = only_a + only_b would be a fair coin toss:
      p = min(1, 2 · P(X <= min(only_a, only_b))), X ~ Binomial(n, 1/2).
    Q. McNemar, Psychometrika 12 (1947), 153-157; exact form. It assumes independent questions, unlike
    `paired_bootstrap`.

    Args:
      a, b: [Q] bools: right or wrong, in the same order of questions.

    Returns:
      (only_a, only_b, p); p = 1.0 if the runs never differ.

    Raises:
      ValueError: lengths that differ, or values other than 0 and 1.
    """
    a, b = _pair(a, b)
    for name, x in (("a", a), ("b", b)):
        if x.ndim != 1 or not np.isin(x, (0, 1)).all():
            raise ValueError(f"{name} of mcnemar has other values than 0 and 1; expected [Q] bools.")
    only_a, only_b = int(np.sum(a > b)), int(np.sum(b > a))
    n = only_a + only_b
    p = min(1.0, 2 * float(scipy.stats.binom.cdf(min(only_a, only_b), n, 0.5))) if n else 1.0
    return only_a, only_b, p


def paired_bootstrap(a, b, clusters=None, *, resamples=2000, level=0.95, seed=0) -> tuple[float, float, float, float]:
    """How much better run b is than run a on the same questions, by a clustered bootstrap.

    The questions' differences b - a are drawn by cluster (see `bootstrap`). The p-value is two-sided:
    the share of draws d* whose distance from the observed difference d is |d| or more,
    (1 + #{|d* - d| >= |d|}) / (1 + draws). That is Davison and Hinkley (1997), 4.4, with the draws
    shifted to a mean of 0.

    Args:
      a, b: [Q] numbers for the same questions in the same order: right or wrong, an F1, a share of
        right runs.
      clusters, resamples, level, seed: as in `bootstrap`.

    Returns:
      (difference, low, high, p): mean(b) - mean(a), its interval, the p-value; the last three are
      NaN with fewer than two clusters.

    Raises:
      ValueError: no questions, lengths that differ.
    """
    a, b = _pair(a, b)
    if a.ndim != 1:
        raise ValueError(f"a has shape {a.shape}; expected one number a question.")
    difference = float(np.mean(b - a)) if len(a) else math.nan
    draws = _draws(b - a, clusters, None, resamples, seed)
    (low,), (high,) = (x.tolist() for x in _interval(draws, level))
    if math.isnan(low):
        return difference, low, high, math.nan
    # Sums of the same numbers in another order differ by rounding, which must not count.
    far = np.abs(draws[:, 0] - difference) >= abs(difference) - 1e-12
    return difference, low, high, float((1 + far.sum()) / (1 + len(draws)))


def needed(p_a, p_b, discordance=None, *, paired=True, power=0.8, alpha=0.05, design_effect=1.0) -> int | float:
    """How many questions it takes to detect that p_a and p_b differ.

    Paired (both runs answer the same questions; McNemar's test): with d = p_b - p_a and s the share of
    questions on which one is right and the other wrong,
      n = (z_{1-alpha/2} · sqrt(s) + z_power · sqrt(s - d²))² / d²,
    R. J. Connor, Biometrics 43 (1987), 207-211. Unpaired (different questions; two proportions):
      n = (z_{1-alpha/2} · sqrt(2 p̄(1-p̄)) + z_power · sqrt(p_a(1-p_a) + p_b(1-p_b)))² / d²
    per run; J. L. Fleiss, Statistical Methods for Rates and Proportions (1981), 3.2, uncorrected.

    Args:
      p_a, p_b: accuracies, 0 to 1.
      discordance: s, |p_a - p_b| to min(p_a + p_b, 2 - p_a - p_b). None: as if the runs erred
        independently, p_a(1-p_b) + p_b(1-p_a). Similar runs differ less and need fewer questions.
      paired: which of the two formulas.
      power: the probability of detecting the difference.
      alpha: the two-sided level of the test.
      design_effect: for questions that share images, see `design_effect`; multiplies n.

    Returns:
      The number of questions, an int; math.inf if p_a = p_b.

    Raises:
      ValueError: an argument outside its range.
    """
    for name, x in (("p_a", p_a), ("p_b", p_b), ("power", power), ("alpha", alpha)):
        if not 0 <= x <= 1:
            raise ValueError(f"{name} is {x}; expected 0 to 1.")
    if not design_effect >= 1:
        raise ValueError(f"design_effect is {design_effect}; expected 1 or more.")
    d = p_b - p_a
    z_alpha, z_power = scipy.stats.norm.ppf([1 - alpha / 2, power])
    if not (math.isfinite(z_alpha) and math.isfinite(z_power)):
        raise ValueError(f"alpha = {alpha}, power = {power}; expected both between 0 and 1.")
    if paired:
        s = p_a * (1 - p_b) + p_b * (1 - p_a) if discordance is None else discordance
        low, high = abs(d), min(p_a + p_b, 2 - p_a - p_b)
        if not low - 1e-9 <= s <= high + 1e-9:
            raise ValueError(f"discordance is {s}; with accuracies {p_a} and {p_b} expected {low:.6g} to {high:.6g}.")
        null, other = s, max(0.0, s - d * d)
    else:
        mean = (p_a + p_b) / 2
        null, other = 2 * mean * (1 - mean), p_a * (1 - p_a) + p_b * (1 - p_b)
    if d == 0:
        return math.inf
    n = (z_alpha * math.sqrt(null) + z_power * math.sqrt(other)) ** 2 / (d * d)
    return max(1, math.ceil(n * design_effect - 1e-9))


def kappa(a, b, weights=None) -> float:
    """Cohen's kappa: agreement of two raters beyond chance.

      1 - Σ w_ij o_ij / Σ w_ij e_ij
    with o the shares of pairs (i, j), e the products of the raters' own shares, and w = 1 off the
    diagonal (J. Cohen, Educational and Psychological Measurement 20 (1960), 37-46), |i - j| or
    (i - j)² (J. Cohen, Psychological Bulletin 70 (1968), 213-220).

    Args:
      a, b: [N] labels of the same items; hashable, and numbers if weights are given.
      weights: None, or "linear" or "quadratic" for scales such as 1 to 5.

    Returns:
      kappa, -1 to 1; NaN if both raters used a single, same label throughout, or N = 0.

    Raises:
      ValueError: lengths that differ, an unknown weighting.
    """
    a, b = list(a), list(b)
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} labels, b has {len(b)}; expected as many.")
    distance = {
        None: lambda i, j: float(i != j),
        "linear": lambda i, j: abs(i - j),
        "quadratic": lambda i, j: (i - j) ** 2,
    }
    if weights not in distance:
        raise ValueError(f"weights is {weights!r}; expected None, 'linear' or 'quadratic'.")
    n, w = len(a), distance[weights]
    observed = sum(w(i, j) for i, j in zip(a, b)) * n
    count_a, count_b = collections.Counter(a), collections.Counter(b)
    expected = sum(w(i, j) * m * k for i, m in count_a.items() for j, k in count_b.items())
    return float(1 - observed / expected) if expected else math.nan


# --- Helpers ---


def _numbers(values, name):
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has a value that isn't finite; expected numbers.")
    return values


def _pair(a, b):
    a, b = _numbers(a, "a"), _numbers(b, "b")
    if a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape}, b has {b.shape}; expected the same questions.")
    return a, b


def _codes(clusters, n):
    """(int[n]: each value's cluster, numbered by first appearance; the number of clusters)."""
    if clusters is None:
        return np.arange(n), n
    numbers = {}
    codes = np.array([numbers.setdefault(c, len(numbers)) for c in clusters], np.int64)
    if len(codes) != n:
        raise ValueError(f"there are {n} values and {len(codes)} clusters; expected as many.")
    return codes, len(numbers)


def _draws(values, clusters, weights, resamples, seed):
    """The figures of each draw, float[draws, K]; no draws with fewer than two clusters."""
    values = _numbers(values, "values")
    if len(values) == 0:
        raise ValueError("values is empty; expected at least one.")
    flat = values.reshape(len(values), -1)
    weights = np.ones(len(flat)) if weights is None else _numbers(weights, "weights")
    if weights.shape[0] != len(flat) or (weights < 0).any() or not weights.any(axis=0).all():
        raise ValueError("there must be as many weights as values, none below 0, not all 0.")
    weights = np.broadcast_to(weights.reshape(len(flat), -1), flat.shape)
    codes, count = _codes(clusters, len(flat))
    if count < 2:
        return np.full((0, flat.shape[1]), math.nan)
    sums, totals = np.zeros((2, count, flat.shape[1]))
    np.add.at(sums, codes, flat)
    np.add.at(totals, codes, weights)
    rng = np.random.default_rng(seed)
    figures, at_once = [], max(1, 4_000_000 // count)
    for start in range(0, resamples, at_once):
        m = min(at_once, resamples - start)
        drawn = rng.integers(count, size=(m, count)) + np.arange(m)[:, None] * count
        times = np.bincount(drawn.ravel(), minlength=m * count).reshape(m, count).astype(float)
        with np.errstate(invalid="ignore", divide="ignore"):
            figures.append((times @ sums) / (times @ totals))
    return np.concatenate(figures)


def _interval(draws, level):
    """(low, high), each float[K]."""
    if not 0 < level < 1:
        raise ValueError(f"level is {level}; expected between 0 and 1.")
    if not len(draws):
        return np.full((2, draws.shape[1]), math.nan)
    edge = (1 - level) / 2
    return np.nanquantile(draws, [edge, 1 - edge], axis=0)
