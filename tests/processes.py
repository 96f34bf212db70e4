"""What tests of several processes share: how they are started, and what each of them runs."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med import cli, decode, input_pipeline, weights
from paligemma_med.evaluators import vqa
from paligemma_med.parallel import distributed, sharding
from tests import environ, tiny

ROOT = pathlib.Path(__file__).resolve().parent.parent
NUM_QUESTIONS, EVAL_BATCH = 13, 8


def free_port():
    """A port that was free just now."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def start(module, args, *, num, devices=1):
    """Starts `python -m module args` as `num` processes of one run, of `devices` devices each.

    Returns:
      [subprocess.Popen]; with num=1 one on its own.
    """
    env = environ.of_program(devices)
    port, out = free_port(), []
    for i in range(num):
        place = [f"--coordinator_address=localhost:{port}", f"--num_processes={num}", f"--process_id={i}"]
        out.append(
            subprocess.Popen(
                [sys.executable, "-m", module, *map(str, args), *(place if num > 1 else [])],
                cwd=ROOT,
                env=env,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
        )
    return out


def finish(started, timeout=900):
    """[(exit code, stdout, stderr)] of processes; none is left behind."""
    try:
        return [(p.returncode, *said) for p in started if (said := p.communicate(timeout=timeout))]
    finally:
        for p in started:
            p.kill()


def run(module, args, **kw):
    """`start` and `finish`; all must end well."""
    done = finish(start(module, args, **kw))
    for i, (code, out, err) in enumerate(done):
        assert code == 0, f"process {i} of {module} ended with {code}:\n{out[-2000:]}\n{err[-4000:]}"
    return done


class Tokenizer:
    """Says tokens as numbers."""

    vocab_size, eos_token, stop_tokens = 1024, 1, (1,)

    def to_str(self, tokens, stop_at_eos=True):
        return " ".join(str(int(t)) for t in tokens)


@jax.jit
def _answer(image, text, row_id):
    pixels = jnp.round(100 * jnp.mean(image, axis=(1, 2, 3))).astype(jnp.int32)
    tokens = jnp.stack([pixels, jnp.sum(text, axis=1), row_id.astype(jnp.int32) % 997], axis=1)
    return jnp.abs(tokens)[:, None] + 2


def answers(model, params, batch, **kw):
    """In place of `decode.generate`: three tokens that depend on image, prompt and question."""
    del model, params, kw
    tokens = _answer(batch["image"], batch["text"], batch["row_id"])
    return tokens, tokens / 8


class Killed(BaseException):
    """Ends an evaluation as a kill does."""


def evaluate(data_dir, outdir, mesh, dies_at=None):
    """The vqa evaluator on a split whose size no batch divides, with `answers` for a model, which
    is killed in its n-th answer. → its figures, and how many batches it was asked."""
    val = tiny.config(data_dir).evals.val
    data = {**val.data.to_dict(), "split": f"validate[:{NUM_QUESTIONS}]"}
    inputs = input_pipeline.evaluation(data, val.pp_fn, EVAL_BATCH, mesh=mesh)
    evaluator = vqa.Evaluator(
        None,
        Tokenizer(),
        inputs=inputs,
        total=NUM_QUESTIONS,
        outdir=outdir,
        pred_kw=dict(max_new_tokens=3),
        controls=("shuffled_images", "noise_image"),
        about=lambda params: {"fingerprint": "of answers"},
    )
    asked = []

    def generate(*args, **kw):
        if len(asked) == dies_at:
            raise Killed
        asked.append(args)
        return answers(*args, **kw)

    real, decode.generate = decode.generate, generate
    try:
        return evaluator.run({}), len(asked)
    finally:
        decode.generate = real


def batches(data_dir, mesh):
    """The first two training batches: sums over their rows, by key."""
    with input_pipeline.training(tiny.config(data_dir).input, seed=3, mesh=mesh) as inputs:
        found = [distributed.to_host(next(inputs)) for _ in range(2)]
    return [{k: v.reshape(len(v), -1).sum(axis=1).tolist() for k, v in b.items()} for b in found]


def _words():
    """What the functions of `distributed` give in this process."""
    me, count = jax.process_index(), jax.process_count()
    mesh = sharding.make_mesh([("data", count), ("model", -1)])

    def spec(*axes):
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    host = np.arange(8 * 4, dtype=np.float32).reshape(8, 4)
    whole = {s: distributed.place(host, spec(*s)) for s in [("data",), (None, "model"), ()]}
    # Each process's own copy, so that it shows whose rows came from where.
    own = distributed.to_host(distributed.place(host + 1000 * me, spec("data")))
    places = types.SimpleNamespace(
        dtypes={"w": jnp.dtype("bfloat16")}, shardings={"w": spec("data", "model")}, kinds={}, leaves=None
    )
    placed = weights.place_params({"w": host}, places)["w"]
    return dict(
        to_host=[np.array_equal(distributed.to_host(x), host) for x in whole.values()],
        owners=(own[:, 0] // 1000).astype(int).tolist(),
        place_params=[
            str(placed.dtype),
            placed.addressable_shards[0].data.shape,
            distributed.to_host(placed).astype(int).tolist(),
        ],
        gather=distributed.gather({"me": me, "text": "é" * 300 * me, "n": np.int64(me)}),
        broadcast=distributed.broadcast([me, None]),
        is_main=distributed.is_main(),
    )


@cli.command
def main(argv):
    """What the two processes of `test_distributed` do: data_dir, out folder, how it ends."""
    _, data_dir, out, ending = argv
    distributed.start_from_flags(awaits_sigterm=False)
    me = jax.process_index()
    found = _words()
    mesh = sharding.make_mesh([("data", -1)])
    found["metrics"], found["asked"] = evaluate(data_dir, os.path.join(out, "eval"), mesh)
    found["batches"] = batches(data_dir, mesh)
    distributed.barrier("done")
    with open(os.path.join(out, f"{me}.json"), "w", encoding="utf-8") as f:
        json.dump(found, f)
    if ending == "well":
        return
    if me == 1:
        raise ValueError("mine alone.")
    while True:
        distributed.gather(me)


if __name__ == "__main__":
    from absl import app

    distributed.define_flags()
    app.run(main)
