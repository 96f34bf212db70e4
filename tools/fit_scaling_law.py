"""Fits the paper's scaling law to losses: L = A · X^-α · D^-β + E, with 95 % intervals.

    python -m tools.fit_scaling_law out/a out/b out/c
    python -m tools.fit_scaling_law runs.csv --x=parameters --d=tokens --loss=eval_loss
    python -m tools.fit_scaling_law out/a/metrics.jsonl out/b/metrics.jsonl --x=2361344,11298816 \
        --d=step --d_scale=3072 --loss=training_loss

X is the number of trained parameters, D the tokens trained on (equation 1 of "Adapting Lightweight
Vision Language Models for Radiological Visual Question Answering"). Of a workdir they are read from its
config.json and metrics.jsonl: X the parameters that it trains, D tokens_seen, L the evaluation loss (of an eval
of type perplexity). Where the data can't determine a
parameter, a sentence says so instead of a number: an exponent whose variable never varies, or whose
interval is open because its profile is flat.
"""
# The docstring above is what --help prints.
#
# The interval of a parameter comes from its profile: the parameter is fixed at a value, the others are
# fitted again, and the values at which the sum of squares stays under S · (1 + t²/(n - p)) are inside.
# Unlike an interval from the curvature at the optimum it shows a ridge: with X and D growing
# together, α can be traded for β, and both profiles are flat.

import dataclasses
import math
import os
import pathlib

import numpy as np
import scipy.optimize
import scipy.stats
from absl import app, flags

from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.cli import command
from paligemma_med.config import files as config_files
from paligemma_med.pp import command_line, json_text, tables
from paligemma_med.setup import TrainingSetup

NAMES = ("A", "alpha", "beta", "E")
MAX_EXPONENT = 5.0
_STARTS = (0.03, 0.1, 0.3, 0.6, 1.0, 2.0)  # exponents


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One parameter. `low` or `high` is None if the data don't limit that side."""

    value: float | None
    low: float | None
    high: float | None
    verdict: str  # "" if it is identified, else a sentence


@dataclasses.dataclass(frozen=True)
class Fit:
    """estimates: keys are NAMES; rmse: of the losses; n: rows used."""

    estimates: dict
    rmse: float
    n: int


def fit(x, d, loss, level=0.95) -> Fit:
    """Least squares of `loss` on A · x^-α · d^-β + E.

    A, E > 0 are fitted as logarithms, 0 <= α, β <= MAX_EXPONENT, from several starts. Errors are assumed
    to be independent and equally large; successive losses of one run aren't quite, and then intervals are
    too narrow. If x (or d) is the same in all rows its exponent is left out, and A stands for A · x^-α.

    Args:
      x, d, loss: positive numbers, float[n].
      level: of the intervals.

    Raises:
      ValueError: numbers that aren't positive, neither x nor d varies, or fewer rows than
        parameters + 1.
    """
    x, d, loss = (np.asarray(values, np.float64) for values in (x, d, loss))
    for name, values in (("X", x), ("D", d), ("the loss", loss)):
        if not (np.isfinite(values) & (values > 0)).all():
            row = int(np.flatnonzero(~(np.isfinite(values) & (values > 0)))[0])
            raise ValueError(f"row {row + 1}: {name} is {values[row]}; expected a number above 0.")
    logs = {"alpha": np.log(x), "beta": np.log(d)}
    varies = {k: np.ptp(v) > 1e-9 for k, v in logs.items()}
    free = ["A", *(k for k in ("alpha", "beta") if varies[k]), "E"]
    if len(free) == 2:
        raise ValueError(
            f"X is {x[0]:g} and D is {d[0]:g} in all {len(x)} rows; no exponent can be fitted. "
            "Expected losses at different X or different D."
        )
    if len(x) <= len(free):
        raise ValueError(
            f"found {len(x)} rows for {len(free)} parameters ({', '.join(free)}); expected at least {len(free) + 1}."
        )
    problem = _Problem(np.stack([logs[k] for k in free[1:-1]]), loss)
    best, error = problem.optimum()
    # Losses without any noise would give intervals narrower than can be computed.
    noise = max(error, len(loss) * (1e-9 * loss.mean()) ** 2)
    t = scipy.stats.t.ppf((1 + level) / 2, len(loss) - len(free))
    limit = error + noise * t**2 / (len(loss) - len(free))
    estimates = {}
    for name in NAMES:
        if name not in free:
            variable = "X" if name == "alpha" else "D"
            estimates[name] = Estimate(
                None, None, None, f"{variable} never varies: A stands for A · {variable}^-{name}"
            )
            continue
        estimates[name] = _estimate(name, problem, free.index(name), best, limit)
    exponents = [estimates["alpha"], estimates["beta"]]
    if all(e.low == 0.0 for e in exponents) and ((loss - loss.mean()) ** 2).sum() > limit:
        r = np.corrcoef(logs["alpha"], logs["beta"])[0, 1]
        verdict = f"not identified: X and D vary together (r = {r:.3f}), α can be traded for β"
        for name in ("alpha", "beta"):
            estimates[name] = dataclasses.replace(estimates[name], verdict=verdict)
    if not (varies["alpha"] and varies["beta"]):
        estimates["A"] = dataclasses.replace(
            estimates["A"],
            verdict=estimates["A"].verdict or "includes the factor that never varies",
        )
    return Fit(estimates, float(np.sqrt(error / len(loss))), len(loss))


