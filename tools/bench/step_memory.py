"""What --dry_run predicts for a training step's memory, compared with what the step really takes.

    python -m tools.bench.step_memory
    python -m tools.bench.step_memory --config=configs/stage1_slake.py

Compiles the step like the dry run, makes random weights and batches, takes a few steps, and compares. On
a GPU or TPU the device reports its peak. On a CPU it is the growth of the process's resident memory since
just before the weights were made; each case has a separate process. Without --config: models of 0.6 to
1.5 GB, trained fully, by LoRA and only in the head.
"""

import json
import subprocess
import sys

import jax
import ml_collections
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from paligemma_med.parallel import sharding
from paligemma_med.pp import command_line, markdown
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from tools.bench.workers import forget_peak, resident

CONSTANT = dict(decay_type="constant")
LORA = [("(img/Transformer|llm/layers)/.*", dict(rank=16))]
FACTORS = [(".*/lora_[ab]", CONSTANT), (".*", None)]
HEAD = [("img/head/.*", CONSTANT), (".*", None)]
CASES = {
    "all": dict(schedule=CONSTANT, depth=4),
    "all, 4 accumulated": dict(schedule=CONSTANT, depth=4, grad_accum_steps=4),
    "all, nothing remade": dict(schedule=CONSTANT, depth=4, remat_policy="none"),
    "lora": dict(schedule=FACTORS, lora=LORA, depth=12),
    "lora, bfloat16": dict(schedule=FACTORS, lora=LORA, depth=12, dtype="bfloat16", frozen_dtype="bfloat16"),
    "head": dict(schedule=HEAD, depth=12),
}


def make_config(depth, remat_policy="nothing_saveable", **kw) -> ml_collections.ConfigDict:
    """A model of 24 M parameters plus 8.5 M per layer of the language model."""
    c = ml_collections.ConfigDict()
    c.res, c.text_len, c.tokenizer, c.supervised_len = 112, 48, "tiny", 16
    c.model = dict(
        img=dict(variant="S/14", depth=4, remat_policy=remat_policy),
        llm=dict(
            width=1024,
            depth=depth,
            mlp_dim=4096,
            num_heads=8,
            num_kv_heads=1,
            head_dim=128,
            vocab_size=16_384,
            remat_policy=remat_policy,
        ),
    )
    c.input = dict(batch_size=16)
    c.optax_name, c.lr = "scale_by_adam", 1e-4
    for key, value in kw.items():
        c[key] = value
    return c


def draw_leaf(x) -> jax.Array:
    """Random numbers with the shape, type and sharding of `x`; one leaf at a time, so that making them
    needs less memory than a step."""
    draw = jax.jit(lambda key: 0.02 * jax.random.normal(key, x.shape, x.dtype), out_shardings=x.sharding)
    return draw(jax.random.key(x.size))


def draw_batch(rng, abstract) -> dict:
    """A batch on the devices: answers of a few tokens, images of noise."""
    rows, length = abstract["text"].shape
    place = np.arange(length)[None]
    host = {
        "image": rng.random(abstract["image"].shape, np.float32) * 2 - 1,
        "text": rng.integers(3, 200, (rows, length), np.int32),
        "mask_ar": np.repeat(place >= 20, rows, 0).astype(np.int32),
        "mask_loss": np.repeat((place >= 20) & (place < 26), rows, 0).astype(np.int32),
    }
    return {k: jax.device_put(v, abstract[k].sharding) for k, v in host.items()}


def measure(config, steps) -> dict:
    """{what: bytes on one device}, predicted and measured."""
    step = dry_run.compile_step(TrainingSetup.without_data(config))
    foretold = dry_run.memory(step)
    batches = next(k for k in foretold if k.startswith("batches"))
    # There is no input pipeline to prefetch batches: one is in use, one on its way.
    foretold[batches] = 2 * dry_run.bytes_on_device(step.batch)
    on_cpu = jax.default_backend() == "cpu"
    forget_peak()
    before = resident("VmRSS")
    frozen, trained = jax.tree.map(draw_leaf, (step.state.frozen, step.state.trained))
    opt_state = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), step.state.opt_state)
    jax.block_until_ready((frozen, trained, opt_state))
    forget_peak()
    rng = np.random.default_rng(0)
    with sharding.rules(config, step.setup.mesh):
        for i in range(steps):
            batch = draw_batch(rng, step.batch)
            trained, opt_state, metrics = step.compiled(trained, opt_state, frozen, batch, np.int32(i))
            jax.block_until_ready(metrics)
    assert np.isfinite(metrics["training_loss"])
    found = resident("VmHWM") - before
    if not on_cpu:
        found = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return {**foretold, "foretold": sum(foretold.values()), "found": found}


def main(argv) -> None:
    del argv
    values = flags.FLAGS
    if values.case or values.config:
        config = values.config or make_config(**CASES[values.case])
        print(json.dumps(measure(config, values.steps)))
        return
    print(markdown.head(["", "state, GB", "temporary, GB", "foretold, GB", "found, GB", "found / foretold"]))
    for case in CASES:
        command = [sys.executable, "-m", "tools.bench.step_memory", f"--case={case}", f"--steps={values.steps}"]
        out = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        state = sum(v for k, v in out.items() if "weights" in k or "optimizer" in k)
        row = [f"{x / 1e9:.3f}" for x in (state, out["temporary"], out["foretold"], out["found"])]
        print(markdown.row([case, *row, f"{out['found'] / out['foretold']:.3f}"]), flush=True)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A config instead of the cases of old.")
    flags.DEFINE_enum("case", None, sorted(CASES), "One case, told as JSON.")
    flags.DEFINE_integer("steps", 3, "Steps to take.")
    app.run(main, flags_parser=command_line.parse_flags)
