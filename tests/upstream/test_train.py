"""Our config files on big_vision's own trainer, each run in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from paligemma_med import checkpoints
from paligemma_med.models.layers import activations
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.upstream import train
from tests import environ, tiny
from tests.upstream.conftest import ROOT

big_vision = pytest.mark.big_vision

CONFIG = """
from tests import tiny
def get_config(arg=None):
    c = tiny.config({data!r}, **{kw!r})
    {more}
    return c
"""
# Its trainer up to what it makes of shapes; nothing of that size is allocated.
SHAPES = """
import sys
from paligemma_med import upstream
upstream.install()
from absl import flags
import jax, importlib
from configs import common
from paligemma_med.upstream import train
trainer = importlib.import_module(train.TRAINER)
name, arg = sys.argv[1].split(":")
config = importlib.import_module("configs." + name).get_config(arg)
config.input.data = dict(name="phantom", split="train")
config.input.pp = common.train_pp(config.res, config.text_len, "tiny")
config.tokenizer, config.evals = "tiny", {}
class Enough(Exception):
    pass
def stop(shapes, **kw):
    print("params", sum(x.size for x in jax.tree.leaves(shapes["params"])))
    print("moments", sum(x.size for x in jax.tree.leaves(shapes["opt"])))
    raise Enough
trainer.bv_sharding.infer_sharding = stop
flags.FLAGS(["x"])
try:
    train.train(config, None, trainer)
except Enough:
    print("enough")