class _Problem:
    """Parameters are (log A, exponents…, log E), with A in the units of X and D."""

    def __init__(self, logs, loss):
        self.logs, self.loss = logs, loss
        self.centre = logs.mean(axis=1)
        scale = math.log(loss.max())
        count = len(logs)
        # E may vanish, but can't exceed every loss.
        self.low = np.array([-np.inf, *[0.0] * count, math.log(1e-6 * loss.min())])
        self.high = np.array([np.inf, *[MAX_EXPONENT] * count, max(scale, 0) + 1.0])

    def _residuals(self, theta):
        with np.errstate(over="ignore"):
            return np.exp(np.minimum(theta[0] - theta[1:-1] @ self.logs, 50)) + (math.exp(theta[-1]) - self.loss)

    def _jacobian(self, theta):
        power = np.exp(np.minimum(theta[0] - theta[1:-1] @ self.logs, 50))
        offset = np.full_like(power, math.exp(theta[-1]))
        return np.stack([power, *(-power * log for log in self.logs), offset], axis=1)

    def solve(self, start, held=None):
        """The best θ from `start`; `held`: index of a fixed parameter.

        Works on (log A at the centre of the logs, …), where the columns are hardly correlated.
        """
        free = [i for i in range(len(start)) if i != held]

        def whole(part):
            theta = np.array(start, np.float64)
            theta[free] = part
            if held != 0:
                theta[0] += theta[1:-1] @ self.centre
            return theta

        def gradient(part):
            jacobian = self._jacobian(whole(part))
            if held != 0:
                jacobian[:, 1:-1] += jacobian[:, :1] * self.centre
            return jacobian[:, free]

        part = np.array(start, np.float64)
        if held != 0:
            part[0] -= part[1:-1] @ self.centre
        low, high = self.low[free], self.high[free]
        found = scipy.optimize.least_squares(
            lambda p: self._residuals(whole(p)),
            np.clip(part[free], low, high),
            gradient,
            bounds=(low, high),
            x_scale="jac",
            ftol=1e-14,
            xtol=1e-14,
            gtol=1e-14,
            max_nfev=300,
        )
        return whole(found.x), 2 * found.cost

    def optimum(self):
        """(θ, sum of squares): starts on a grid of exponents, A and E by linear least squares."""
        starts = []
        for exponents in np.stack(np.meshgrid(*[_STARTS] * len(self.logs)), axis=-1).reshape(-1, len(self.logs)):
            power = np.exp(-exponents @ (self.logs - self.centre[:, None]))
            (a, e), residual = scipy.optimize.nnls(np.stack([power, np.ones_like(power)], axis=1), self.loss)
            a, e = max(a, 1e-12), max(e, 2e-6 * self.loss.min())
            log_a = math.log(a) + exponents @ self.centre
            starts.append((residual, np.array([log_a, *exponents, math.log(e)])))
        starts.sort(key=lambda pair: pair[0])
        return min((self.solve(theta) for _, theta in starts[:6]), key=lambda pair: pair[1])

    def limit_of(self, best, index, limit, direction):
        """How far the parameter can go before the sum of squares exceeds `limit`; None: up to its bound, or
        for A and E (logarithms) by a factor of e^30."""
        bound = (self.low, self.high)[direction > 0][index]
        furthest = 30.0 if not np.isfinite(bound) else abs(bound - best[index])
        inside, theta = 0.0, best
        step = 1e-4 * max(1.0, abs(best[index]))
        while True:
            outside = min(inside + step, furthest)
            error, there = self._profile(best, theta, index, best[index] + direction * outside)
            if error > limit:
                break
            if outside >= furthest:
                return None
            inside, theta, step = outside, there, step * 2
        for _ in range(40):
            middle = (inside + outside) / 2
            error, there = self._profile(best, theta, index, best[index] + direction * middle)
            if error > limit:
                outside = middle
            else:
                inside, theta = middle, there
            if outside - inside < 1e-6 * max(1.0, abs(best[index])):
                break
        return best[index] + direction * (inside + outside) / 2

    def _profile(self, best, near, index, value):
        """The least sum of squares with one parameter fixed, from two starts."""
        found = []
        for start in (near, best):
            start = np.array(start)
            if index != 0:  # keep the curve's height at the centre, where it is well determined
                start[0] += (value - start[index]) * (self.centre[index - 1] if index <= len(self.centre) else 0.0)
            start[index] = value
            theta, error = self.solve(start, held=index)
            found.append((error, theta))
        return min(found, key=lambda pair: pair[0])


