"""Trains a config: python -m paligemma_med.train --config=configs/stage1_slake.py --workdir=out/s1

One loop, read from top to bottom in `train`. A workdir gets config.json, metrics.jsonl,
checkpoints/ and eval/; started again on the same workdir, the run goes on from its newest
checkpoint. With --dry_run nothing is read or written: the step is compiled on abstract arrays and
its memory printed.
"""

import contextlib
import functools
import json
import math
import os
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
from absl import app, flags, logging
from ml_collections import config_flags

from paligemma_med import durations, experiment, input_pipeline, losses, optim, sharding
from paligemma_med.checkpoints import npz
from paligemma_med.checkpoints import workdir as workdirs


def make_train_step(config, model, tx, learning_rate):
    """The function that takes one optimizer step.

    Returns:
      step(trained, opt_state, frozen, batch, i) → (trained, opt_state, metrics), to be jitted.
      trained, frozen: {name: array}. batch: image float32[B, …], text int32[B, L + 1], mask_ar and
      mask_loss likewise. i: int32[] number of the step, which seeds dropout. Gradients are taken
      with respect to `trained` alone. With config.grad_accum_steps the batch is worked through in
      that many microbatches, whose gradients add up to exactly those of the whole.
    """
    accum = config.get("grad_accum_steps") or 1
    smoothing = config.get("label_smoothing") or 0.0
    dropout_key = jax.random.key(config.get("seed", 0) + 1)

    def loss_fn(trained, frozen, batch, rng):
        params = npz.unflatten_tree({**frozen, **trained})
        # The model reads all but the last token and predicts all but the first.
        text, mask_ar = batch["text"][:, :-1], batch["mask_ar"][:, :-1]
        positions, weights, lost = losses.supervised_positions(
            batch["mask_loss"][:, 1:], config.get("supervised_len")
        )
        logits, _ = model.apply(
            {"params": params}, batch["image"], text, mask_ar, True,
            logit_positions=positions, rngs={"dropout": rng},
        )  # fmt: skip
        labels = jnp.take_along_axis(batch["text"][:, 1:], positions, axis=1)
        nll = losses.cross_entropy(logits, labels, smoothing)
        return jnp.sum(nll * weights * batch["row_weight"][:, None]), lost

    def step(trained, opt_state, frozen, batch, i):
        rng = jax.random.fold_in(dropout_key, i)
        weight = losses.row_weights(batch["mask_loss"][:, 1:], config.get("loss_norm", "example"))
        batch = {**batch, "row_weight": weight}
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        if accum == 1:
            (loss, lost), grads = grad_fn(trained, frozen, batch, rng)
        else:
            # Rows are dealt out so that each device keeps its own in every microbatch.
            micro = jax.tree.map(lambda x: x.reshape(-1, accum, *x.shape[1:]).swapaxes(0, 1), batch)

            def body(total, x):
                out = grad_fn(trained, frozen, x[0], x[1])
                return jax.tree.map(jnp.add, total, out), None

            zero = ((jnp.float32(0), jnp.int32(0)), jax.tree.map(jnp.zeros_like, trained))
            total, _ = jax.lax.scan(body, zero, (micro, jax.random.split(rng, accum)))
            (loss, lost), grads = total
        updates, opt_state = tx.update(grads, opt_state, trained)
        metrics = {
            "training_loss": loss,
            "l2_grads": optim.global_norm(grads),
            "l2_updates": optim.global_norm(updates),
            "lr": learning_rate(i),
            "lost": lost,
        }
        trained = jax.tree.map(lambda p, u: p + u, trained, updates)
        return trained, opt_state, {**metrics, "l2_params": optim.global_norm(trained)}

    return step


def opt_shardings(tx, trained, mesh):
    """Where the optimizer's state lies: moments with their parameter, the rest on every device.

    Args:
      trained: {name: array, or jax.ShapeDtypeStruct with a sharding}.

    Returns:
      The tree of `tx.init(trained)`, of shardings.
    """

    def one(path, leaf):
        owner = trained.get(getattr(path[-1], "key", None))
        fits = owner is not None and owner.shape == leaf.shape
        return owner.sharding if fits else sharding.replicated(mesh)

    return jax.tree_util.tree_map_with_path(one, jax.eval_shape(tx.init, trained))