"""


def write_config(folder, data, more="pass", **kw):
    path = folder / "config.py"
    path.write_text(CONFIG.format(data=str(data), kw=kw, more=more))
    return path


def program(path, workdir, *flags):
    return (
        "-m",
        "paligemma_med.upstream.train",
        f"--config={path}",
        f"--workdir={workdir}",
        *flags,
    )


def metrics(workdir):
    lines = (workdir / "big_vision_metrics.txt").read_text().splitlines()
    return [json.loads(line) for line in lines]


def newest(workdir):
    return (workdir / "checkpoint.bv-LAST").read_text()


def test_what_its_trainer_is_given(tfrecord_data, tmp_path, monkeypatch):
    """A trainer that only looks: our processes have met, the config is its own, our rules hold."""
    calls = []
    given = {name: types.SimpleNamespace(value=None) for name in ("config", "workdir")}

    def main(argv):
        mesh, rules = activations.active.value
        calls.append(("main", mesh.shape["data"], rules, os.environ.get("BV_JAX_INIT")))

    writer = type("Writer", (), {"step_end": lambda self: None})
    trainer = types.SimpleNamespace(main=main, u=types.SimpleNamespace(BigVisionMetricWriter=writer))
    monkeypatch.setenv("BV_JAX_INIT", "1")
    monkeypatch.setattr(jax.distributed, "initialize", lambda: calls.append("met"))
    monkeypatch.setattr(train.flags, "FLAGS", given)
    train.train(tiny.config(tfrecord_data), str(tmp_path), trainer)
    assert calls == ["met", ("main", jax.device_count(), (("act_batch", "data"),), None)]
    assert given["config"].value.model_name == "paligemma_med" and writer.step_end.waits
    assert given["workdir"].value == str(tmp_path)


def test_data_that_tensorflow_can_not_read_are_told(tfrecord_data, tiny_data, tmp_path):
    train.check(tiny.config(tfrecord_data))
    with pytest.raises(ValueError, match="holds array_record files.*--file_format=tfrecord"):
        train.check(tiny.config(tiny_data))
    config = tiny.config(tfrecord_data)
    config.evals.val.train_data.data_dir = str(tmp_path)
    with pytest.raises(ValueError, match="phantom' is not built in.*; for big_vision, .*=tfrecord"):
        train.check(config)
    config = tiny.config(tfrecord_data)
    config.input.data = dict(name="bv:jsonl", fname="x.jsonl", split="train")
    train.check(config)


@big_vision
@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_from_its_pointer(run_python, tfrecord_data, tmp_path):
    out = tmp_path / "run"
    path = write_config(tmp_path, tfrecord_data, evals={}, total_steps=4000, ckpt_steps=20)
    env = environ.of_program(TF_CPP_MIN_LOG_LEVEL="2")
    with subprocess.Popen([sys.executable, *program(path, out)], cwd=ROOT, env=env, stderr=subprocess.DEVNULL) as run:
        end = time.monotonic() + 300
        while not (out / "checkpoint.bv-LAST").exists() or newest(out) == "000000001-tmp":
            assert run.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        run.send_signal(signal.SIGKILL)
    left_at = int(newest(out).removesuffix("-tmp"))
    assert 20 <= left_at < 4000
    before = len(metrics(out))
    run_python(*program(path, out, f"--config.total_steps={left_at + 7}"))
    rows = metrics(out)[before:]
    assert newest(out) == f"{left_at + 7:09d}"
    assert {row["examples_seen"] for row in rows if "examples_seen" in row} == {
        16 * step for step in range(left_at + 1, left_at + 8)
    }
    assert all(row["examples_seen"] == 16 * row["step"] for row in rows if "examples_seen" in row)
    losses = [r["training_loss"] for r in metrics(out) if "training_loss" in r]
    assert losses[-1] < losses[0] and np.isfinite(losses).all()


@big_vision
def test_lora_on_frozen_bfloat16_weights(run_python, tfrecord_data, tmp_path):
    """Frozen leaves keep their bits and their type; factors, which no file has, are trained."""
    tiny.write_workdir(tmp_path / "base", tiny.config())
    base = flatten_tree(checkpoints.load_params(tmp_path / "base"))
    path = write_config(
        tmp_path,
        tfrecord_data,
        total_steps=3,
        model_init=str(tmp_path / "base"),
        lora=[("llm/layers/attn/.*|img/head/kernel", dict(rank=2, alpha=4.0, dropout=0.1))],
        schedule=[(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)],
        lr=0.1,
        frozen_dtype="bfloat16",
        grad_accum_steps=2,
        evals={},
        sharding_strategy=[(".*", 'fsdp(axis="data")')],
        mesh=[("data", -1)],
        sharding_rules=[("act_vocab", "data"), ("act_batch", "data")],
    )
    # Four devices, of which each has a part of what is cut.
    run_python(*program(path, tmp_path / "run"), devices=4)
    found = flatten_tree(checkpoints.load_params(str(tmp_path / "run" / "checkpoint.bv")))
    assert set(base) < set(found)
    for name, array in found.items():
        if name in base:
            assert array.dtype == "bfloat16"
            np.testing.assert_array_equal(array, base[name].astype("bfloat16"), name)
        else:
            assert array.dtype == "float32" and np.abs(array).max() > 0, name
    assert any(name.endswith("lora_b") for name in found)


@big_vision
@pytest.mark.slow
def test_mixtures(run_python, tfrecord_data, tmp_path):
    data = dict(split="train", data_dir=str(tfrecord_data))
    more = (
        "pp = c.input.pp; c.input = dict(data=dict(a=3, b=1, c=0), batch_size=16, pp=pp, "
        + "a=dict(data=dict(name='phantom', **{0})), b=dict(data=dict(name='phantom', **{0})), "
        "c=dict(data=dict(name='phantom', **{0})))"
    ).format(data)
    path = write_config(tmp_path, tfrecord_data, more, evals={}, total_steps=8)
    run_python(*program(path, tmp_path / "run"))
    last = metrics(tmp_path / "run")[-1]
    # Closing its writer writes the last row once more.
    assert [row["step"] for row in metrics(tmp_path / "run")] == [*range(1, 9), 8]
    assert last["examples_seen_a"] == 96 and last["examples_seen_b"] == 32


@big_vision
@pytest.mark.slow
def test_mistakes_are_told_in_a_sentence(tfrecord_data, tmp_path):
    path = write_config(tmp_path, tfrecord_data, loss_norm="token")

    def run(workdir):
        argv = program(path, workdir, "--config.lr=1e-5")
        return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)

    done = run("")
    assert done.returncode == 1 and done.stderr.rstrip().endswith("error: --workdir is needed. --help names all flags.")
    done = run(tmp_path / "run")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: config.loss_norm is 'token'")
    assert not (tmp_path / "run").exists()


@big_vision
@pytest.mark.slow
@pytest.mark.parametrize(
    "spec, params, trained",
    [
        ("stage1_slake:", 2_924_220_144, 2_361_344),
        ("stage2_medpix2:", 2_924_220_144 + 3_833_856, 3_833_856),
    ],
)
def test_the_true_size_as_far_as_shapes(run_python, tfrecord_data, spec, params, trained):
    said = run_python("-c", SHAPES, spec, TFDS_DATA_DIR=str(tfrecord_data))
    found = dict(line.split() for line in said.splitlines() if line.startswith(("params", "mom")))
    assert int(found["params"]) == params and "enough" in said
    assert 2 * trained <= int(found["moments"]) < 2 * trained + 10
