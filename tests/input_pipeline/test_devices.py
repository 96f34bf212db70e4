"""Several devices and processes: each loads its piece, together they hold the same batch."""

import concurrent.futures
import json
import mmap
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError, devices
from paligemma_med.parallel import distributed, sharding
from tests import environ
from tests.input_pipeline.tiny_vqa import (
    N_TRAIN,
    assert_equal,
    breaks,
    eval_pp,
    make_pp,
    mix,
    question_ids,
    skipping,
    train,
)


def test_batches_are_sharded_over_the_data_axis(data):
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    batches = train(data, steps=2, mesh=mesh)
    assert_equal(batches, train(data, steps=2))
    for value in batches[0].values():
        assert value.sharding.is_equivalent_to(sharding.batch_sharding(mesh), value.ndim)
        assert {s.data.shape[0] for s in value.addressable_shards} == {2}


class _OneOfSeveral:
    """Stands for the batch sharding as one process of several sees it."""

    def __init__(self, mesh, devices):
        self._sharding, self._devices = sharding.batch_sharding(mesh), devices

    def addressable_devices_indices_map(self, shape):
        found = self._sharding.devices_indices_map(shape)
        return {d: found[d] for d in self._devices}


@pytest.mark.parametrize(
    ("spec", "processes", "expected"),
    [
        ([("data", 8)], 1, [(0, 1)]),
        ([("data", 8)], 2, [(0, 2), (1, 2)]),
        ([("data", 8)], 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        # Processes that share rows along "model".
        ([("data", 2), ("model", 4)], 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
    ],
)
def test_processes_load_the_rows_their_devices_hold(spec, processes, expected):
    mesh = sharding.make_mesh(spec)
    flat = list(mesh.devices.flat)
    each = len(flat) // processes
    shares = [
        devices.process_share(_OneOfSeveral(mesh, flat[p * each : (p + 1) * each]), batch_size=16)
        for p in range(processes)
    ]
    assert shares == expected


def test_scattered_rows_of_a_process_are_refused():
    mesh = sharding.make_mesh([("data", 8)])
    seen = _OneOfSeveral(mesh, [mesh.devices.flat[0], mesh.devices.flat[2]])
    with pytest.raises(InputError, match="contiguous"):
        devices.process_share(seen, batch_size=8)


@pytest.mark.parametrize("processes", [2, 4])
def test_pieces_of_processes_make_the_same_global_batch(data, monkeypatch, processes):
    whole = train(data, steps=3, start_step=2)
    whole_eval = list(input_pipeline.evaluation(data, eval_pp, 8))
    monkeypatch.setattr(devices, "put", lambda batch, sharding, batch_size: batch)
    pieces, pieces_eval = [], []
    for p in range(processes):
        monkeypatch.setattr(devices, "process_share", lambda *a, p=p: (p, processes))
        pieces.append(train(data, steps=3, start_step=2))
        pieces_eval.append(list(input_pipeline.evaluation(data, eval_pp, 8)))
    joined = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*pieces)]
    assert_equal(joined, whole)
    for (batch, rows), parts in zip(whole_eval, zip(*pieces_eval), strict=True):
        assert question_ids(rows) == [i for _, part in parts for i in question_ids(part)]
        mask = np.concatenate([b["_mask"] for b, _ in parts])
        np.testing.assert_array_equal(batch["_mask"], mask)
        number = np.concatenate([b["number"] for b, _ in parts])
        np.testing.assert_array_equal(np.asarray(batch["number"])[mask], number[mask])


@pytest.mark.parametrize("processes", [2, 4])
def test_pieces_of_processes_make_the_same_mixture(data, monkeypatch, processes):
    weights = dict(big=2, small=1)
    whole, _ = mix(data, weights, steps=6)
    for process in range(processes):
        with monkeypatch.context() as patch:
            share = (process, processes)
            patch.setattr(devices, "process_share", lambda *_, share=share: share)
            patch.setattr(devices, "put", lambda host, *_: host)
            pieces, _ = mix(data, weights, steps=6)
        rows = slice(process * 8 // processes, (process + 1) * 8 // processes)
        for piece, batch in zip(pieces, whole):
            np.testing.assert_array_equal(piece["number"], np.asarray(batch["number"])[rows])


_PROCESS = """
import json, sys
import jax
import numpy as np
from paligemma_med import input_pipeline
from paligemma_med.parallel import sharding

process, count, port, data_dir = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.distributed.initialize(f"localhost:{port}", count, process)
assert jax.process_count() == count
mesh = sharding.make_mesh([("data", -1)])
data = {"name": "tiny_vqa/en", "split": "train", "data_dir": data_dir}


def pp(d, rng):
    return {"number": d["number"], "noise": rng.random(2)}


cfg = {"data": data, "pp": pp, "batch_size": 8, "allow_missing_eos": True}
with input_pipeline.training(cfg, seed=7, mesh=mesh) as batches:
    for _ in range(4):
        batch = next(batches)
        assert batch["noise"].shape == (8, 2)
        shards = sorted(batch["number"].addressable_shards, key=lambda s: s.index[0].start)
        rows = [[s.index[0].start, *map(int, s.data)] for s in shards]
        print("ROWS", json.dumps(rows), flush=True)


def broken_pp(d, rng):
    if d["number"] < 6:
        raise OSError("broken")
    return pp(d, rng)


with input_pipeline.training(
    {**cfg, "pp": broken_pp, "on_error": "skip"}, seed=7, mesh=mesh
) as batches:
    for _ in range(3):
        next(batches)
    print("SKIP", json.dumps([batches.skipped(), batches.question_ids(2)]), flush=True)
    assert batches.skipped() == []


def eval_pp(d, rng):
    return {"number": d["number"], "question_id": d["question_id"]}


ids = [[row["question_id"] for row in rows]
       for _, rows in input_pipeline.evaluation(data, eval_pp, 8, mesh=mesh)]
print("EVAL", json.dumps(ids), flush=True)
"""


@pytest.mark.slow
def test_real_processes_hold_the_rows_of_the_single_process_batch(data, repo_root):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    env = environ.of_program(devices=2, PYTHONPATH=str(repo_root))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(p), "2", str(port), data["data_dir"]],
            env=env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for p in range(2)
    ]
    outs = [p.communicate(timeout=120)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0]
    steps = [[json.loads(x[5:]) for x in o.splitlines() if x.startswith("ROWS")] for o in outs]
    expected = train(data, steps=4)
    for one, two, batch in zip(*steps, expected, strict=True):
        assert [start for start, *_ in one + two] == [0, 2, 4, 6]
        assert [n for _, *rows in one + two for n in rows] == batch["number"].tolist()
    _, skipped, ids = skipping(data, _raises_below_6, steps=3, allow_missing_eos=True)
    evaluated = [question_ids(rows) for _, rows in input_pipeline.evaluation(data, eval_pp, 8)]
    for out in outs:
        said = {x[:4]: json.loads(x[5:]) for x in out.splitlines() if x[:4] in ("SKIP", "EVAL")}
        assert said == {"SKIP": [skipped, ids[2]], "EVAL": evaluated}
    assert len(skipped) > 3