def _estimate(name, problem, index, best, limit):
    low, high = (problem.limit_of(best, index, limit, direction) for direction in (-1, 1))
    value = best[index]
    if name in ("A", "E"):
        value, low, high = (None if v is None else math.exp(min(v, 700)) for v in (value, low, high))
        if name == "E" and low is None and high is not None:
            return Estimate(value, 0.0, high, "may be 0")
        if low is None or high is None:
            return Estimate(value, low, high, "not identified: its profile is flat")
        return Estimate(value, low, high, "")
    if high is None:
        return Estimate(value, low, high, "not identified: its profile is flat")
    if low is None:
        variable = "X" if name == "alpha" else "D"
        return Estimate(value, 0.0, high, f"may be 0: no effect of {variable} can be told from none")
    return Estimate(value, low, high, "")


# --- Files ---


def read_rows(path) -> list[dict]:
    """Rows of a .csv or .jsonl file as dicts.

    Raises:
      ValueError: another kind of file, no header, or a line that isn't a JSON object.
    """
    path = pathlib.Path(path)
    if path.suffix == ".csv":
        return [row for _, row in tables.read_file(path)]
    if path.suffix not in (".jsonl", ".json"):
        raise ValueError(f"{path}: expected a .csv or .jsonl file.")
    return [row for _, row in json_text.lines(path, "a JSON object", root=dict, constants=True)]


def columns(rows, where, x, d, loss, d_scale=1.0) -> tuple:
    """(x, d, loss) float arrays from the rows that have them all; `x` is a name or a number.

    metrics.jsonl only has a loss in some rows; the others are left out.

    Raises:
      ValueError: no row has them, or a value isn't a number.
    """
    wanted = [name for name in (x, d, loss) if isinstance(name, str)]
    known = sorted({key for row in rows for key in row})
    if missing := [name for name in wanted if name not in known]:
        raise ValueError(f"{where} has no column {missing[0]!r}; it has {', '.join(known[:40])}.")
    out = []
    for number, row in enumerate(rows, 1):
        if any(row.get(name) in (None, "") for name in wanted):
            continue
        try:
            out.append([float(row[n]) if isinstance(n, str) else float(n) for n in (x, d, loss)])
        except (TypeError, ValueError):
            raise ValueError(
                f"{where}, row {number}: expected numbers in {wanted}, found {[row.get(name) for name in wanted]}."
            ) from None
    if not out:
        raise ValueError(f"{where} has no row with all of {wanted}.")
    x, d, loss = np.array(out).T
    return x, d * d_scale, loss


