"""Checks of every training step, made whenever metrics are read from the devices.

Loss and gradient must be finite (otherwise the step didn't change the parameters), and so must the
parameters. Logits must be computed at the positions of all supervised tokens.
"""

import math

import jax

from paligemma_med.parallel import distributed
from paligemma_med.training import run_files

_NORMS = ("training_loss", "l2_grads", "l2_params")


class Soundness:
    """Keeps a few scalars of each step on the device until `check` reads them.

    Attributes:
      skipped: number of steps so far whose loss or gradient wasn't finite.
    """

    def __init__(self, config, workdir, batches, *, skipped=0):
        """
        Args:
          batches: TrainingInput, which knows each step's examples.
          skipped: steps skipped before a resume.
        """
        self.skipped = skipped
        self._may_skip = config.get("skip_nonfinite") or 0
        self._supervised_len = config.get("supervised_len")
        self._workdir, self._batches = workdir, batches
        self._steps = {}

    def add(self, step, metrics) -> None:
        """Keeps the metrics of `step`, without waiting for them."""
        names = ("finite", "lost", *_NORMS)
        self._steps[step] = {n: metrics[n] for n in names}

    def check(self) -> None:
        """Checks all steps since the last call.

        Raises:
          ValueError: config.supervised_len leaves out supervised tokens.
          FloatingPointError: parameters that aren't finite; or a loss or a gradient that isn't, in more
            steps than config.skip_nonfinite allows. Each such step is first written to nonfinite.jsonl.
        """
        steps, self._steps = jax.device_get(self._steps), {}
        for step, found in steps.items():
            if found["lost"]:
                raise ValueError(
                    f"Step {step}: {int(found['lost'])} supervised tokens lie beyond "
                    f"config.supervised_len = {self._supervised_len} of their row: raise it."
                )
            if not found["finite"]:
                self._not_finite(step, found)
            elif not math.isfinite(found["l2_params"]):
                raise FloatingPointError(
                    f"Step {step}: l2_params is {found['l2_params']}: the update was too large. Lower config.lr."
                )

    def _not_finite(self, step, found):
        ids = self._batches.question_ids(step - 1)  # batch i makes step i + 1
        row = {n: float(found[n]) for n in _NORMS}
        row = {n: x if math.isfinite(x) else str(x) for n, x in row.items()}
        if distributed.is_main():
            run_files.append(self._workdir, "nonfinite.jsonl", step, {**row, "question_ids": ids})
        self.skipped += 1
        if self.skipped > self._may_skip:
            shown = ", ".join(ids[:5]) + (", …" if len(ids) > 5 else "")
            values = ", ".join(f"{n} is {row[n]}" for n in _NORMS)
            raise FloatingPointError(
                f"Step {step}: {values}, on the questions {shown}; all are in "
                f"{self._workdir}/nonfinite.jsonl. Lower config.lr, set config.grad_clip_norm, or "
                f"let {self.skipped} or more such steps be skipped with config.skip_nonfinite."
            )
