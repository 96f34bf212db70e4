"""A run that is killed again and again ends as if nothing had happened: same metrics, same bits."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from paligemma_med import checkpoints
from paligemma_med.training import progress
from tests import environ, tiny
from tools import random_kills

CONFIG = """
from tests import environ, tiny
def get_config(arg=None):
    data, steps = arg.split(",")
    model = {k: dict(v, dropout=0.1) for k, v in tiny.MODEL.items()}
    frozen = [("img/embedding/.*", None), (".*", dict(decay_type="cosine", warmup_steps=2))]
    c = tiny.config(data, model=model, schedule=frozen, frozen_dtype="bfloat16",
                    total_steps=int(steps), log_training_steps=3, ckpt_steps=5, keep_ckpt=2)
    c.evals.val.log_steps = EVERY
    c.evals.val.data.split = "validate[:8]"
    c.keep_best = dict(metric="val/model/overall/acc")
    return c
"""
EVERY = 20  # steps from one eval to the next


def command(folder, data, steps, workdir):
    config = folder / "killed_config.py"
    config.write_text(CONFIG.replace("EVERY", str(EVERY)))
    return [sys.executable, "-m", "paligemma_med.train", f"--config={config}:{data},{steps}", f"--workdir={workdir}"]


def last_row(workdir):
    try:
        with open(os.path.join(workdir, "metrics.jsonl"), encoding="utf-8") as f:
            return json.loads(f.readlines()[-1])
    except (OSError, IndexError, ValueError):
        return {"step": 0}


def is_saving(workdir):
    folder = os.path.join(workdir, "checkpoints")
    return os.path.isdir(folder) and any(not n.isdigit() for n in os.listdir(folder))


def is_evaluating(workdir):
    row = last_row(workdir)
    return row["step"] and row["step"] % EVERY == 0 and "val/n" not in row


def wait_until(condition, process, timeout=120):
    end = time.monotonic() + timeout
    while not condition() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.001)


def moments(workdir):
    """A moment of one of four kinds: at any time after the start, some time into training, while a
    checkpoint is written, or in an eval."""

    def moment(rng: random.Random, start, process):
        kind = ("start", "training", "saving", "eval")[start % 4]
        if kind == "start":
            time.sleep(rng.uniform(0, 10))
            return
        before = last_row(workdir)
        wait_until(lambda: last_row(workdir)["step"] not in (0, before["step"]), process)
        if kind == "saving":
            time.sleep(rng.uniform(0, 0.3))
            wait_until(lambda: is_saving(workdir), process)
        elif kind == "eval":
            wait_until(lambda: is_evaluating(workdir), process)
            time.sleep(rng.uniform(0, 0.2))
        else:
            time.sleep(rng.uniform(0, 3))

    return moment


def assert_same_run(killed, straight):
    def rows(workdir, name="metrics.jsonl"):
        with open(os.path.join(workdir, name), encoding="utf-8") as f:
            found = [json.loads(line) for line in f]
        return [{k: v for k, v in r.items() if k not in progress.TIMING} for r in found]

    assert rows(killed) == rows(straight)
    tiny.assert_trees_equal(checkpoints.load_params(killed), checkpoints.load_params(straight))
    tiny.assert_same_eval(*(os.path.join(w, "eval", "val") for w in (killed, straight)))


def run(folder, data, steps, repo_root, kills, kw):
    """Trains undisturbed and under kills, and compares. kw: function of the workdir → further
    arguments of `random_kills.run`."""
    straight, killed = str(folder / "straight"), str(folder / "killed")
    beside = subprocess.Popen(command(folder, data, steps, straight), **popen(folder, repo_root))
    try:
        _, found = random_kills.run(
            command(folder, data, steps, killed),
            limit=lambda n: n >= kills,
            **popen(folder, repo_root),
            **kw(killed),
        )
        assert beside.wait(300) == 0
    except Exception:
        print((folder / "stderr.txt").read_text()[-5000:])
        raise
    finally:
        beside.kill()
    assert len(found) == kills
    assert_same_run(killed, straight)
    return found


def popen(folder, repo_root):
    """One device; what is said on stderr is kept for failures."""
    log = open(folder / "stderr.txt", "a")
    env = environ.of_program()
    return dict(cwd=repo_root, env=env, stdout=subprocess.DEVNULL, stderr=log)


def test_killed_while_saving(tiny_data, tmp_path, repo_root):
    """The quick one: a kill -9 while a checkpoint is written."""

    def kw(killed):
        def moment(rng, start, process):
            wait_until(lambda: last_row(killed)["step"] > 5 and is_saving(killed), process)

        return dict(moment=moment, signals=[signal.SIGKILL])

    run(tmp_path, tiny_data, EVERY, repo_root, 1, kw)


@pytest.mark.slow
def test_twenty_kills_at_random_moments(tiny_data, tmp_path, repo_root):
    found = run(tmp_path, tiny_data, 600, repo_root, 20, lambda killed: {"moment": moments(killed)})
    assert {name for name, _ in found} == {"SIGKILL", "SIGTERM", "SIGINT"}
