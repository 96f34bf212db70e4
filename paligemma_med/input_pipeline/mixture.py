"""Mixtures of data sets: from which set each example of a training run comes.

Nothing is random: at any point of a run each set has contributed its share of the examples so far, to
within one example, even if the shares change during the run (annealing). So short runs and small or rare
sets get exactly what the config says, and a resumed run continues exactly.

The order is Tijdeman's solution of the chairman assignment problem (Discrete Mathematics 32, 1980):
a set may give its j-th example once its due is well above j - 1, and of those that may, the one
that must come soonest does. With k sets, no set is ever more than 1 - 1 / (2k - 2) away from its
due; no order does better for all shares.
"""

import numpy as np


def check_phases(weights, anneal, what="input") -> list[tuple[float, dict[str, float]]]:
    """The phases of a mixture as [(fraction of training at which it begins, {name: share}), …].

    Args:
      weights: {name: weight} from the beginning on.
      anneal: [(fraction, {name: weight}), …] or None; each holds from that fraction of training
        on, and has the same names.

    Returns:
      Phases with shares that add up to 1; names sorted, since a config doesn't keep their order.

    Raises:
      ValueError: a weight that is no number of 0 or more, none above 0, other names, or fractions
        that don't ascend within (0, 1).
    """
    phases, last = [], -1.0
    for i, phase in enumerate([(0.0, weights), *(anneal or ())]):
        where = f"{what}.data" if not i else f"{what}.anneal[{i - 1}]"
        try:
            start, by_name = phase
            by_name = dict(by_name)
        except (TypeError, ValueError):
            raise ValueError(f"{where} is {phase!r}; expected (fraction, {{name: weight}})") from None
        if not _is_number(start) or not last < start < 1 or (i and not start):
            raise ValueError(f"{where}: fraction {start!r}; expected numbers that rise within (0, 1)")
        if by_name.keys() != dict(weights).keys():
            raise ValueError(f"{where} has the names {[*by_name]}; expected {[*weights]}")
        for name, weight in by_name.items():
            if not _is_number(weight) or not 0 <= weight < np.inf:
                raise ValueError(f"{where}.{name}={weight!r}; expected a weight of 0 or more")
        total = sum(by_name.values())
        if not total:
            raise ValueError(f"{where}={by_name}; expected a weight above 0")
        phases.append((float(start), {n: by_name[n] / total for n in sorted(weights)}))
        last = start
    return phases


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def draw(phases, total) -> tuple[np.ndarray, np.ndarray]:
    """Which set each of `total` examples comes from.

    Args:
      phases: of `check_phases`.
      total: examples in the whole run.

    Returns:
      (which uint8[total], place int64[total]): number of the set in the order of its names, and
      how many examples of that set came before. With one phase, a longer run begins as a shorter.
    """
    names = list(phases[0][1])
    starts = np.array([round(s * total) for s, _ in phases] + [total], np.float64)
    shares = np.array([[p[n] for n in names] for _, p in phases])
    # What is due to each set at the borders of phases; between them it rises steadily.
    due = np.concatenate([np.zeros((1, len(names))), np.cumsum(shares * np.diff(starts)[:, None], 0)])
    slack = 1 / (2 * len(names) - 2) if len(names) > 1 else 0.0
    may, must = [], []
    for i in range(len(names)):
        count = np.arange(int(np.ceil(due[-1, i])) + 1)
        may.append(_first_at(count + slack, starts, due[:, i]))
        must.append(_first_at(count + 1 - slack, starts, due[:, i]))
    which = np.empty(total, np.uint8)
    place = np.empty(total, np.int64)
    given = [0] * len(names)
    may, must = [m.tolist() for m in may], [m.tolist() for m in must]
    for n in range(1, total + 1):
        best, soonest = -1, np.inf
        for i, j in enumerate(given):
            if j < len(may[i]) and may[i][j] <= n and must[i][j] < soonest:
                best, soonest = i, must[i][j]
        if best < 0:  # only rounding in the last place of a float can leave none
            best = max(range(len(names)), key=lambda i: np.interp(n, starts, due[:, i]) - given[i])
        which[n - 1], place[n - 1] = best, given[best]
        given[best] += 1
    return which, place


def _first_at(levels, starts, due):
    """For each level, the first whole n at which what is due has reached it; inf for never."""
    levels = np.asarray(levels) - 1e-9  # sums of shares are rounded
    end = np.searchsorted(due, levels)  # the border at which it is reached first
    e = np.clip(end, 1, len(due) - 1)
    rise = np.maximum(due[e] - due[e - 1], 1e-12)
    n = starts[e - 1] + (levels - due[e - 1]) / rise * (starts[e] - starts[e - 1])
    n = np.where(end == len(due), np.inf, np.ceil(n - 1e-6))
    return np.where(levels <= 0, 0, n)