def jit_step(step, tx, trained, mesh):
    """`step` of `make_train_step`, jitted. What it gives back lies as what it got, or the second
    call would compile anew."""
    out = (
        {n: x.sharding for n, x in trained.items()},
        opt_shardings(tx, trained, mesh),
        sharding.replicated(mesh),
    )
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out)


def train(config, workdir):
    """Runs `config` in `workdir` to its end, or on from the newest checkpoint there.

    Returns:
      {evaluator name: its metrics at the end}.
    """
    _check_config(config)
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
    opt_state = jax.jit(tx.init, out_shardings=opt_shardings(tx, trained, mesh))(trained)
    checkpoints = workdirs.Checkpoints(workdir, keep=config.get("keep_ckpt", 1))
    first_step = checkpoints.latest_step() or 0
    if first_step:
        trained, opt_state = checkpoints.restore(first_step, trained, opt_state)
        frozen |= _own_base(workdir, frozen, beside)
        print(f"Resumed from step {first_step} of {total_steps} in {workdir}.", flush=True)
    own_base = {n: x for n, x in frozen.items() if n in beside}
    _start_workdir(workdir, config, own_base, first_step)

    # --- The loop ---
    step_fn = jit_step(make_train_step(config, model, tx, learning_rate), tx, trained, mesh)
    log_every = to_steps(config, "log_training", default=50)
    save_every = to_steps(config, "ckpt", default=0)
    progress = Progress(first_step, total_steps, config.input.batch_size)
    results = {}
    batches = input_pipeline.training(
        config.input, seed=config.get("seed", 0), mesh=mesh, eos_token=tok.eos_token,
        start_step=first_step, total_steps=total_steps,
    )  # fmt: skip

    def run_evals(done=()):
        for name, (evaluator, when) in evaluators.items():
            if name not in done and _is_due(step, total_steps, when, to_steps):
                with progress.paused():
                    found = evaluator.run(npz.unflatten_tree({**frozen, **trained}))
                results[name] = found
                _add_metrics(workdir, step, {f"{name}/{k}": v for k, v in found.items()})
                shown = [k for k in found if k.endswith("overall/acc")] or list(found)[:5]
                shown = ", ".join(f"{k} {found[k]:.4g}" for k in shown)
                print(f"step {step}/{total_steps}  {name}: {shown}", flush=True)

    step, metrics, lost = first_step, {}, []
    try:
        if first_step:  # The run may have ended in an eval, after its checkpoint.
            run_evals(done=_evals_at(workdir, first_step))
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
                row |= progress.measure(step, batches)
                row |= {f"epochs_of_{name}": n for name, n in batches.epochs().items()}
                _add_metrics(workdir, step, row)
                progress.print(row)
            if saves:  # before evals: what fails there costs no training
                with progress.paused():
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


def _check_config(config):
    experiment.check_config(config)
    if missing := [k for k in ("input", "optax_name", "lr") if k not in config]:
        raise ValueError(f"config lacks {missing}, which training needs.")
    size, accum = config.input.batch_size, config.get("grad_accum_steps") or 1
    if size % accum:
        raise ValueError(
            f"config.input.batch_size = {size} doesn't divide by config.grad_accum_steps = {accum}."
        )


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


def _own_base(workdir, frozen, beside):
    """Of the frozen leaves, those that model_init doesn't give, as the run has had them from its
    start: {name: array}."""
    path = os.path.join(workdir, "base.npz")
    expected = {n: x for n, x in frozen.items() if n in beside}
    if not expected or not os.path.exists(path):
        return {}
    host = npz.flatten_tree(npz.load_npz(path))
    if host.keys() != expected.keys():
        raise npz.CheckpointError(f"{path} holds other parameters than the config freezes.")
    return {n: jax.device_put(host[n].astype(x.dtype), x.sharding) for n, x in expected.items()}