def to_markdown(result) -> str:
    """The fit as a table, with a line of text below it."""
    lines = ["| parameter | value | 95 % interval | |", "| --- | ---: | ---: | --- |"]
    for name, e in result.estimates.items():
        value = "–" if e.value is None else f"{e.value:.4g}"
        ends = ["open" if end is None else f"{end:.4g}" for end in (e.low, e.high)]
        interval = "–" if e.value is None else " to ".join(ends)
        lines.append(f"| {name} | {value} | {interval} | {e.verdict} |")
    lines += ["", f"L = A · X^-alpha · D^-beta + E; {result.n} rows, RMSE {result.rmse:.4g}."]
    return "\n".join(lines)


def of_workdir(folder, x=None, d=None, loss=None) -> tuple[list[dict], float | str, str, str]:
    """(rows of metrics.jsonl, x, d, loss) of a run; what isn't given is found out.

    Returns:
      x: how many parameters the run trains; d: "tokens_seen"; loss: the one column that is an evaluation's loss.

    Raises:
      ValueError: no such run, or none or several evaluation losses.
    """
    path = os.path.join(folder, "metrics.jsonl")
    rows = read_rows(path)
    if x is None:
        setup = TrainingSetup.without_data(config_files.from_json(workdirs.read_config(folder)))
        x = float(sum(setup.abstract[name].size for name in setup.trained_names))
    if loss is None:
        found = sorted({key for row in rows for key in row if key.endswith("/per_token")})
        if len(found) != 1:
            raise ValueError(
                f"{path} has the evaluation losses {found}; expected one, or --loss=NAME/per_token."
                if found
                else f"{path} has no evaluation loss: evaluate with an eval of type perplexity while training "
                "(docs/evaluation.md), or name another column with --loss."
            )
        loss = found[0]
    return rows, x, d or "tokens_seen", loss


def _read(path, x, f):
    """(x, d, loss) arrays of one of the files or workdirs, and the columns' names."""
    if os.path.isdir(path):
        rows, x, d, loss = of_workdir(path, x, f.d, f.loss)
    else:
        rows, x, d, loss = read_rows(path), 1.0 if x is None else x, f.d or "step", f.loss or "training_loss"
    return columns(rows, path, x, d, loss, f.d_scale), (loss, d)


@command
def main(argv) -> None:
    if len(argv) < 2:
        raise app.UsageError("name at least one WORKDIR, LOG.csv or LOG.jsonl.")
    f = flags.FLAGS
    xs = [_number(text) for text in f.x] if f.x else [None]
    if len(xs) == 1:
        xs *= len(argv) - 1
    if len(xs) != len(argv) - 1:
        raise ValueError(f"--x has {len(xs)} values for {len(argv) - 1} files; expected one each.")
    parts, names = zip(*(_read(path, x, f) for path, x in zip(argv[1:], xs)))
    if len({*names}) > 1:
        raise ValueError(f"the files are read by different columns, {sorted({*names})}: name them with --loss and --d.")
    result = fit(*(np.concatenate(column) for column in zip(*parts)))
    print(to_markdown(result))
    loss, d = names[0]
    print(f"L is the column {loss}, D is {f.d_scale:g} · {d}.")


def _number(text):
    """A number, or else the text itself, the name of a column."""
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    flags.DEFINE_list("x", None, "Column of X, or its value, one for each; default: a workdir's own, else constant.")
    flags.DEFINE_string("d", None, "Column of D; default: tokens_seen of workdirs, step of files.")
    flags.DEFINE_float("d_scale", 1.0, "What D is multiplied by: tokens a step.", lower_bound=0)
    flags.DEFINE_string(
        "loss", None, "Column of the loss; default: a workdir's evaluation loss, a file's training_loss."
    )
    app.run(main, flags_parser=command_line.parse_flags)
