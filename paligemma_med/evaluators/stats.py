"""How far a measured figure can be trusted."""

import math


def wilson(k, n, z=1.96):
    """Wilson's score interval for a proportion.

    centre ± half, with p = k / n:
      centre = (p + z²/2n) / (1 + z²/n)
      half = z / (1 + z²/n) · sqrt(p(1 - p)/n + z²/4n²)

    Unlike p ± z·sqrt(p(1 - p)/n) it stays within [0, 1] and has a width at p = 0 and p = 1. It
    takes the n trials for independent; questions about one image are not quite.
    E. B. Wilson, JASA 22 (1927), 209-212.

    Args:
      k: successes, 0 to n.
      n: trials.
      z: quantile of the normal distribution; 1.96 gives 95 %.

    Returns:
      (low, high); (0.0, 1.0) for n = 0, when nothing is known.

    Raises:
      ValueError: k outside of 0 to n, or a z that isn't positive.
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
    # At the ends one limit is exactly 0 or 1, up to rounding.
    return (0.0 if k == 0 else centre - half), (1.0 if k == n else centre + half)
