"""Several processes of one run: how they start, what they exchange, and how they end.

Real processes on one host, each with virtual devices of its own; see `tests/processes.py` for what
they run.
"""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from paligemma_med.evaluators import vqa
from paligemma_med.parallel import distributed, ending, sharding
from tests import processes

# --- Starting ---

SLURM = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="n1", SLURM_PROCID="1", SLURM_LOCALID="1")
POD = dict(KUBERNETES_SERVICE_HOST="10.0.0.1")


@pytest.fixture
def started(monkeypatch):
    """Arguments of the calls of jax.distributed.initialize, which starts nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **kw: calls.append((a, kw)))
    for name in (*SLURM, *POD, "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize(
    "env, starts",
    [
        ({}, False),
        ({**SLURM, "SLURM_NTASKS": "2"}, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        # A shell in an allocation of two tasks is a step of one.
        ({**SLURM, "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # not under srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        (POD, False),  # a notebook
        ({**POD, "JOB_COMPLETION_INDEX": "0"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
    ],
)
def test_schedulers(started, monkeypatch, env, starts):
    """JAX is asked to join others only where there are any."""
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    distributed.start()
    assert started == (
        [((None, None, None), dict(initialization_timeout=300, heartbeat_timeout_seconds=60))] if starts else []
    )
    started.clear()
    distributed.start(num_processes=1)  # a task of an array job, on its own
    assert not started


def test_flags_go_before_variables(started, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    distributed.start()
    distributed.start("host:2", 4, 0, start_timeout=5, peer_timeout=7)
    (a, _), (b, kw) = started
    assert a == ("other:1", 2, 1) and b == ("host:2", 4, 0)
    assert kw == dict(initialization_timeout=5, heartbeat_timeout_seconds=7)


@pytest.mark.parametrize(
    "args, env, sentence",
    [
        (("h:1", None, None), {}, "--coordinator_address=h:1 needs --num_processes and --process"),
        ((None, 2, None), {}, "--num_processes=2 needs --coordinator_address and --process_id"),
        ((None, None, 1), {}, "--process_id=1 needs --coordinator_address and --num_processes"),
        (("h:1", 2, 2), {}, "--process_id is 2 of 2; they count from 0"),
        (("h", 2, 0), {}, "--coordinator_address is 'h'; expected host:port"),
        (("h:1", 0, 0), {}, "--num_processes is 0; expected 1 or more"),
        (("h:1", None, 0), {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES is 'two'; expected a"),
    ],
)
def test_wrong_setups(started, monkeypatch, args, env, sentence):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        distributed.start(*args)
    assert not started


def test_who_does_not_come_is_not_waited_for():
    """Process 1 of 2, and no process 0: it says whom it waits for, and ends in time."""
    begin = time.monotonic()
    args = [
        "data",
        "out",
        "well",
        "--coordinator_address=localhost:" + str(processes.free_port()),
        "--num_processes=2",
        "--process_id=1",
        "--start_timeout=2",
    ]
    [(code, _, err)] = processes.finish(processes.start("tests.processes", args, num=1))
    assert code not in (0, -signal.SIGKILL) and time.monotonic() - begin < 90
    assert "process 1 of 2: waiting for the other processes of this run at localhost:" in err


# --- One process ---


def test_one_process_exchanges_nothing():
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    host = np.arange(16.0, dtype=np.float32).reshape(8, 2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", "model"))
    placed = distributed.place(host, where)
    assert placed.sharding == where
    tree = distributed.to_host({"a": placed, "b": [host, 3]})
    np.testing.assert_array_equal(tree["a"], host)
    assert tree["b"][1] == 3 and isinstance(tree["a"], np.ndarray)
    value = {"x": (1, object())}  # nothing is written as JSON
    assert distributed.gather(value) == [value] and distributed.broadcast(value) is value
    assert distributed.is_main() and ending.is_alone()
    distributed.barrier("nobody else")


# --- Two processes ---


def rows_of(folder):
    with open(os.path.join(folder, "predictions.jsonl"), encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_two_processes(tiny_data, tmp_path):
    """All at once, since starting costs most: what they exchange, batches, an eval, and one that
    fails alone."""
    with pytest.raises(processes.Killed):
        mesh = sharding.make_mesh([("data", 8)])
        processes.evaluate(tiny_data, tmp_path / "eval", mesh, dies_at=5)
    args = [tiny_data, tmp_path, "badly", "--peer_timeout=20"]
    begin = time.monotonic()
    done = processes.finish(processes.start("tests.processes", args, num=2, devices=2))
    assert time.monotonic() - begin < 150
    (code0, _, err0), (code1, _, err1) = done

    # Process 1 says what is wrong; process 0, in the middle of a collective, whose fault it isn't.
    assert code1 == 1 and "process 1: error: mine alone." in err1
    assert code0 in (1, -signal.SIGABRT)
    assert "another process of this run has ended" in err0 or "another task died" in err0

    found = []
    for i in range(2):
        with open(tmp_path / f"{i}.json", encoding="utf-8") as f:
            found.append(json.load(f))
    assert [x.pop("is_main") for x in found] == [True, False]
    assert found[0] == found[1]
    found = found[0]
    assert found["to_host"] == [True, True, True]
    assert found["owners"] == [0] * 4 + [1] * 4  # rows of either's own copy: nothing was compared
    host = np.arange(32).reshape(8, 4).tolist()
    assert found["place_params"] == ["bfloat16", [4, 2], host]
    assert found["gather"] == [{"me": i, "text": "é" * 300 * i, "n": i} for i in range(2)]
    assert found["broadcast"] == [0, None]

    # As one process has it.
    mesh = sharding.make_mesh([("data", 8)])
    assert found["batches"] == processes.batches(tiny_data, mesh)
    metrics, asked = processes.evaluate(tiny_data, tmp_path / "one", mesh)
    assert found["metrics"] == metrics
    assert (asked, found["asked"]) == (6, 1)  # they went on after what was killed
    rows = rows_of(tmp_path / "eval")
    assert rows == rows_of(tmp_path / "one")
    ids = [row["question_id"] for row in rows]
    assert len(ids) == processes.NUM_QUESTIONS == len(set(ids))


# --- The programs (slow) ---


def write_config(folder, data_dir, **kw):
    """A config file: six steps with a checkpoint and an eval of 13 questions every second step."""
    path = os.path.join(folder, f"config{len(os.listdir(folder))}.py")
    text = f"""
