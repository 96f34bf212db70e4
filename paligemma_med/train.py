"""Trains a config: python -m paligemma_med.train --config=configs/stage1_slake.py --workdir=out/s1

One loop, read from top to bottom in `train`. A workdir gets config.json, metrics.jsonl,
checkpoints/ and eval/; started again on the same workdir, the run goes on from its newest
checkpoint. With --dry_run nothing is read or written: the step is compiled on abstract arrays and
its memory printed.
"""

import contextlib
import functools
import math
import os
import signal
import sys
import threading

import jax
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import (
    dry_run,
    durations,
    experiment,
    input_pipeline,
    optim,
    progress,
    run_files,
    train_step,
)
from paligemma_med.checkpoints import npz
from paligemma_med.checkpoints import workdir as workdirs


def train(config, workdir):
    """Runs `config` in `workdir` to its end, or on from the newest checkpoint there.

    Returns:
      {evaluator name: its metrics at the end}.
    """
    experiment.check_training_config(config)
    _keep_model_init(config, workdir)
    model = experiment.make_model(config)
    tok = experiment.make_tokenizer(config, model)
    mesh = experiment.make_mesh(config)
    evaluators = experiment.make_evaluators(config, model, tok, mesh, workdir)
    os.makedirs(workdir, exist_ok=True)

    # --- What is trained, and for how long ---
    abstract = experiment.abstract_params(config, model)
    trained_names = optim.trained_names(config, list(abstract))
    print(experiment.describe_params(config, abstract, trained_names), flush=True)
    num_examples = input_pipeline.num_examples(config.input)
    to_steps = functools.partial(
        durations.to_steps, num_examples=num_examples, batch_size=config.input.batch_size
    )
    total_steps = to_steps(config, "total")
    if total_steps is None:
        raise ValueError("config says nothing about total_steps, total_epochs or total_examples.")
    to_steps = functools.partial(to_steps, total_steps=total_steps)
    tx, learning_rate = optim.make(
        config, trained_names, total_steps=total_steps, num_examples=num_examples,
        batch_size=config.input.batch_size,
    )  # fmt: skip

    # --- The state: from a checkpoint, from weights, or random ---
    dtypes = experiment.param_dtypes(config, abstract, trained_names)
    params, beside = experiment.initial_params(config, model, mesh, dtypes=dtypes)
    trained = {n: params.pop(n) for n in trained_names}
    frozen = params
    opt_state = jax.jit(tx.init, out_shardings=train_step.opt_shardings(tx, trained, mesh))(trained)
    checkpoints = workdirs.Checkpoints(workdir, keep=config.get("keep_ckpt", 1))
    first_step = checkpoints.latest_step() or 0
    if first_step:
        trained, opt_state = checkpoints.restore(first_step, trained, opt_state)
        frozen |= run_files.own_base(workdir, frozen, beside)
        print(f"Resumed from step {first_step} of {total_steps} in {workdir}.", flush=True)
    own_base = {n: x for n, x in frozen.items() if n in beside}
    run_files.start_workdir(workdir, config, own_base, first_step)

    # --- The loop ---
    step_fn = train_step.make_train_step(config, model, tx, learning_rate)
    step_fn = train_step.jit_step(step_fn, tx, trained, mesh)
    log_every = to_steps(config, "log_training", default=50)
    save_every = to_steps(config, "ckpt", default=0)
    bar = progress.Progress(first_step, total_steps, config.input.batch_size)
    results = {}
    batches = input_pipeline.training(
        config.input, seed=config.get("seed", 0), mesh=mesh, eos_token=tok.eos_token,
        start_step=first_step, total_steps=total_steps,
    )  # fmt: skip

    def run_evals(done=()):
        for name, (evaluator, when) in evaluators.items():
            if name not in done and _is_due(step, total_steps, when, to_steps):
                with bar.paused():
                    found = evaluator.run(npz.unflatten_tree({**frozen, **trained}))
                results[name] = found
                run_files.add_metrics(workdir, step, {f"{name}/{k}": v for k, v in found.items()})
                shown = [k for k in found if k.endswith("overall/acc")] or list(found)[:5]
                shown = ", ".join(f"{k} {found[k]:.4g}" for k in shown)
                print(f"step {step}/{total_steps}  {name}: {shown}", flush=True)

    step, metrics, lost = first_step, {}, []
    try:
        if first_step:  # The run may have ended in an eval, after its checkpoint.
            run_evals(done=run_files.evals_at(workdir, first_step))
        while step < total_steps:
            batch = next(batches)
            with _interrupt_deferred():
                trained, opt_state, metrics = step_fn(trained, opt_state, frozen, batch, step)
                step += 1
            lost.append(metrics["lost"])
            saves = step == total_steps or (save_every and step % save_every == 0)
            logs = step in (first_step + 1, total_steps) or (log_every and step % log_every == 0)
            if saves or logs:
                row = _check_metrics(metrics, lost, step, config)
                row |= bar.measure(step, batches)
                row |= {f"epochs_of_{name}": n for name, n in batches.epochs().items()}
                run_files.add_metrics(workdir, step, row)
                bar.print(row)
            if saves:  # before evals: what fails there costs no training
                with bar.paused():
                    checkpoints.save(step, trained, opt_state)
            run_evals()
    except KeyboardInterrupt:
        if step > first_step:
            _check_metrics(metrics, lost, step, config)
            checkpoints.save(step, trained, opt_state)
        print(f"Stopped at step {step}; the same command goes on from there.", file=sys.stderr)
        raise
    finally:
        batches.close()
        checkpoints.wait()
        checkpoints.close()
    return results


