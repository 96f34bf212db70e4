"""The rows of metrics.jsonl, under the same names, for TensorBoard and Weights & Biases.

Only what the config uses is imported, and nothing leaves the machine unless config.wandb is set.
metrics.jsonl remains the record: training continues if one of these fails.
"""

import contextlib
import json
import os
import secrets
import sys
import time

from absl import logging

from paligemma_med import files
from paligemma_med.config import files as config_files
from paligemma_med.parallel import distributed


def open_writers(config, workdir, first_step) -> "Writers":
    """The writers of config.tensorboard and config.wandb in process 0; in the others it writes nothing.

    Args:
      config: tensorboard=True writes event files to <workdir>/tensorboard. wandb=True or a dict of
        arguments of `wandb.init` (project, name, …) logs to W&B; WANDB_MODE and its like count.
      first_step: steps taken so far. TensorBoard drops the rows of later ones; a W&B run is continued.

    Raises:
      ValueError: a package isn't installed, or W&B can't start (a resumed run only warns and continues
        without it).
    """
    writers = []
    if distributed.is_main():
        if config.get("tensorboard"):
            writers.append(_TensorBoard(workdir, first_step))
        if config.get("wandb"):
            try:
                writers.append(_Wandb(config, workdir))
            except _CannotStart as e:
                if not first_step:
                    raise
                logging.warning("%s The run continues without it.", e)
    return Writers(writers)


class Writers:
    """Several writers as one. One that fails is closed with a warning; the others continue."""

    def __init__(self, writers=()):
        self._writers = list(writers)

    def write(self, step, metrics) -> None:
        """Adds to the row of `step`; values that aren't numbers are left out."""
        numbers = {k: float(v) for k, v in metrics.items() if isinstance(v, int | float)}
        for writer in list(self._writers):
            try:
                writer.write(step, numbers)
            except Exception as e:
                self._writers.remove(writer)
                _warn(writer, e)
                with contextlib.suppress(Exception):  # one warning is enough
                    writer.close()

    def close(self) -> None:
        """Writes the rest and closes, in bounded time."""
        while self._writers:
            writer = self._writers.pop()
            try:
                writer.close()
            except Exception as e:
                _warn(writer, e)


def _warn(writer, error):
    logging.warning(
        "%s fails; the run continues without it (metrics.jsonl has everything): %s: %s",
        writer.name,
        type(error).__name__,
        error,
    )


class _CannotStart(ValueError):
    """W&B doesn't start; the message says why."""


class _TensorBoard:
    """Event files, written row by row in the calling thread: tensorboardX's own SummaryWriter loses its
    queue when it is killed, and hangs when the disk is full."""

    name = "TensorBoard"

    def __init__(self, workdir, first_step):
        try:
            with _without_torch():
                from tensorboardX import event_file_writer
                from tensorboardX.proto import event_pb2, summary_pb2
        except ImportError as e:
            raise ValueError(_missing("tensorboard", e)) from None
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        folder = os.path.join(workdir, "tensorboard")
        os.makedirs(folder, exist_ok=True)
        self._file = event_file_writer.EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")
        # Tells TensorBoard to drop the later steps of earlier files.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(first_step + 1, session_log=start)

    def write(self, step, metrics):
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in metrics.items()]
        self._write(step, summary=self._summary(value=values))

    def _write(self, step, **content):
        self._file.write_event(self._event(wall_time=time.time(), step=step, **content))
        self._file.flush()

    def close(self):
        self._file.close()


@contextlib.contextmanager
def _without_torch():
    """Keeps tensorboardX from importing PyTorch for tensors that it never gets here. That would take seconds,
    and PyTorch may load other CUDA libraries than JAX needs."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # makes `import torch` fail
    try:
        yield
    finally:
        del sys.modules["torch"]


class _Wandb:
    """A W&B run, whose id is stored in <workdir>/wandb_id.txt.

    Rows carry "step" as a metric, and all others are plotted over it. W&B's own counter can only grow, so
    it would lose the steps that are taken again after a resume.
    """

    name = "W&B"

    def __init__(self, config, workdir):
        try:
            from wandb import Settings, init  # `import wandb` would also succeed on a folder of that name
        except ImportError as e:
            raise ValueError(_missing("wandb", e)) from None
        if config.wandb is not True and not hasattr(config.wandb, "to_dict"):
            raise ValueError(
                f"config.wandb is {config.wandb!r}; expected True or a dict of wandb.init's "
                "arguments, such as dict(project='x')."
            )
        kw = {} if config.wandb is True else config.wandb.to_dict()
        kw = {"id": _kept_id(workdir), "resume": "allow", "dir": workdir, **kw}
        if "settings" not in kw and hasattr(Settings(), "finish_timeout"):
            kw["settings"] = Settings(finish_timeout=60)  # or an unreachable server would hang it
        try:
            self._run = init(config=json.loads(config_files.to_json(config)), **kw)
        except Exception as e:
            raise _CannotStart(
                f"config.wandb is set, but W&B doesn't start ({' '.join(str(e).split())}): run "
                "`wandb login`, or set WANDB_MODE=offline."
            ) from None
        self._run.define_metric("*", step_metric="step")

    def write(self, step, metrics):
        self._run.log({"step": step, **metrics})

    def close(self):
        self._run.finish()


def _kept_id(workdir):
    path = os.path.join(workdir, "wandb_id.txt")
    if not os.path.exists(path):
        files.write_text(path, secrets.token_hex(4) + "\n")
    with open(path, encoding="utf-8") as f:
        return f.read().strip()


def _missing(extra, error):
    return (
        f"config.{extra} is set, but {error.name} isn't installed: "
        f"pip install 'paligemma_med[{extra}]', or leave config.{extra} out."
    )
