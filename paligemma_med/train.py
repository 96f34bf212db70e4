"""Trains a config: python -m paligemma_med.train --config=configs/stage1_slake.py --workdir=out/s1

One loop, read from top to bottom in `train`. A workdir gets config.json, metrics.jsonl,
checkpoints/ and eval/; started again on the same workdir, the run goes on from its newest
checkpoint. With --dry_run the step is compiled on abstract arrays and its memory printed: nothing is
written, and neither data nor weights are read, but for the ranks of an adapter that
config.adapter_init names.
"""

import functools
import os
import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import cli, experiment, input_pipeline, preflight, weights
from paligemma_med.checkpoints import keep
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import durations, eval_names
from paligemma_med.models import flops
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.parallel import compilation_cache, distributed, ending, sharding
from paligemma_med.training import (
    describe,
    dry_run,
    find_batch_size,
    interrupts,
    metric_writers,
    optim,
    profiling,
    progress,
    run_files,
)
from paligemma_med.training import step as train_step
from paligemma_med.training.soundness import Soundness


def train(config, workdir, *, profile=None):
    """Runs `config` in `workdir` to its end, or on from the newest checkpoint there.

    Args:
      profile: "10:15" writes a trace of these steps into <workdir>/profile.

    Returns:
      {evaluator name: its metrics at the end}.

    Raises:
      KeyboardInterrupt: stopped by a signal, after a checkpoint of where it was.
    """
    rules = sharding.rules(config, experiment.make_mesh(config))
    with interrupts.Signals() as signals, rules:
        return _train(config, workdir, signals, profile)


def _train(config, workdir, signals, profile):
    experiment.check_training_config(config)
    compilation_cache.start(config.get("compilation_cache", True), workdir)
    run_files.keep_model_init(config, workdir)
    model = experiment.make_model(config)
    tok = experiment.make_tokenizer(config, model)
    mesh = experiment.make_mesh(config)
    evaluators = experiment.make_evaluators(config, model, tok, mesh, workdir)
    keep.check(config, evaluators)
    preflight.check(config, model, tok, mesh)
    os.makedirs(workdir, exist_ok=True)

    # --- What is trained, and for how long ---
    abstract = experiment.abstract_params(config, model)
    trained_names = optim.trained_names(config, list(abstract))
    if distributed.is_main():
        print(describe.describe_params(config, abstract, trained_names), flush=True)
    num_examples = input_pipeline.num_examples(config.input)
    to_steps = functools.partial(durations.to_steps, num_examples=num_examples, batch_size=config.input.batch_size)
    total_steps = to_steps(config, "total")
    if total_steps is None:
        raise ValueError("config says nothing about total_steps, total_epochs or total_examples.")
    to_steps = functools.partial(to_steps, total_steps=total_steps)
    tx, learning_rate = optim.make(
        config,
        trained_names,
        total_steps=total_steps,
        num_examples=num_examples,
        batch_size=config.input.batch_size,
    )

    trace = profiling.Profile(profile, workdir, total_steps)
    writers = metric_writers.open_writers(config, workdir, workdirs.newest_step(workdir) or 0)

    # --- The state: from weights or random, and from a checkpoint where there is one ---
    dtypes = weights.param_dtypes(config, abstract, trained_names)
    kinds = weights.param_kinds(config, abstract, trained_names)
    params, beside = weights.initial_params(config, model, mesh, dtypes=dtypes, kinds=kinds)
    trained = {n: params.pop(n) for n in trained_names}
    frozen = params
    opt_state = jax.jit(tx.init, out_shardings=train_step.opt_shardings(tx, trained, mesh))(trained)
    checkpoints = workdirs.Checkpoints(workdir, keep=config.get("keep_ckpt", 2), best=keep.best_of(workdir, config))
    first_step, gone_on = 0, {}
    if found := checkpoints.restore_newest(trained, opt_state):
        first_step, trained, opt_state, gone_on = found
        frozen |= run_files.own_base(workdir, frozen, beside)
        _say(f"Resumed from step {first_step} of {total_steps} in {workdir}.")
    gone_on = gone_on or {}
    given = {n: x for n, x in frozen.items() if n not in beside}
    run_files.check_base(workdir, config, given, first_step)
    own_base = {n: x for n, x in frozen.items() if n in beside}
    if first_step > total_steps:
        raise ValueError(
            f"{workdir} is at step {first_step} already, but by the config the run has only "
            f"{total_steps} steps: set its length back, or use another --workdir."
        )

    # --- The loop ---
    step_fn = train_step.make_train_step(config, model, tx, learning_rate)
    step_fn = train_step.jit_step(step_fn, tx, trained, mesh)
    log_every = to_steps(config, "log_training", default=50)
    save_every = to_steps(config, "ckpt", default=0)
    bar = progress.Progress(
        first_step,
        total_steps,
        config.input.batch_size,
        flops=flops.count(
            model,
            trained_names,
            res=config.res,
            text_len=config.text_len,
            supervised_len=config.get("supervised_len"),
            loss_chunk=config.get("loss_chunk"),
        ),
        peak=flops.peak(jax.devices()[0], config.get("peak_tflops")),
    )
    batches = input_pipeline.training(
        config.input,
        seed=config.get("seed", 0),
        mesh=mesh,
        eos_token=tok.eos_token,
        start_step=first_step,
        total_steps=total_steps,
        state=gone_on.get("input"),
    )
    soundness = Soundness(config, workdir, batches, skipped=gone_on.get("skipped_steps", 0))

    def is_due(name):
        """Whether this evaluator runs after `step`; always at the end."""
        every = to_steps(evaluators[name][1], "log", default=None)
        return step == total_steps or bool(every and step % every == 0)

    def check():
        soundness.check()
        for row in batches.skipped():
            if distributed.is_main():  # batch i makes step i + 1
                run_files.append(workdir, "skipped.jsonl", row.pop("step") + 1, row)

    def log():
        row = {k: float(v) for k, v in jax.device_get(metrics).items() if k not in _INTERNAL}
        if config.get("skip_nonfinite"):
            row["skipped_steps"] = soundness.skipped
        if (config.input.get("on_error") or "error") != "error":
            row["skipped_examples"] = batches.state()["skipped"]
        row |= bar.measure(step, batches)
        row |= {f"epochs_of_{name}": n for name, n in batches.epochs().items()}
        return row

    def record(values):
        run_files.add_metrics(workdir, step, values)
        writers.write(step, values)

    def save():
        run = {"input": {**batches.state(), "next_step": step}, "skipped_steps": soundness.skipped}
        with bar.paused():
            checkpoints.save(step, trained, opt_state, run)

    def run_evals(done=()):
        for name, (evaluator, _) in evaluators.items():
            if name in done or not is_due(name):
                continue
            with bar.paused():
                found = evaluator.run(unflatten_tree({**frozen, **trained}))
            results[name] = found
            with signals.deferred():
                record({f"{name}/{k}": v for k, v in found.items()})
            shown = [k for k in found if k.endswith("overall/acc")] or list(found)[:5]
            shown = ", ".join(f"{k} {found[k]:.4g}" for k in shown)
            bar.say(f"step {step}/{total_steps}  {name}: {shown}")
            if name == best_name:
                keep.check_metric(config, name, found)

    step, metrics, results = first_step, {}, {}
    best_name, _ = eval_names.split_metric((config.get("keep_best") or {}).get("metric", ""), evaluators)
    try:
        run_files.start(workdir, config, own_base, first_step)  # now that nothing is refused
        if first_step:  # The run may have ended in an eval, after its checkpoint.
            run_evals(done=run_files.evals_at(workdir, first_step, evaluators))
        while step < total_steps:
            batch, before = next(batches), metrics
            trace.step(step, metrics)
            # Stopped in here, a run would have changed its state without having told of it.
            with signals.deferred():
                trained, opt_state, metrics = step_fn(trained, opt_state, frozen, batch, step)
                step += 1
                soundness.add(step, metrics)
                saves = step == total_steps or (save_every and step % save_every == 0)
                saves = saves or (best_name and is_due(best_name))
                logs = saves or step == 1 or (log_every and step % log_every == 0)
                bar.step(step, metrics["training_loss"], wait=logs)
                if logs or step == first_step + 1:
                    check()
                    row = log()
                    bar.print(row)
                if logs:
                    record(row)
                if saves:  # before evals: what fails there costs no training
                    save()
            # Two steps sent off keep the devices busy; each one more would hold a batch there.
            jax.block_until_ready(before)
            run_evals()
            signals.stop_if_agreed(step)
    except KeyboardInterrupt as e:
        bar.close()
        if step > first_step and signals.together(e):
            check()
            save()
            checkpoints.wait()
        _say(f"Stopped at step {step}; the same command goes on from there.", file=sys.stderr)
        raise
    except Exception as e:
        ending.tell_if_peer_lost(e)  # now: what is closed below may wait for it
        raise
    finally:
        bar.close()
        trace.close(metrics)
        batches.close()
        checkpoints.close()
        writers.close()
    return results