def _keep_model_init(config, workdir):
    """A run that is resumed goes on from the very step of another run that it started from."""
    if workdirs.newest_step(workdir) is not None:
        old = workdirs.read_config(workdir).get("model_init")
        init = config.get("model_init")
        if isinstance(old, str) and isinstance(init, str):
            if old.rpartition("@")[0] == os.path.abspath(os.path.expanduser(init)):
                with config.unlocked():
                    config.model_init = old


def _is_due(step, total_steps, when, to_steps):
    """Whether an evaluator whose config section is `when` runs after `step`; always at the end."""
    every = to_steps(when, "log", default=None)
    return step == total_steps or bool(every and step % every == 0)


def _check_metrics(metrics, lost, step, config):
    """A step's metrics as floats, once they are found sound.

    Args:
      metrics: of the last step. What isn't finite once remains so: the last step tells of all.
      lost: `lost` of every step since the last call, whose list is then empty.
    """
    total = sum(map(int, jax.device_get(lost)))
    lost.clear()
    if total:
        raise ValueError(
            f"Step {step}: {total} supervised tokens lie beyond config.supervised_len = "
            f"{config.supervised_len} of their row: raise it."
        )
    out = {k: float(v) for k, v in jax.device_get(metrics).items() if k != "lost"}
    for name in ("training_loss", "l2_grads", "l2_params"):
        if not math.isfinite(out[name]):
            raise FloatingPointError(f"Step {step}: {name} is {out[name]}.")
    return out


@contextlib.contextmanager
def _interrupt_deferred():
    """Ctrl-C in this context takes effect at its end: in the middle of a step, the old parameters
    are given away and the new ones not there yet."""
    usual = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(usual):
        yield
        return
    caught = []
    signal.signal(signal.SIGINT, lambda *args: caught.append(args))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
    if caught:
        usual(*caught[0])


@experiment.command
def main(argv):
    del argv
    values = flags.FLAGS
    if values.dry_run:
        dry_run.dry_run(values.config)
    elif values.workdir is None:
        raise app.UsageError("--workdir is needed (or --dry_run).")
    else:
        train(values.config, values.workdir)


if __name__ == "__main__":
    # Here and not above, so that importing this module defines no flags.
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    flags.DEFINE_string("workdir", None, "Folder of the run; created if need be.")
    flags.DEFINE_bool("dry_run", False, "Compile on abstract arrays, print memory, stop.")
    flags.mark_flag_as_required("config")
    app.run(main)
