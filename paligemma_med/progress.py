"""What a person watches during training: loss, speed, time spent waiting for input, time left."""

import contextlib
import time


class Progress:
    """Speed, waiting time and time left, of training alone: evals and checkpoints don't count."""

    def __init__(self, first_step, total_steps, batch_size):
        self._total, self._batch = total_steps, batch_size
        self._step, self._time, self._wait = first_step, time.monotonic(), 0.0
        self._first = True

    def measure(self, step, batches):
        """{examples_per_second, input_wait, eta_seconds} since the last call."""
        now = time.monotonic()
        seconds = max(now - self._time, 1e-9)
        per_step = seconds / max(step - self._step, 1)
        out = {
            "examples_per_second": self._batch / per_step,
            "input_wait": min(1.0, (batches.wait_seconds - self._wait) / seconds),
            "eta_seconds": per_step * (self._total - step),
        }
        self._step, self._time, self._wait = step, now, batches.wait_seconds
        return out

    @contextlib.contextmanager
    def paused(self):
        """What happens in this context isn't counted."""
        start = time.monotonic()
        yield
        self._time += time.monotonic() - start

    def print(self, metrics):
        first, self._first = self._first, False
        # The first step is mostly compilation: its speed would mislead.
        speed = (
            "compiled and run once"
            if first
            else f"{metrics['examples_per_second']:.1f} ex/s  wait {metrics['input_wait']:.0%}  "
            f"ETA {_clock(metrics['eta_seconds'])}"
        )
        print(
            f"step {self._step}/{self._total}  loss {metrics['training_loss']:.4f}  "
            f"grad {metrics['l2_grads']:.3g}  lr {metrics['lr']:.2e}  {speed}",
            flush=True,
        )


def _clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
