"""Worker processes: the same batches, and how they end."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from tests.input_pipeline.tiny_vqa import assert_equal, train


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(data, num_workers):
    expected = train(data, steps=9)
    # All batches are kept: those in memory shared with workers must not change afterwards.
    assert_equal(train(data, steps=5, start_step=4, num_workers=num_workers), expected[4:])


_MAIN_WITH_WORKERS = """
import multiprocessing, sys, time
import numpy as np
from paligemma_med import input_pipeline

data = {"name": "tiny_vqa/en", "split": "train", "data_dir": sys.argv[1]}
cfg = {"data": data, "pp": lambda d, rng: {"x": np.zeros(9)}, "batch_size": 2, "num_workers": 2}
with input_pipeline.training(cfg | {"allow_missing_eos": True}, seed=0) as batches:
    for _ in range(4):
        next(batches)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    while True:
        next(batches)
        time.sleep(0.1)
"""


def _alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGKILL, False),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),  # as schedulers do
        (signal.SIGINT, True),  # as a terminal does
    ],
)
def test_workers_go_when_the_main_process_is_ended(data, repo_root, number, to_group):
    main = subprocess.Popen(
        [sys.executable, "-c", _MAIN_WITH_WORKERS, data["data_dir"]],
        env=os.environ | {"PYTHONPATH": str(repo_root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    workers = []
    try:
        workers = [int(pid) for pid in main.stdout.readline().split()]
        assert len(workers) == 2 and all(_alive(pid) for pid in workers)
        (os.killpg if to_group else os.kill)(main.pid, number)
        _, errors = main.communicate(timeout=20)
        assert main.returncode == -number
        assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
        assert "InputError" not in errors
        deadline = time.monotonic() + 20
        while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not [pid for pid in workers if _alive(pid)]
    finally:
        main.kill()
        for pid in workers:
            if _alive(pid):
                os.kill(pid, signal.SIGKILL)


def test_a_worker_that_dies_is_reported(data):
    parent = os.getpid()

    def pp(d, rng):
        if os.getpid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    with pytest.raises(InputError, match="worker process died.*num_workers=0"):
        train(data, pp, steps=1, num_workers=1)


def test_workers_live_through_sigterm_and_their_death_is_an_error(data):
    cfg = {"data": data, "pp": lambda d, rng: {"x": np.zeros(9)}, "allow_missing_eos": True}
    with input_pipeline.training({**cfg, "batch_size": 2, "num_workers": 2}, seed=0) as batches:
        for _ in range(4):
            next(batches)
        workers = [p.pid for p in multiprocessing.active_children()]
        assert len(workers) == 2
        # A scheduler's notice goes to them too; the batches up to the last checkpoint still come.
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
        for _ in range(20):
            next(batches)
        os.kill(workers[1], signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(InputError, match="worker process died.*exit code -9"):
            while time.monotonic() < start + 30:
                next(batches)
        assert time.monotonic() < start + 24  # Grain waits 25 s for workers that do not end
        assert not any(_alive(pid) for pid in workers)
        with pytest.raises(StopIteration):
            next(batches)
