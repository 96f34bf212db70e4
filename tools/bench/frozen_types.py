"""What frozen weights in fewer bits cost: logits and answers compared with float32's, and a step's time.

    python -m tools.bench.frozen_types --workdir=out/slake_mini --out=out/frozen_types
    python -m tools.bench.frozen_types --rounds=5

The first runs the evals of a run's config with its weights in each type; activations are float32, so
that nothing else differs. Logits are those of the first answer token of --batches batches. The second
times LoRA steps of the size bench-s (float32 activations, random weights), taking turns in one process;
with other work on the machine, use one core (taskset) and read the processor time.
"""

import os
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import ConfigDict

from paligemma_med import experiment, input_pipeline, quantise, weights
from paligemma_med.checkpoints import workdir
from paligemma_med.config import files as config_files
from paligemma_med.parallel import sharding
from paligemma_med.pp import command_line, markdown
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import state as states
from paligemma_med.training import step as train_step
from tools.bench import sizes

TYPES = ("float32", "bfloat16", *quantise.KINDS)


def ask(folder, dtype, out, batches) -> tuple:
    """(logits float32[questions, V] of first answer tokens, {eval: metrics}) with a run's weights in
    `dtype`; predictions go to out/<dtype>."""
    config = config_files.from_json(workdir.read_config(folder))
    with config.unlocked():
        config.frozen_dtype, config.dtype = dtype, "float32"
    model, tok, mesh, params = weights.load(config, folder)

    @jax.jit
    def run(params, batch):
        args = (batch[k] for k in ("image", "text", "mask_ar"))
        logits, _ = model.apply({"params": params}, *args)
        last = jnp.sum(batch["mask_input"], axis=1, dtype=jnp.int32) - 1
        return jnp.take_along_axis(logits, last[:, None, None], axis=1)[:, 0]

    section = next(iter(config.evals.values()))
    inputs = input_pipeline.evaluation(section.data.to_dict(), section.pp_fn, section.batch_size, mesh=mesh)
    found = []
    for _, batch in zip(range(batches), inputs):
        batch = batch[0] if isinstance(batch, tuple) else batch
        wanted = {k: batch[k] for k in ("image", "text", "mask_ar", "mask_input")}
        found.append(np.asarray(run(params, wanted)))
    evals = experiment.make_evaluators(config, model, tok, mesh, os.path.join(out, dtype))
    return np.concatenate(found), {name: e.run(params) for name, (e, _) in evals.items()}


def compare(logits, exact) -> dict:
    """{what: number} for logits compared with the exact ones."""
    p, q = (np.asarray(jax.nn.log_softmax(x)) for x in (exact, logits))
    error, kl = np.abs(logits - exact), np.sum(np.exp(p) * (p - q), -1)
    same = np.mean(logits.argmax(-1) == exact.argmax(-1))
    return dict(max=error.max(), mean=error.mean(), kl=kl.mean(), worst_kl=kl.max(), same_top=same)


def make_step(dtype, size, rows) -> Callable:
    """A function () → loss that takes a LoRA step with frozen weights in `dtype` and waits for it."""
    tower = dict(remat_policy=size.remat_policy, scan=size.scan)
    config = ConfigDict(
        dict(
            sizes.optimizer(),
            model=dict(img=size.img | tower, llm=size.llm | tower),
            lora=sizes.LORA,
            res=size.res,
            text_len=size.text_len,
            tokenizer="tiny",
            frozen_dtype=dtype,
            supervised_len=size.answer_len,
            schedule=[(sizes.TRAINED["lora"], dict(decay_type="constant")), (".*", None)],
            input=dict(data={}, batch_size=rows),
        )
    )
    mesh = sharding.make_mesh([("data", 1)], jax.devices()[:1])
    setup = TrainingSetup.without_data(config, mesh=mesh)
    rng = np.random.default_rng(0)
    host = {n: 0.02 * rng.standard_normal(x.shape, np.float32) for n, x in setup.abstract.items()}
    state = states.of_params(setup, weights.place_params(host, setup))
    step = train_step.jitted(setup, state.trained)
    batch = jax.device_put(sizes.draw_batch(size, rows), sharding.batch_sharding(mesh))

    def run():
        state.trained, state.opt_state, metrics = step(
            state.trained, state.opt_state, state.frozen, batch, jnp.int32(1)
        )
        return float(metrics["training_loss"])

    return run


def main(argv) -> None:
    del argv
    v = flags.FLAGS
    if v.workdir:
        head = (
            "frozen",
            "largest error of a logit",
            "mean",
            "mean KL",
            "worst KL",
            "same most probable token",
            "exact match",
        )
        print(markdown.head(head))
        exact = None
        for dtype in TYPES:
            logits, found = ask(v.workdir, dtype, v.out, v.batches)
            exact = logits if exact is None else exact
            c = compare(logits, exact)
            match = ", ".join(f"{100 * m['model/overall/acc']:.2f}" for m in found.values())
            kl, worst = f"{c['kl']:.1e}", f"{c['worst_kl']:.1e}"
            cells = [dtype, f"{c['max']:.3f}", f"{c['mean']:.4f}", kl, worst, f"{c['same_top']:.3f}", match]
            print(markdown.row(cells), flush=True)
        return
    size = sizes.SIZES[v.size]
    steps = {dtype: make_step(dtype, size, size.batch_size) for dtype in TYPES}
    losses = {dtype: step() for dtype, step in steps.items()}  # compiles
    seconds, processor = ({dtype: [] for dtype in TYPES} for _ in range(2))
    for _ in range(v.rounds):
        for dtype, step in steps.items():
            start, spent = time.monotonic(), time.process_time()
            step()
            seconds[dtype].append(time.monotonic() - start)
            processor[dtype].append(time.process_time() - spent)
    print(markdown.head(["frozen", "loss", "seconds", "processor's", "ratio to float32"]))
    for dtype in TYPES:
        a, b = (np.median(x[dtype]) for x in (seconds, processor))
        ratio = b / np.median(processor["float32"])
        print(markdown.row([dtype, f"{losses[dtype]:.4f}", f"{a:.3f}", f"{b:.3f}", f"{ratio:.3f}"]))


if __name__ == "__main__":
    command_line.define_path("workdir", None, "A run, whose evals are asked.")
    command_line.define_path("out", "frozen_types", "Folder of their predictions.")
    flags.DEFINE_integer("batches", 4, "Of the first eval, whose logits are compared.")
    flags.DEFINE_enum("size", "bench-s", sorted(sizes.SIZES), "Of the timed step.")
    flags.DEFINE_integer("rounds", 5, "Steps of each type, by turns.")
    app.run(main, flags_parser=command_line.parse_flags)
