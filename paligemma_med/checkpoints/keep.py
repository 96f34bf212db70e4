"""Which checkpoints of a run are kept: the newest (config.keep_ckpt), and the best by a metric (config.keep_best).

For what a checkpoint holds, and how it is written and restored, see `workdir`.
"""

import difflib
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from orbax.checkpoint import checkpoint_managers

from paligemma_med.checkpoints import step_lines

Best = Callable[[Sequence[int]], int | None]  # returns the best of these steps, or None


def policy(newest: int, best: Best | None = None) -> checkpoint_managers.PreservationPolicy:
    """Orbax' rule for keeping the newest checkpoints, as many as `newest`, and the best of all."""
    rule = checkpoint_managers.LatestN(newest)
    return _NewestAndBest(rule, best) if best else rule


class _NewestAndBest(checkpoint_managers.PreservationPolicy):
    def __init__(self, newest, best):
        self._newest, self._best = newest, best

    def should_preserve(self, checkpoints, *, context):
        newest = self._newest.should_preserve(checkpoints, context=context)
        best = self._best([c.step for c in checkpoints])
        return [is_new or c.step == best for is_new, c in zip(newest, checkpoints)]


def best_of(workdir: os.PathLike | str, config: Mapping[str, Any]) -> Best | None:
    """A function that picks the best of some steps by config.keep_best; None if that isn't set.

    It reads <workdir>/metrics.jsonl. Of steps with equal metrics the first is the best. Steps without the metric
    don't count, nor do those where it wasn't finite, which are null there.

    Raises (when called):
      ValueError: evaluators have run, but none has that metric.
    """
    wanted = config.get("keep_best")
    if not wanted:
        return None
    metric, sign = wanted["metric"], -1 if wanted.get("mode", "max") == "min" else 1
    path = os.path.join(workdir, "metrics.jsonl")

    def best(steps):
        rows = [row for _, row in step_lines.read(path)]
        evaluated = [row for row in rows if any("/" in key for key in row)]
        if evaluated and not any(metric in row for row in evaluated):
            raise ValueError(
                f"config.keep_best.metric is {metric!r}, but the evaluators give "
                f"{sorted(key for key in evaluated[-1] if '/' in key)[:8]}, …"
            )
        values = {row["step"]: row.get(metric) for row in rows if row["step"] in steps}
        finite = {step: sign * value for step, value in values.items() if _is_finite(value)}
        return max(finite, key=finite.get, default=None)

    return best


def _is_finite(value):
    return isinstance(value, int | float) and math.isfinite(value)


def check(config: Mapping[str, Any], evaluators: Collection[str]) -> None:
    """Raises ValueError if config.keep_best is set to anything but
    dict(metric="<evaluator>/<its metric>", mode="max" or "min").

    Args:
      evaluators: names of config.evals.
    """
    best = config.get("keep_best")
    if not best:
        return
    if not hasattr(best, "keys"):
        raise ValueError(f"config.keep_best is {best!r}; expected dict(metric='NAME/METRIC', mode='max').")
    if unknown := sorted(set(best.keys()) - {"metric", "mode"}):
        raise ValueError(f"config.keep_best has unknown keys {unknown}; known: metric, mode.")
    metric = best.get("metric", "")
    is_name = isinstance(metric, str) and not metric.endswith("/")
    if not is_name or not any(metric.startswith(f"{name}/") for name in evaluators):
        raise ValueError(
            f"config.keep_best.metric is {metric!r}; expected NAME/METRIC, as in "
            f"'NAME/model/overall/acc', with one of config.evals: {sorted(evaluators)}."
        )
    if (mode := best.get("mode", "max")) not in ("max", "min"):
        raise ValueError(f"config.keep_best.mode is {mode!r}; expected 'max' or 'min'.")


def check_metric(config: Mapping[str, Any], name: str, metrics: Collection[str]) -> None:
    """Raises ValueError if config.keep_best names a metric of the evaluator `name` that isn't in its `metrics`."""
    wanted = config["keep_best"]["metric"]
    key = wanted.removeprefix(f"{name}/")
    if key not in metrics:
        near = difflib.get_close_matches(key, metrics) or list(metrics)[:8]
        raise ValueError(
            f"config.keep_best.metric is {wanted!r}, but {name} gives no {key!r}; it has "
            f"{', '.join(map(repr, near))} and others (eval/{name}/metrics.json). Fix it, then run "
            "the same command to resume."
        )
