"""Trains a config: python -m paligemma_med.train --config=configs/stage1_slake.py --workdir=out/s1

`train` sets up a run, `Run.run` is its loop. A workdir gets config.json, metrics.jsonl, checkpoints/ and eval/;
started again on the same workdir, the run resumes from its newest checkpoint. With --dry_run no data are read and
nothing is written: the step is compiled on abstract arrays and its memory printed.
"""

import contextlib
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli, experiment, input_pipeline, preflight
from paligemma_med.checkpoints import keep
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import eval_names
from paligemma_med.config import values as config_values
from paligemma_med.metrics import text_metrics
from paligemma_med.models import flops
from paligemma_med.parallel import chips, compilation_cache, distributed, ending, notes, sharding
from paligemma_med.pp import command_line
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import (
    describe,
    dry_run,
    find_batch_size,
    interrupts,
    metric_writers,
    profiling,
    progress,
    run_files,
    tokens_seen,
)
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step
from paligemma_med.training.soundness import Soundness


def train(config, workdir, *, profile=None) -> dict[str, dict]:
    """Runs `config` in `workdir` to its end, resuming from the newest checkpoint there.

    Args:
      config: ConfigDict; not changed.
      profile: "10:15" writes a trace of these steps into <workdir>/profile.

    Returns:
      {evaluator name: its metrics at the end}.

    Raises:
      ValueError, OSError: the run can't start, or another one is in `workdir`, in one sentence.
      FloatingPointError: loss, gradient or parameters aren't finite.
      KeyboardInterrupt: stopped by a signal, after saving a checkpoint.
    """
    config = config_values.checked_for_training(config)
    setup = TrainingSetup(run_files.with_pinned_init(config, workdir))
    compilation_cache.start(setup.config.get("compilation_cache", True), workdir)
    with interrupts.Signals() as signals, sharding.rules(setup.config, setup.mesh):
        with notes.stage("opening data sets"):
            evaluators = _open(setup, workdir)
        with run_files.sole_use(workdir):
            notes.say(describe.start(setup))
            return Run(setup, workdir, evaluators, signals, profile).run()


def _open(setup, workdir):
    """The evaluators of a run, after every check that can be made before weights are read."""
    evaluators = experiment.make_evaluators(setup.config, setup.model, setup.tokenizer, setup.mesh, workdir)
    keep.check(setup.config, evaluators)
    preflight.check(setup)
    return evaluators