# Of a step's metrics, those that are looked at by Soundness alone.
_INTERNAL = ("lost", "finite")


def _say(text, file=None):
    if distributed.is_main():
        print(text, file=file, flush=True)


@cli.command
def main(argv):
    del argv
    values = flags.FLAGS
    distributed.start_from_flags()
    if values.find_batch_size:
        if values.hbm_gib is None:
            raise ValueError("--find_batch_size needs --hbm_gib=…, the memory of a device in GiB.")
        find_batch_size.find_batch_size(values.config, values.hbm_gib)
    elif values.dry_run:
        dry_run.dry_run(values.config, values.hbm_gib)
    elif values.hbm_gib is not None:
        raise ValueError("--hbm_gib is for --dry_run and --find_batch_size alone: give one of them, or leave it out.")
    elif values.workdir is None:
        raise app.UsageError("--workdir is needed (or --dry_run).")
    else:
        train(values.config, values.workdir, profile=values.profile)


if __name__ == "__main__":
    # Here and not above, so that importing this module defines no flags.
    config_flags.DEFINE_config_file("config", None, "Experiment: configs/x.py[:arg=value,…].")
    flags.DEFINE_string("workdir", None, "Folder of the run; created if need be.")
    flags.DEFINE_string("profile", None, "Trace these steps, as first:last, to <workdir>/profile.")
    flags.DEFINE_bool("dry_run", False, "Compile on abstract arrays, print memory and FLOPs, stop.")
    flags.DEFINE_bool("find_batch_size", False, "How many examples at a time fit in --hbm_gib.")
    flags.DEFINE_float("hbm_gib", None, "--dry_run: memory of a device; an error if too small.")
    flags.mark_flag_as_required("config")
    distributed.define_flags()
    app.run(main, flags_parser=cli.parse_flags)
