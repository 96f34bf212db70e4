"""`--profile=10:15`: a trace of a few steps, for TensorBoard's profiler, XProf or Perfetto.

JAX's profiler does the work. Steps are counted as in Python slices: the trace begins when 10 steps are
done and ends when 15 are, also in a resumed run. It is written to <workdir>/profile.
"""

import os
import re

import jax
from absl import logging

from paligemma_med.parallel import distributed


class Profile:
    """A trace of some steps of training, in process 0; in the others it does nothing."""

    def __init__(self, steps, workdir, total_steps):
        """
        Args:
          steps: "first:last" as given to --profile, or None for no trace.

        Raises:
          ValueError: not two numbers, none in between, or beyond the run's end.
        """
        self._range, self._tracing, self._annotation = range(0), False, None
        self._folder = os.path.join(workdir, "profile")
        if steps:
            first, last = parse(steps)
            if first >= total_steps:
                raise ValueError(f"--profile={steps} begins after the run's {total_steps} steps.")
            if distributed.is_main():
                self._range = range(first, last)

    def step(self, step, last=None) -> None:
        """Call this before each step; `step` counts from 0.

        Args:
          last: the result of the previous step; waited for when the trace begins or ends.
        """
        if not self._range:
            return
        self._end_annotation()
        if self._tracing and step not in self._range:
            jax.block_until_ready(last)
            self._stop()
        elif not self._tracing and step in self._range:
            jax.block_until_ready(last)
            jax.profiler.start_trace(self._folder)
            self._tracing = True
        if self._tracing:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def close(self, last=None) -> None:
        """Ends the trace if it's still on."""
        self._end_annotation()
        if self._tracing:
            jax.block_until_ready(last)
            self._stop()

    def _end_annotation(self):
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

    def _stop(self):
        self._range, self._tracing = range(0), False
        try:
            jax.profiler.stop_trace()
        except Exception as e:  # Losing a trace must not stop the training.
            logging.warning("The trace could not be written to %s: %s", self._folder, e)
        else:
            logging.info("Wrote a trace to %s.", self._folder)


def parse(steps) -> tuple[int, int]:
    """ "10:15" → (10, 15). ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", steps)
    if not match or int(match[1]) >= int(match[2]):
        raise ValueError(
            f"--profile is {steps!r}; expected first:last, two step numbers with the first smaller, such as 10:15."
        )
    return int(match[1]), int(match[2])