class Run:
    """A run from start to end: its state, and the resources it holds."""

    def __init__(self, setup, workdir, evaluators, signals, profile):
        """
        Args:
          setup: TrainingSetup.
          evaluators: from `experiment.make_evaluators`.
          signals: `interrupts.Signals`, entered.
          profile: see `train`.
        """
        config = self.config = setup.config
        self.setup, self.workdir, self.evaluators, self.signals = setup, workdir, evaluators, signals
        self.total_steps = setup.total_steps
        self.log_every = setup.to_steps(config, "log_training", default=50)
        self.save_every = setup.to_steps(config, "ckpt", default=0)
        best = (config.get("keep_best") or {}).get("metric", "")
        self.best_evaluator, _ = eval_names.split_metric(best, evaluators)
        text_metrics.require(best)
        self.metrics, self.results = {}, {}  # the latest step's, on the devices; each evaluator's latest

        self.trace = profiling.Profile(profile, workdir, setup.total_steps)
        self.writers = metric_writers.open_writers(config, workdir, workdirs.newest_step(workdir) or 0)
        self.checkpoints = workdirs.Checkpoints(
            workdir, keep=config.get("keep_ckpt", 2), best=keep.best_of(workdir, config)
        )
        self.state = self._first_state()
        self.first_step = self.state.step
        self.step_fn = train_step.jitted(setup, self.state.trained)
        self.bar = progress.Progress(
            self.first_step,
            self.total_steps,
            config.input.batch_size,
            flops=setup.flops_per_example,
            peak=flops.peak(jax.devices()[0], config.get("peak_tflops")),
        )
        self.batches = input_pipeline.training(
            config.input,
            seed=config.get("seed", 0),
            mesh=setup.mesh,
            eos_token=setup.tokenizer.eos_token,
            start_step=self.first_step,
            total_steps=self.total_steps,
            state=self.state.input,
            sets=setup.data,
        )
        self.tokens = tokens_seen.TokensSeen(self.state.tokens_seen)
        self.soundness = Soundness(config, workdir, self.batches, skipped=self.state.skipped_steps)

    def _first_state(self):
        """The initial state, or that of the newest checkpoint."""
        init = self.config.get("model_init")
        with notes.stage(f"reading the weights of {init}" if init else "drawing random weights"):
            state = states.initial(self.setup)
        with notes.stage("reading the newest checkpoint"):
            state = states.restore(state, self.checkpoints, self.workdir)
        if state.step:
            notes.say(f"Resumed from step {state.step} of {self.total_steps} in {self.workdir}.")
        with notes.stage("comparing the frozen weights with those that the run began with"):
            run_files.check_base(self.workdir, self.config, state.base_leaves, state.step)
        if state.step > self.total_steps:
            raise ValueError(
                f"{self.workdir} is at step {state.step} already, but by the config the run has only "
                f"{self.total_steps} steps: set its length back, or use another --workdir."
            )
        return state

    def run(self) -> dict[str, dict]:
        """The loop; returns what `train` does."""
        state = self.state
        try:
            run_files.start(self.workdir, self.config, state.kept_leaves, state.step)  # all checks passed
            if state.step:  # the run may have ended in an eval, after its checkpoint
                self.evaluate(done=run_files.evals_at(self.workdir, state.step, self.evaluators))
            while state.step < self.total_steps:
                self.take_step()
                self.evaluate()
                self.signals.stop_if_agreed(state.step)
        except KeyboardInterrupt as e:
            self.bar.close()
            if state.step > self.first_step and self.signals.together(e):
                self.check()
                self.save()
                self.checkpoints.wait()
            notes.say(f"Stopped at step {state.step}; run the same command to resume.", file=sys.stderr)
            raise
        except Exception as e:
            ending.tell_if_peer_lost(e)  # first, since closing below may wait for that process
            raise
        finally:
            self.bar.close()
            self.trace.close(self.metrics)
            self.batches.close()
            self.checkpoints.close()
            self.writers.close()
        return self.results

    def take_step(self) -> None:
        """One step, then metrics and a checkpoint if they are due: before the evals, so that a failure there costs
        no training."""
        state = self.state
        batch, before = next(self.batches), self.metrics
        self.trace.step(state.step, self.metrics)
        # A signal waits until the end: a run whose state changed without being recorded couldn't be resumed.
        with self.signals.deferred():
            with self._compiling():
                state.trained, state.opt_state, self.metrics = self.step_fn(
                    state.trained, state.opt_state, state.frozen, batch, state.step
                )
            state.step += 1
            self.soundness.add(state.step, self.metrics)
            self.tokens.add(self.metrics)
            saves = self.saves()
            logs = saves or state.step == 1 or _divides(self.log_every, state.step)
            self.bar.step(state.step, self.metrics["training_loss"], wait=logs)
            if logs or state.step == self.first_step + 1:
                self.check()
                row = self.measure()
                self.bar.print(row)
            if logs:
                self.record(row)
            if saves:
                self.save()
        # Two dispatched steps keep the devices busy; each further one would hold another batch there.
        jax.block_until_ready(before)

    def _compiling(self):
        """The first call of the step compiles it."""
        first = self.state.step == self.first_step
        return notes.stage("compiling the train step", self.bar.say) if first else contextlib.nullcontext()

    def saves(self) -> bool:
        """Whether a checkpoint is due: always at the end, and when config.keep_best needs one for an eval."""
        step = self.state.step
        best = self.best_evaluator and self.is_due(self.best_evaluator)
        return step == self.total_steps or _divides(self.save_every, step) or bool(best)

    def is_due(self, name) -> bool:
        """Whether this evaluator runs after the latest step; always at the end."""
        _, section = self.evaluators[name]
        every = self.setup.to_steps(section, "log", default=None)
        return self.state.step == self.total_steps or _divides(every, self.state.step)

    def check(self) -> None:
        """Raises like `Soundness.check`; records which examples were skipped."""
        self.soundness.check()
        for row in self.batches.skipped():
            if distributed.is_main():  # batch i makes step i + 1
                run_files.append(self.workdir, "skipped.jsonl", row.pop("step") + 1, row)

    def measure(self) -> dict:
        """{name: number} of the latest step, after waiting for it."""
        row = {k: float(v) for k, v in jax.device_get(self.metrics).items() if k not in _INTERNAL}
        row |= self.tokens.read() or {}
        if self.config.get("skip_nonfinite"):
            row["skipped_steps"] = self.soundness.skipped
        if (self.config.input.get("on_error") or "error") != "error":
            row["skipped_examples"] = self.batches.state()["skipped"]
        row |= self.bar.measure(self.state.step, self.batches)
        row |= {f"epochs_of_{name}": n for name, n in self.batches.epochs().items()}
        return row

    def record(self, values) -> None:
        """Adds numbers to the row of the latest step, in metrics.jsonl and the other writers."""
        run_files.add_metrics(self.workdir, self.state.step, values)
        self.writers.write(self.state.step, values)

    def save(self) -> None:
        state = self.state
        state.input = {**self.batches.state(), "next_step": state.step}
        state.skipped_steps, state.tokens_seen = self.soundness.skipped, self.tokens.read()
        with self.bar.paused():
            states.save(state, self.checkpoints)

    def evaluate(self, done=()) -> None:
        """Runs the evaluators that are due, except those in `done`."""
        for name, (evaluator, section) in self.evaluators.items():
            if name in done or not self.is_due(name):
                continue
            with self.bar.paused():
                state = self.state
                metrics = evaluator.run(state.averaged_params if section.get("ema", True) else state.params)
            self.results[name] = metrics
            with self.signals.deferred():
                # Also where no other metrics are logged: a curve of losses is drawn over tokens seen.
                self.record({f"{name}/{k}": v for k, v in metrics.items()} | (self.tokens.read() or {}))
            shown = [k for k in metrics if k.endswith(("overall/acc", "overall/iou"))] or list(metrics)[:5]
            shown = ", ".join(f"{k} {metrics[k]:.4g}" for k in shown)
            self.bar.say(f"step {self.state.step}/{self.total_steps}  {name}: {shown}")
            if name == self.best_evaluator:
                keep.check_metric(self.config, name, metrics)