def _raises_below_6(d, rng):
    if d["number"] < 6:
        raise OSError("broken")
    return {"number": d["number"], "noise": rng.random(2)}


class _Together:
    """Runs what several processes would do in threads: process p holds piece `shares[p]`."""

    def __init__(self, monkeypatch, shares):
        self._shares = shares
        self._local = threading.local()
        self._barrier = threading.Barrier(len(shares), timeout=20)
        self._said = [None] * len(shares)
        monkeypatch.setattr(jax, "process_count", lambda: len(shares))
        monkeypatch.setattr(devices, "put", lambda batch, *_: batch)
        monkeypatch.setattr(devices, "process_share", lambda *_: self._local.share)
        monkeypatch.setattr(distributed, "gather", self._gather)

    def _gather(self, value):
        self._said[self._local.process] = json.dumps(value)
        self._barrier.wait()
        said = [json.loads(x) for x in self._said]
        self._barrier.wait()
        return said

    def _run(self, process, fn):
        self._local.process, self._local.share = process, self._shares[process]
        return fn(process)

    def __call__(self, fn):
        with concurrent.futures.ThreadPoolExecutor(len(self._shares)) as pool:
            futures = [pool.submit(self._run, p, fn) for p in range(len(self._shares))]
            return [f.exception() or f.result() for f in futures]


@pytest.mark.parametrize("shares", [[(0, 2), (1, 2)], [(1, 2), (0, 2), (0, 2), (1, 2)]])
def test_every_process_gets_all_rows_of_an_evaluation_once(data, monkeypatch, shares):
    whole = [rows for _, rows in input_pipeline.evaluation(data, eval_pp, 8)]

    def run(process):
        batches = input_pipeline.evaluation(data, eval_pp, 8)
        return [rows for _, rows in batches], batches.stats

    for rows, stats in _Together(monkeypatch, shares)(run):
        assert json.dumps(rows) == json.dumps(whole, default=np.ndarray.tolist)
        assert stats == {"examples": N_TRAIN, "truncated": 1}


@pytest.mark.parametrize("shares", [[(0, 2), (1, 2)], [(1, 2), (0, 2), (0, 2), (1, 2)]])
def test_every_process_is_told_of_all_skipped_records(data, monkeypatch, shares):
    pp = breaks(*range(9))
    _, skipped, ids = skipping(data, pp, steps=3)
    for _, told, said in _Together(monkeypatch, shares)(lambda p: skipping(data, pp, steps=3)):
        assert told == skipped and said == ids


def test_an_error_in_the_rows_of_one_process_ends_all(data, monkeypatch):
    together = _Together(monkeypatch, [(0, 2), (1, 2)])
    pp = make_pp(fail_on=4)
    errors = together(lambda p: list(input_pipeline.evaluation(data, pp, 8)))
    assert all(isinstance(e, InputError) and "(question_id q4)" in str(e) for e in errors)
    assert sum(str(e).startswith("in process ") for e in errors) == 1
    errors = together(lambda p: list(input_pipeline.evaluation(data, lambda d, _: d, 8)))
    assert all("type bytes; leave its key out of keep" in str(e) for e in errors)


class Shared(np.ndarray):
    """As Grain's array in shared memory."""


def test_a_workers_memory_is_let_go_of():
    """JAX would take aligned memory of the host's for its own on a CPU, and keep it."""
    memory = np.frombuffer(mmap.mmap(-1, 4096), np.float32).view(Shared)
    where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    placed = devices.put({"x": memory}, where, len(memory))["x"]
    memory[:] = 7  # as the next batch would
    assert not np.asarray(placed).any()