from tests import tiny

def get_config():
    c = tiny.config({str(data_dir)!r}, total_steps=6, ckpt_steps=2, keep_ckpt=9)
    c.optax = dict(eps=1e-4)  # or Adam turns the rounding of small gradients into steps
    c.evals.val.data.split = "validate[:13]"
    c.evals.val.batch_size = 8
    for key, value in {kw!r}.items():
        c[key] = value
    return c
"""
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
    return f"--config={path}"


def assert_runs_agree(a, b):
    """Losses to 1e-5, the same questions with the same answers."""
    rows = []
    for folder in (a, b):
        with open(os.path.join(folder, "metrics.jsonl"), encoding="utf-8") as f:
            rows.append([json.loads(line) for line in f])
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]] == list(range(1, 7))
    for x, y in zip(*rows):
        assert x["training_loss"] == pytest.approx(y["training_loss"], abs=1e-5, rel=0)
        evals = [{k: v for k, v in r.items() if k.startswith("val/")} for r in (x, y)]
        assert evals[0] == pytest.approx(evals[1], abs=1e-6)
        assert bool(evals[0]) == (x["step"] % 3 == 0)
    rows = [rows_of(os.path.join(folder, "eval", "val")) for folder in (a, b)]
    assert len(rows[0]) == 13
    for x, y in zip(*rows, strict=True):
        for key in [k for k in x if k.endswith("logprobs")]:
            assert x.pop(key) == pytest.approx(y.pop(key), abs=1e-4)
        assert x == y


@pytest.fixture(scope="module")
def alone(tiny_data, tmp_path_factory):
    """(config flag, workdir) of a run in one process."""
    folder = tmp_path_factory.mktemp("alone")
    config = write_config(folder, tiny_data)
    args = [config, f"--workdir={folder}/w"]
    processes.run("paligemma_med.train", args, num=1, devices=2)
    return config, f"{folder}/w"


@pytest.mark.slow
def test_train_and_evaluate_in_two_processes(alone, tmp_path):
    config, one = alone
    processes.run("paligemma_med.train", [config, f"--workdir={tmp_path}/w"], num=2)
    assert_runs_agree(one, tmp_path / "w")
    args = [f"--workdir={tmp_path}/w", f"--out={tmp_path}/again"]
    args.append(f"--controls={','.join(vqa.CONTROLS)}")
    done = processes.run("paligemma_med.evaluate", args, num=2)
    assert "| exact match, %" in done[0][1] and not done[1][1].replace("[Gloo]", "").count("|")
    assert rows_of(tmp_path / "again/eval/val") == rows_of(tmp_path / "w/eval/val")


@pytest.mark.slow
@pytest.mark.parametrize("num, mesh", [(2, (1, 2)), (4, (2, 2))])
def test_processes_along_the_model_axis(alone, tiny_data, tmp_path, num, mesh):
    """Processes that hold the same rows, and different parts of the weights."""
    config = write_config(
        tmp_path,
        tiny_data,
        mesh=[("data", mesh[0]), ("model", mesh[1])],
        sharding_strategy=[(".*", 'fsdp(axis="model", min_size_to_shard_mb=0)')],
    )
    processes.run("paligemma_med.train", [config, f"--workdir={tmp_path}/w"], num=num)
    assert_runs_agree(alone[1], tmp_path / "w")


@pytest.mark.slow
@pytest.mark.parametrize("num", [1, 2])
def test_another_number_of_processes_goes_on(alone, tmp_path, num):
    """Two processes stop after step 4 of the run, and one goes on; and the other way round."""
    config, one = alone
    if num == 2:
        shutil.copytree(one, tmp_path / "w")
        shutil.rmtree(tmp_path / "w/checkpoints/6")
    else:
        args = [config, f"--workdir={tmp_path}/w"]
        processes.run("paligemma_med.train", args, num=2)
        shutil.rmtree(tmp_path / "w/checkpoints/6")
    shutil.rmtree(tmp_path / "w/eval")
    args = [config, f"--workdir={tmp_path}/w"]
    done = processes.run("paligemma_med.train", args, num=num, devices=3 - num)
    assert "Resumed from step 4 of 6" in done[0][1]
    assert_runs_agree(one, tmp_path / "w")


def wait_for(path, started, timeout=900):
    """Until a file is there."""
    end = time.monotonic() + timeout
    while not os.path.exists(path):
        assert time.monotonic() < end and all(p.poll() is None for p in started), "not in time"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_peer_is_killed(alone, tiny_data, tmp_path, victim):
    """The other one ends soon, with a sentence; then both go on."""
    config = write_config(tmp_path, tiny_data, total_steps=100_000, ckpt_steps=20, evals={})
    args = [config, f"--workdir={tmp_path}/w", "--peer_timeout=15"]
    started = processes.start("paligemma_med.train", args, num=2)
    wait_for(tmp_path / "w/checkpoints/20", started)
    started[victim].kill()
    begin = time.monotonic()
    code, _, err = processes.finish(started)[1 - victim]
    assert time.monotonic() - begin < 60
    assert code in (1, -signal.SIGABRT)
    assert "another process of this run has ended" in err or "another task died" in err
    # On a run of a few steps more than there are.
    step = max(int(n) for n in os.listdir(tmp_path / "w/checkpoints") if n.isdigit())
    args += [f"--config.total_steps={step + 2}"]
    done = processes.run("paligemma_med.train", args, num=2)
    assert f"Resumed from step {step} of {step + 2}" in done[0][1]


@pytest.mark.slow
def test_one_process_is_told_to_stop(tiny_data, tmp_path):
    """SIGTERM to one: both save the same step and end with 143."""
    config = write_config(tmp_path, tiny_data, total_steps=100_000, ckpt_steps=20, evals={})
    args = [config, f"--workdir={tmp_path}/w"]
    started = processes.start("paligemma_med.train", args, num=2)
    wait_for(tmp_path / "w/checkpoints/20", started)
    started[1].send_signal(signal.SIGTERM)
    done = processes.finish(started)
    assert [code for code, _, _ in done] == [143, 143], done[0][2][-3000:]
    step = int(done[0][2].partition("Stopped at step ")[2].partition(";")[0])
    assert os.path.exists(tmp_path / f"w/checkpoints/{step}")
    with open(tmp_path / "w/metrics.jsonl", encoding="utf-8") as f:
        assert json.loads(f.readlines()[-1])["step"] <= step