def _forecast(config, values):
    """--dry_run and --find_batch_size, for this machine's devices or for --chip."""
    with chips.aimed_at(values.chip) as chip:
        if not values.find_batch_size:
            dry_run.dry_run(config, values.hbm_gib)
            return
        if values.hbm_gib is None and chip is None:
            raise ValueError("--find_batch_size needs --hbm_gib=…, the memory of a device in GiB, or --chip=….")
        find_batch_size.find_batch_size(config, values.hbm_gib or chip.memory / 2**30)


# Metrics of a step that only Soundness and TokensSeen read.
_INTERNAL = ("lost", "finite", *tokens_seen.NAMES)


def _divides(every, step):
    return bool(every) and step % every == 0


@cli.command
def main(argv) -> None:
    del argv
    values = flags.FLAGS
    distributed.start_from_flags()
    config = cli.with_weight_flags(values.config)
    if values.find_batch_size or values.dry_run:
        _forecast(config, values)
    elif values.chip is not None:
        raise ValueError("--chip is for --dry_run and --find_batch_size alone: give one of them, or leave it out.")
    elif values.hbm_gib is not None:
        raise ValueError("--hbm_gib is for --dry_run and --find_batch_size alone: give one of them, or leave it out.")
    elif values.workdir is None:
        raise app.UsageError("--workdir is needed (or --dry_run).")
    else:
        train(config, values.workdir, profile=values.profile)


if __name__ == "__main__":
    # Here and not at the top, so that importing this module defines no flags.
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    command_line.define_path("workdir", None, "Folder of the run; created if need be.")
    flags.DEFINE_string("profile", None, "Trace these steps, as first:last, to <workdir>/profile.")
    flags.DEFINE_bool("dry_run", False, "Compile on abstract arrays, print memory and FLOPs, stop.")
    flags.DEFINE_bool("find_batch_size", False, "How many examples at a time fit in --hbm_gib.")
    flags.DEFINE_string(
        "chip", None, "--dry_run, --find_batch_size: compile for this chip, not for what is here: h200, v5e:4x4, …"
    )
    flags.DEFINE_float("hbm_gib", None, "--dry_run: memory of a device; an error if too small.")
    cli.define_weight_flags()
    flags.mark_flag_as_required("config")
    distributed.define_flags()
    app.run(main, flags_parser=cli.parse_flags)