def _start_workdir(workdir, config, own_base, first_step):
    """Writes config.json and the frozen leaves that model_init doesn't give; trims metrics after
    resume."""
    text = experiment.config_to_json(config)
    path = os.path.join(workdir, "config.json")
    if first_step and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            if f.read() != text:
                logging.warning("%s differs from the config given; it is overwritten.", path)
    _write_atomically(path, text)
    base = os.path.join(workdir, "base.npz")
    if not first_step:  # An older one may stand there, of a run that never made a checkpoint.
        if own_base:
            npz.save_npz(base, npz.unflatten_tree(jax.device_get(own_base)))
        elif os.path.exists(base):
            os.remove(base)
    # Steps after the checkpoint are taken again, and would stand twice.
    metrics = os.path.join(workdir, "metrics.jsonl")
    if os.path.exists(metrics):
        with open(metrics, encoding="utf-8") as f:
            lines = [s for s in f if s.endswith("\n") and json.loads(s)["step"] <= first_step]
        _write_atomically(metrics, "".join(lines))


def _write_atomically(path, text):
    with open(path + ".tmp", "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + ".tmp", path)


def _metrics_of(line, step):
    row = json.loads(line)
    return row if row["step"] == step else {}


def _evals_at(workdir, step):
    """Names of the evaluators that have metrics of `step`."""
    with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as f:
        return {k.partition("/")[0] for line in f for k in _metrics_of(line, step) if "/" in k}


def _add_metrics(workdir, step, metrics):
    """One object a step: to that of `step`, if there is one already, `metrics` are added."""
    path = os.path.join(workdir, "metrics.jsonl")
    if any("/" in k for k in metrics) and os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            lines = f.readlines()
        if lines and (row := _metrics_of(lines[-1], step)):
            _write_atomically(path, "".join(lines[:-1]) + json.dumps({**row, **metrics}) + "\n")
            return
    with open(path, "a", encoding="utf-8") as f:
        f.write(json.dumps({"step": step, **metrics}) + "\n")
        f.flush()
        os.fsync(f.fileno())


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


def dry_run(config):
    """Compiles the train step on abstract arrays and prints what it takes; touches no files.

    Returns:
      dict of the printed figures, in GiB per device.
    """
    _check_config(config)
    model = experiment.make_model(config)
    mesh = experiment.make_mesh(config)
    abstract = experiment.abstract_params(config, model)
    names = optim.trained_names(config, list(abstract))
    print(experiment.describe_params(config, abstract, names), flush=True)
    tx, learning_rate = optim.make(
        config, names, total_steps=10_000, num_examples=10_000, batch_size=config.input.batch_size
    )
    dtypes = experiment.param_dtypes(config, abstract, names)
    shardings = experiment.param_shardings(config, abstract, mesh)
    params = {
        n: jax.ShapeDtypeStruct(x.shape, dtypes[n], sharding=shardings[n])
        for n, x in abstract.items()
    }
    trained = {n: params.pop(n) for n in names}
    opt_state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        jax.eval_shape(tx.init, trained), opt_shardings(tx, trained, mesh),
    )  # fmt: skip
    size, length = config.input.batch_size, config.text_len + 1
    rows = sharding.batch_sharding(mesh)
    batch = {
        "image": jax.ShapeDtypeStruct((size, config.res, config.res, 3), "float32", sharding=rows),
        **{
            k: jax.ShapeDtypeStruct((size, length), "int32", sharding=rows)
            for k in ("text", "mask_ar", "mask_loss")
        },
    }
    started = time.monotonic()
    step_fn = jit_step(make_train_step(config, model, tx, learning_rate), tx, trained, mesh)
    i = jax.ShapeDtypeStruct((), "int32")
    compiled = step_fn.lower(trained, opt_state, params, batch, i).compile()
    memory = compiled.memory_analysis()

    def gib(tree):
        shapes = [(x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(tree)]
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes) / 2**30

    out = {
        "frozen parameters": gib(params),
        "trained parameters": gib(trained),
        "optimizer state": gib(opt_state),
        "batch": gib(batch),
        "compiled: arguments": memory.argument_size_in_bytes / 2**30,
        "compiled: temporary": memory.temp_size_in_bytes / 2**30,
    }
    devices = jax.devices()
    print(f"Compiled in {time.monotonic() - started:.0f} s for {len(devices)} × "
          f"{devices[0].device_kind}; on each, GiB:")  # fmt: skip
    for name, value in out.items():
        print(f"  {name:<22} {value:8.3f}")
    return out


@experiment.command
def main(argv):
    del argv
    values = flags.FLAGS
    if values.dry_run:
        dry_run(values.config)
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
