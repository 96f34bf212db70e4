"""Progress shown during training: loss, speed, MFU, time spent waiting for input, remaining time.

On a terminal this is a bar on stderr; in a log, one plain line on stdout for each logged step. Only
process 0 shows anything. Evals and checkpoints don't count towards the speed.
"""

import collections
import contextlib
import math
import os
import sys
import time
from collections.abc import Iterator

import jax
import tqdm

from paligemma_med.models import flops as flops_lib
from paligemma_med.parallel import distributed

# Metrics that differ between two otherwise equal runs.
TIMING = frozenset({"examples_per_second", "input_wait", "eta_seconds", "mfu"})

# The bar shows the speed over this many seconds.
_RECENT = 30.0


class Progress:
    """The progress of training in steps, without evals and checkpoints. Close it at the end."""

    def __init__(self, first_step, total_steps, batch_size, *, flops=None, peak=None):
        """
        Args:
          flops: `flops.Flops` of one example.
          peak: peak FLOP/s of one device; None if unknown, and then there is no MFU.
        """
        self._total, self._batch = total_steps, batch_size
        self._paused = 0.0
        self._step, self._time, self._wait = first_step, self._now(), 0.0
        self._first, self._logged = True, {}
        self._utilisation = None  # MFU at one example per second
        if flops and peak:
            self._utilisation = flops.per_example_model / (peak * jax.device_count())
        # Dispatched steps that may not be done yet; steps done within the last seconds.
        self._sent, self._recent = collections.deque(), collections.deque()
        self._last = None
        self._shown, self._bar = distributed.is_main(), None
        if flops:
            self.say(_accounting(flops, peak))
        if self._shown and sys.stderr.isatty() and _has_width(sys.stderr):
            self._bar = tqdm.tqdm(
                total=total_steps,
                initial=first_step,
                unit="step",
                miniters=1,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} |{bar}| {desc}",
            )

    def step(self, step, loss, wait=False) -> None:
        """Moves the bar; call this after each step. Costs nothing if there is no bar.

        Steps are dispatched to the devices well before they are computed. The bar shows those whose loss
        has arrived.

        Args:
          loss: jax.Array of the step.
          wait: whether to wait for it, moving the bar meanwhile (if the caller will wait anyway).
        """
        self._last = loss
        if self._bar is not None:
            self._sent.append((step, loss))
            self._move(wait)

    def _move(self, wait):
        while self._sent and (wait or self._sent[0][1].is_ready()):
            step, loss = self._sent.popleft()
            loss = float(loss)
            now = self._now()
            self._recent.append((step, now))
            while len(self._recent) > 2 and now - self._recent[0][1] > _RECENT:
                self._recent.popleft()
            self._draw(step, loss)

    def measure(self, step, batches) -> dict[str, float]:
        """{examples_per_second, input_wait, eta_seconds, mfu} since the last call; mfu only if it is known. The
        first step's are mostly compilation.

        Args:
          batches: has `wait_seconds`, the time spent waiting for input so far.
        """
        now = self._now()
        seconds = max(now - self._time, 1e-9)
        per_step = seconds / max(step - self._step, 1)
        out = {
            "examples_per_second": self._batch / per_step,
            "input_wait": min(1.0, (batches.wait_seconds - self._wait) / seconds),
            "eta_seconds": per_step * (self._total - step),
        }
        if self._utilisation:
            out["mfu"] = out["examples_per_second"] * self._utilisation
        self._step, self._time, self._wait = step, now, batches.wait_seconds
        return out

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context whose time isn't counted, except for steps dispatched before it."""
        self._move(wait=True)
        jax.block_until_ready(self._last)
        start = time.monotonic()
        try:
            yield
        finally:
            self._paused += time.monotonic() - start

    def print(self, metrics) -> None:
        """Shows a row of metrics as a line, unless stdout is a terminal with a bar."""
        first, self._first = self._first, False
        self._logged = {} if first else metrics
        # Mostly compilation, so its speed would mislead.
        speed = "compiled and run once" if first else _speed(metrics)
        if self._bar is None or not sys.stdout.isatty():
            self.say(
                f"step {self._step}/{self._total}  loss {metrics['training_loss']:.4f}  "
                f"grad {metrics['l2_grads']:.3g}  lr {metrics['lr']:.2e}  {speed}"
            )

    def say(self, text) -> None:
        """Prints a line, above the bar if there is one, in process 0."""
        if self._bar is not None:
            tqdm.tqdm.write(text, file=sys.stdout)
        elif self._shown:
            print(text, flush=True)

    def close(self) -> None:
        """Stops the bar. Lines can still be printed."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._sent.clear()

    def _now(self):
        return time.monotonic() - self._paused

    def _draw(self, step, loss):
        speed = "compiled and run once"
        if len(self._recent) > 1:
            (first, start), (last, end) = self._recent[0], self._recent[-1]
            per_step = max(end - start, 1e-9) / (last - first)
            live = {
                "examples_per_second": self._batch / per_step,
                "eta_seconds": per_step * (self._total - step),
            }
            if self._utilisation:
                live["mfu"] = live["examples_per_second"] * self._utilisation
            speed = _speed({**self._logged, **live})
        self._bar.set_description_str(f"loss {loss:.4f}  {speed}", refresh=False)
        self._bar.update(step - self._bar.n)
        if step == self._total:
            self._bar.refresh()


def _has_width(terminal):
    """Whether a bar can be drawn there: in some containers the terminal has zero columns."""
    try:
        return os.get_terminal_size(terminal.fileno()).columns > 0
    except OSError:  # not known
        return True


def _speed(metrics):
    parts = [_rate(metrics["examples_per_second"])]
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.1%}")
    if "input_wait" in metrics:
        parts.append(f"wait {metrics['input_wait']:.0%}")
    return "  ".join([*parts, f"ETA {_clock(metrics['eta_seconds'])}"])


def _rate(per_second):
    """A model of billions of parameters on a CPU takes minutes an image: 0.0 a second says nothing."""
    return f"{per_second:.1f} images/s" if per_second >= 0.1 else f"{1 / max(per_second, 1e-9):.3g} s an image"


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _accounting(flops, peak):
    devices = f"{jax.device_count()} × {jax.devices()[0].device_kind}"
    cost = f"{_flops(flops.per_example_model)} an example: {flops_lib.ACCOUNTING}"
    if peak:
        return f"MFU is of {_flops(peak)}/s each of {devices}, at {cost}."
    return f"No MFU: the peak of {devices} isn't known (config.peak_tflops sets it). {cost}."


def _flops(number):
    power = min(int(math.log10(max(number, 1))) // 3, 5)
    return f"{number / 1000**power:.4g} {('', 'k', 'M', 'G', 'T', 'P')[power]}FLOP"
