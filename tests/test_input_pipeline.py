"""Input: what is read, that batches depend on seed and step alone, and what each mistake says."""

import concurrent.futures
import io
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from absl import logging

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from paligemma_med.parallel import sharding

N_TRAIN, N_VALID, LENGTH = 23, 9, 12


def _png(i):
    out = io.BytesIO()
    PIL.Image.new("RGB", (8 + i % 3, 8), (i, 2 * i, 255 - i)).save(out, "PNG")
    return out.getvalue()


def _examples(first, count):
    for i in range(first, first + count):
        yield (
            str(i),
            {
                "image": _png(i),
                "question": f"wo ist es, {i}? 在哪里",
                "answer": "left" if i % 2 else "right lung",
                "question_id": f"q{i}",
                "number": i,
                "choices": ["a", "β"],
                "boxes": [{"label": "Milz", "bbox": np.arange(4, dtype=np.float32)}] * (i % 3),
            },
        )


class TinyVqa(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Rows numbered 0..22 (train) and 100..108 (validate), built without TensorFlow."""

    VERSION = tfds.core.Version("1.10.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name="en")]

    def _info(self):
        text = tfds.features.Text()
        bbox = tfds.features.Tensor(shape=(4,), dtype=np.float32)
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "question": text,
                    "answer": text,
                    "question_id": text,
                    "number": np.int32,
                    "choices": tfds.features.Sequence(text),
                    "boxes": tfds.features.Sequence({"label": text, "bbox": bbox}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {
            "train": _examples(0, N_TRAIN),
            "validate": _examples(100, N_VALID),
        }

    def _generate_examples(self):
        raise NotImplementedError


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    TinyVqa(data_dir=folder, config="en", file_format="array_record").download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )
    # An older version, that sorts after the newer one as text.
    shutil.copytree(folder / "tiny_vqa" / "en" / "1.10.0", folder / "tiny_vqa" / "en" / "1.9.0")
    return folder


@pytest.fixture
def data(data_dir):
    return {"name": "tiny_vqa/en", "split": "train", "data_dir": str(data_dir)}


def _make_pp(*, eos=True, cut=lambda n: 0, extra=lambda d: {}, fail_on=None, eos_lost_on=None):
    """A pp as a closure, which travels to workers by value."""

    def pp(d, rng):
        number = int(d["number"])
        if number == fail_on:
            raise ValueError("there is no such thing")
        text, mask_loss = np.zeros(LENGTH, np.int32), np.zeros(LENGTH, np.int32)
        text[:4] = [2, 50 + number, 60, 1 if eos and number != eos_lost_on else 61]
        mask_loss[2:4] = 1
        out = {"text": text, "mask_loss": mask_loss, "number": d["number"], **extra(d)}
        if rng is not None:
            out["noise"] = rng.random(3).astype(np.float32)
        if cut(number):
            out["_truncated"] = np.int32(cut(number))
        return out

    return pp


def _train(data, pp=None, *, steps, seed=7, mesh=None, start_step=0, **cfg):
    cfg = {"data": data, "pp": pp or _make_pp(), "batch_size": 8, **cfg}
    with input_pipeline.training(cfg, seed=seed, mesh=mesh, start_step=start_step) as batches:
        return [next(batches) for _ in range(steps)]


def _assert_equal(batches, expected):
    assert len(batches) == len(expected)
    for a, b in zip(batches, expected):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)


def _ids(rows):
    return [row["question_id"] for row in rows]


# --- Records ---


def test_source_gives_bytes_text_and_numpy(data):
    source = input_pipeline.open_source(data)
    assert len(source) == N_TRAIN
    rows = {r["question_id"]: r for r in (source[i] for i in range(len(source)))}
    assert set(rows) == {f"q{i}" for i in range(N_TRAIN)}
    row = rows["q5"]
    assert row["question"] == "wo ist es, 5? 在哪里"
    assert row["image"] == _png(5)
    assert row["number"] == 5 and row["number"].dtype == np.int32
    assert row["choices"] == ["a", "β"]
    assert row["boxes"]["label"] == ["Milz", "Milz"]
    np.testing.assert_array_equal(row["boxes"]["bbox"], [[0, 1, 2, 3]] * 2)
    assert rows["q3"]["boxes"]["label"] == []


def test_source_pickles_before_and_after_reading(data):
    source = input_pipeline.open_source(data)
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(source))
        assert [copy[i]["number"] for i in range(3)] == [source[i]["number"] for i in range(3)]


def test_split_grammar(data):
    def ids(split):
        source = input_pipeline.open_source(data | {"split": split})
        return [source[i]["question_id"] for i in range(len(source))]

    everything = ids("train")
    assert ids("train[:5]") == everything[:5]
    assert ids("train[-5:]") == everything[-5:]
    assert sorted(ids("train[:5]+train[5:]")) == sorted(everything)
    assert len(ids("train+validate")) == N_TRAIN + N_VALID
    assert ids("train[20%:]") == everything[round(N_TRAIN * 0.2) :]


def test_highest_version_is_read(data, data_dir):
    assert {p.name for p in (data_dir / "tiny_vqa" / "en").iterdir()} == {"1.9.0", "1.10.0"}
    assert "1.10.0" in str(input_pipeline._find_version("tiny_vqa/en", data_dir))


def test_data_dir_from_environment(data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data.pop("data_dir"))
    assert len(input_pipeline.open_source(data)) == N_TRAIN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "slake/en"}, ["slake/en", "python -m data_prep.build slake --config en --data"]),
        ({"name": "phantom"}, ["python -m data_prep.build phantom --data_dir"]),
        ({"name": "tiny_vqa"}, ["choose one of ['tiny_vqa/en']"]),
        ({"name": "../etc"}, ["../etc"]),
        ({"split": "test"}, ["no split 'test'", "train (23 examples)", "validate (9 examples)"]),
        ({"split": "train+tset[:5]"}, ["no split 'tset[:5]'"]),
        ({"split": "train[:x]"}, ["train[:x]", "can't be read"]),
        ({"split": "train[5:5]"}, ["train[5:5]", "empty"]),
        ({"splits": "train"}, ["unknown: ['splits']"]),
    ],
)
def test_open_source_errors(data, change, words):
    with pytest.raises(InputError) as e:
        input_pipeline.open_source(data | change)
    assert all(word in str(e.value) for word in words), str(e.value)


def _damaged_copy(data, data_dir, folder):
    """The data set anew with one wrong byte amid its records; (data, the file)."""
    copy = folder / "tiny_vqa" / "en" / "1.10.0"
    shutil.copytree(data_dir / "tiny_vqa" / "en" / "1.10.0", copy)
    shard = next(copy.glob("*train*"))
    whole = shard.read_bytes()
    # A checksum in the file finds it.
    at = whole.index(b"IHDR") if b"IHDR" in whole else len(whole) // 3
    shard.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
    return data | {"data_dir": str(folder)}, shard


def test_missing_and_damaged_files_are_named(data, data_dir, tmp_path):
    data, shard = _damaged_copy(data, data_dir, tmp_path)
    with pytest.raises(InputError, match="tiny_vqa/en split train, record"):
        source = input_pipeline.open_source(data)
        for i in range(len(source)):
            source[i]
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        input_pipeline.open_source(data)


# --- Training ---


def test_an_epoch_holds_each_row_once_and_epochs_differ(data):
    batches = _train(data, steps=3 * N_TRAIN, batch_size=1)
    numbers = [int(b["number"][0]) for b in batches]
    epochs = [numbers[k * N_TRAIN : (k + 1) * N_TRAIN] for k in range(3)]
    assert all(sorted(epoch) == list(range(N_TRAIN)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(N_TRAIN))


def test_batches_go_on_across_epochs_without_dropping_rows(data):
    # 23 rows in batches of 8: whatever the batch size, the stream of rows is the same one.
    small = np.concatenate([b["number"] for b in _train(data, steps=2 * N_TRAIN, batch_size=1)])
    large = np.concatenate([b["number"] for b in _train(data, steps=5, batch_size=8)])
    np.testing.assert_array_equal(small[:40], large)


def test_random_numbers_differ_by_row_and_epoch_and_come_from_the_seed(data):
    one = _train(data, steps=6)
    _assert_equal(_train(data, steps=6), one)
    noise = np.concatenate([b["noise"] for b in one])
    assert len(np.unique(noise[:, 0])) == len(noise)
    other = _train(data, steps=6, seed=8)
    assert any((a["number"] != b["number"]).any() for a, b in zip(one, other))


@pytest.mark.parametrize("start", [1, 2, 3, 11])
def test_start_step_skips_exactly(data, start):
    _assert_equal(_train(data, steps=2, start_step=start), _train(data, steps=start + 2)[start:])


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"prefetch": 0}, {"prefetch": 5}])
def test_threads_and_prefetch_change_nothing(data, options):
    _assert_equal(_train(data, steps=7, **options), _train(data, steps=7, num_threads=1))


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(data, num_workers):
    expected = _train(data, steps=9)
    # All batches are kept: those in memory shared with workers must not change afterwards.
    _assert_equal(_train(data, steps=5, start_step=4, num_workers=num_workers), expected[4:])


def test_batches_are_sharded_over_the_data_axis(data):
    mesh = sharding.make_mesh([("data", 4), ("model", 2)])
    batches = _train(data, steps=2, mesh=mesh)
    _assert_equal(batches, _train(data, steps=2))
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
    devices = list(mesh.devices.flat)
    each = len(devices) // processes
    shares = [
        input_pipeline._process_share(_OneOfSeveral(mesh, devices[p * each : (p + 1) * each]), batch_size=16)
        for p in range(processes)
    ]
    assert shares == expected


def test_scattered_rows_of_a_process_are_refused():
    mesh = sharding.make_mesh([("data", 8)])
    seen = _OneOfSeveral(mesh, [mesh.devices.flat[0], mesh.devices.flat[2]])
    with pytest.raises(InputError, match="contiguous"):
        input_pipeline._process_share(seen, batch_size=8)


@pytest.mark.parametrize("processes", [2, 4])
def test_pieces_of_processes_make_the_same_global_batch(data, monkeypatch, processes):
    whole = _train(data, steps=3, start_step=2)
    whole_eval = list(input_pipeline.evaluation(data, _eval_pp, 8))
    monkeypatch.setattr(input_pipeline, "_put", lambda batch, sharding, batch_size: batch)
    pieces, pieces_eval = [], []
    for p in range(processes):
        monkeypatch.setattr(input_pipeline, "_process_share", lambda *a, p=p: (p, processes))
        pieces.append(_train(data, steps=3, start_step=2))
        pieces_eval.append(list(input_pipeline.evaluation(data, _eval_pp, 8)))
    joined = [{k: np.concatenate([b[k] for b in step]) for k in step[0]} for step in zip(*pieces)]
    _assert_equal(joined, whole)
    for (batch, rows), parts in zip(whole_eval, zip(*pieces_eval), strict=True):
        assert _ids(rows) == [i for _, part in parts for i in _ids(part)]
        mask = np.concatenate([b["_mask"] for b, _ in parts])
        np.testing.assert_array_equal(batch["_mask"], mask)
        number = np.concatenate([b["number"] for b, _ in parts])
        np.testing.assert_array_equal(np.asarray(batch["number"])[mask], number[mask])


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
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(repo_root),
    }
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
    expected = _train(data, steps=4)
    for one, two, batch in zip(*steps, expected, strict=True):
        assert [start for start, *_ in one + two] == [0, 2, 4, 6]
        assert [n for _, *rows in one + two for n in rows] == batch["number"].tolist()
    _, skipped, ids = _skipping(data, _raises_below_6, steps=3, allow_missing_eos=True)
    evaluated = [_ids(rows) for _, rows in input_pipeline.evaluation(data, _eval_pp, 8)]
    for out in outs:
        said = {x[:4]: json.loads(x[5:]) for x in out.splitlines() if x[:4] in ("SKIP", "EVAL")}
        assert said == {"SKIP": [skipped, ids[2]], "EVAL": evaluated}
    assert len(skipped) > 3


def _raises_below_6(d, rng):
    if d["number"] < 6:
        raise OSError("broken")
    return {"number": d["number"], "noise": rng.random(2)}


def test_truncation_is_counted_and_reported(data, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    pp = _make_pp(cut=lambda n: n if n in (3, 20) else 0)
    cfg = {"data": data, "pp": pp, "batch_size": 1}
    with input_pipeline.training(cfg, seed=0) as batches:
        for _ in range(N_TRAIN - 1):
            assert not any(k.startswith("_") for k in next(batches))
        next(batches)
        assert batches.stats == {
            "examples": N_TRAIN,
            "truncated": 2,
            "tokens_cut": 23,
            "longest_cut": 20,
        }
        assert len(warned) == 1 and "2 of 23 examples" in warned[0]
        assert batches.num_examples == N_TRAIN and batches.steps_per_epoch == N_TRAIN
        for _ in range(N_TRAIN // 2):
            next(batches)
    # The end reports what came since, if anything did.
    seen = batches.stats["truncated"]
    assert len(warned) == 1 + (seen > 2)


def test_nothing_truncated_warns_of_nothing(data, monkeypatch):
    monkeypatch.setattr(logging, "warning", lambda *a: pytest.fail(str(a)))
    _train(data, steps=6)


def test_missing_eos_is_an_error_unless_allowed(data):
    pp = _make_pp(eos_lost_on=11, cut=lambda n: 4 if n == 11 else 0)
    with pytest.raises(InputError) as e:
        _train(data, pp, steps=6)
    for word in ("tiny_vqa/en", "question_id q11", "EOS", "text_len", f"now {LENGTH}", "cut 4"):
        assert word in str(e.value), str(e.value)
    assert len(_train(data, pp, steps=6, allow_missing_eos=True)) == 6
    with pytest.raises(InputError, match="eos='yes'"):
        _train(data, _make_pp(eos=False), steps=1)


def test_an_eos_that_is_not_supervised_does_not_count(data):
    def pp(d, rng):
        return {"text": np.array([2, 60, 1]), "mask_loss": np.array([0, 1, 0])}

    with pytest.raises(InputError, match="EOS"):
        _train(data, pp, steps=1)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda d: {"answer": d["answer"]}, ["answer (str)", 'keep("text", "mask_loss"']),
        (lambda d: {"boxes": d["boxes"]}, ["boxes (dict)"]),
        (lambda d: {"image": d["image"]}, ["image (bytes)"]),
        (lambda d: {"image": np.zeros(8 + int(d["number"]) % 3)}, ["'image'", "resize", "(8,)"]),
        (lambda d: {"x": 1} if d["number"] % 2 else {}, ["different keys", "'x'"]),
    ],
)
def test_rows_that_make_no_batch(data, extra, words):
    with pytest.raises(InputError) as e:
        _train(data, _make_pp(extra=extra), steps=6)
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_pp_that_wants_to_exit_is_an_error(data, prefetch):
    # In a thread it would end that thread, and training would wait for ever.
    with pytest.raises(InputError, match="pp failed: SystemExit: 0"):
        _train(data, lambda d, rng: sys.exit(0), steps=1, prefetch=prefetch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pp_errors_name_the_row(data, num_workers):
    with pytest.raises(InputError) as e:
        _train(data, _make_pp(fail_on=17), steps=6, num_workers=num_workers)
    message = str(e.value)
    assert "\n" not in message and message.endswith("there is no such thing")
    assert "tiny_vqa/en split train, record" in message and "(question_id q17)" in message
    # The index is that of the split as opened.
    index = int(message.split("record ")[1].split()[0])
    assert input_pipeline.open_source(data)[index]["question_id"] == "q17"


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
        _train(data, pp, steps=1, num_workers=1)


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


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        ({"batch_size": 12}, "input.batch_size=12 doesn't divide by the 8 shards.*use 8 or 16"),
        ({"batch_size": 4}, "use 8$"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": 8.0}, "positive"),
        ({"batchsize": 8}, "unknown keys.*batchsize"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch": "2"}, "prefetch='2'"),
        ({"on_error": "ignore"}, "input.on_error='ignore': expected 'error' or 'skip'"),
    ],
)
def test_config_errors(data, cfg, word):
    mesh = sharding.make_mesh([("data", -1)])
    with pytest.raises(InputError, match=word):
        _train(data, steps=0, mesh=mesh, **cfg)


# --- Mixtures ---


def _mix(data, weights, *, steps, total_steps=None, start_step=0, seed=7, mesh=None, **kw):
    """Batches of rows 0..22 ("big") and 100..108 ("small") mixed, and the epochs of each."""
    splits = dict(big="train", small="validate", other="train")
    sections = {name: dict(data={**data, "split": splits[name]}) for name in weights}
    cfg = {"data": weights, "pp": _make_pp(), "batch_size": 8, **sections, **kw}
    total = total_steps or start_step + steps
    with input_pipeline.training(cfg, seed=seed, mesh=mesh, start_step=start_step, total_steps=total) as batches:
        return [next(batches) for _ in range(steps)], batches.epochs()


def test_each_set_of_a_mixture_has_its_share_of_every_stretch(data):
    batches, epochs = _mix(data, dict(big=0.85, small=0.15), steps=30)
    is_small = np.concatenate([b["number"] for b in batches]) >= 100
    drawn = np.cumsum(is_small)
    assert np.abs(drawn - 0.15 * np.arange(1, len(drawn) + 1)).max() <= 0.5
    counts = dict(big=(~is_small).sum() / N_TRAIN, small=is_small.sum() / N_VALID)
    assert epochs == pytest.approx(counts)


def test_annealing_brings_a_set_in_late(data):
    weights, anneal = (
        dict(big=1, small=0),
        [(0.5, dict(big=1, small=1)), (0.75, dict(big=0, small=1))],
    )
    batches, _ = _mix(data, weights, anneal=anneal, steps=40)
    small = [int((b["number"] >= 100).sum()) for b in batches]
    assert small == [0] * 20 + [4] * 10 + [8] * 10


def test_sets_of_a_mixture_are_gone_through_whole_and_each_by_its_own_order(data):
    batches, _ = _mix(data, dict(big=1, small=1), steps=90, batch_size=1)
    numbers = np.concatenate([b["number"] for b in batches])
    big, small = numbers[numbers < 100], numbers[numbers >= 100]
    assert sorted(big[:N_TRAIN]) == list(range(N_TRAIN))
    assert all(sorted(small[k : k + 9]) == list(range(100, 109)) for k in (0, 9, 18, 27))
    assert small[:9].tolist() != small[9:18].tolist()
    same, _ = _mix(data, dict(big=1, other=1), steps=2 * N_TRAIN, batch_size=1)
    same = [int(b["number"][0]) for b in same]
    assert same[::2] != same[1::2]


def test_mixtures_resume_exactly_and_come_from_the_seed(data):
    weights, kw = dict(big=2, small=1), dict(anneal=[(0.6, dict(big=1, small=2))], total_steps=9)
    whole, epochs = _mix(data, weights, steps=9, **kw)
    later, epochs_later = _mix(data, weights, steps=4, start_step=5, **kw)
    _assert_equal(later, whole[5:])
    assert epochs == epochs_later
    other, _ = _mix(data, weights, steps=9, seed=8, **kw)
    assert any((a["number"] != b["number"]).any() for a, b in zip(whole, other))
    workers, _ = _mix(data, weights, steps=9, num_workers=2, **kw)
    _assert_equal(workers, whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_pieces_of_processes_make_the_same_mixture(data, monkeypatch, processes):
    weights = dict(big=2, small=1)
    whole, _ = _mix(data, weights, steps=6)
    for process in range(processes):
        with monkeypatch.context() as patch:
            share = (process, processes)
            patch.setattr(input_pipeline, "_process_share", lambda *_, share=share: share)
            patch.setattr(input_pipeline, "_put", lambda host, *_: host)
            pieces, _ = _mix(data, weights, steps=6)
        rows = slice(process * 8 // processes, (process + 1) * 8 // processes)
        for piece, batch in zip(pieces, whole):
            np.testing.assert_array_equal(piece["number"], np.asarray(batch["number"])[rows])


def test_an_epoch_of_a_mixture_is_all_its_rows(data):
    weights, sections = dict(big=2, small=1), dict(big=dict(data=data))
    sections["small"] = dict(data={**data, "split": "validate"})
    cfg = dict(data=weights, pp=_make_pp(), **sections)
    assert input_pipeline.num_examples(cfg) == N_TRAIN + N_VALID
    # A set of weight 0 isn't even opened.
    cfg = {**cfg, "data": dict(big=1, small=0), "small": dict(data=dict(name="none"))}
    assert input_pipeline.num_examples(cfg) == N_TRAIN


@pytest.mark.parametrize(
    "cfg, words",
    [
        (dict(data=dict(big=1)), "so input.big=dict.* is expected"),
        (dict(data=dict(big="1"), big={}), "input.data.big='1'; expected a weight"),
        (dict(data=dict(big=1), big=dict(pq="")), "input.big: unknown keys .*'pq'"),
        (dict(data=dict(big=1), bigg=dict(data={})), "unknown keys.*bigg"),
        (dict(data=dict(name="x", split="y"), anneal=[(0.5, {})]), "input.anneal is for mixtures"),
        (dict(data=dict(big=1), big={}, anneal=[(0.5, dict(small=1))]), r"expected \['big'\]"),
    ],
)
def test_mixture_errors(cfg, words):
    with pytest.raises(InputError, match=words):
        input_pipeline.training({"pp": _make_pp(), "batch_size": 8, **cfg}, seed=0, total_steps=5)


def test_a_mixture_must_know_how_long_it_is(data):
    cfg = dict(data=dict(big=1), big=dict(data=data), pp=_make_pp(), batch_size=8)
    with pytest.raises(InputError, match="needs total_steps"):
        input_pipeline.training(cfg, seed=0)


def test_waiting_is_measured(data):
    def pp(d, rng):
        time.sleep(0.05)
        return {"x": np.zeros(1)}

    cfg = {"data": data, "pp": pp, "batch_size": 2, "allow_missing_eos": True, "num_threads": 1}
    with input_pipeline.training(cfg, seed=0) as batches:
        for _ in range(3):
            next(batches)
        assert batches.step == 3
        assert 0.2 < batches.wait_seconds < 5
    with pytest.raises(StopIteration):
        next(batches)


# --- Records that can't be used ---


def _breaks(*numbers):
    """A pp with random numbers drawn before and after the place where it fails for `numbers`."""
    good = _make_pp()

    def pp(d, rng):
        before = rng.random()
        if int(d["number"]) in numbers:
            raise OSError("image file is truncated")
        return {**good(d, rng), "before": np.float32(before)}

    return pp


def _skipping(data, pp, *, steps, seed=7, **kw):
    """Batches, what was skipped in them, and their question ids."""
    start_step = kw.get("start_step", 0)
    options = {k: kw.pop(k) for k in ("start_step", "total_steps") if k in kw}
    cfg = {"data": data, "pp": pp, "batch_size": 8, "on_error": "skip", **kw}
    with input_pipeline.training(cfg, seed=seed, **options) as batches:
        made = [next(batches) for _ in range(steps)]
        ids = [batches.question_ids(start_step + i) for i in range(steps)]
        return made, batches.skipped(), ids


def test_skipped_records_are_replaced_counted_and_listed(data):
    plain = _train(data, _breaks(), steps=6)
    batches, skipped, ids = _skipping(data, _breaks(4, 11), steps=6)
    source = input_pipeline.open_source(data)
    lost = [(t, int(n)) for t, b in enumerate(plain) for n in b["number"] if n in (4, 11)]
    assert len(lost) == 4
    # Replacements may be bad themselves, and then they are listed, too.
    assert {(s["step"], s["question_id"]) for s in skipped} >= {(t, f"q{n}") for t, n in lost}
    assert [s["step"] for s in skipped] == sorted(s["step"] for s in skipped)
    for s in skipped:
        assert set(s) == {"step", "set", "record", "question_id", "reason"}
        assert source[s["record"]]["question_id"] == s["question_id"]
        assert s["reason"].endswith(
            f"({'question_id ' + s['question_id']}): pp failed: OSError: image file is truncated"
        )
    for step, (a, b) in enumerate(zip(batches, plain)):
        good = ~np.isin(b["number"], (4, 11))
        for key in a:
            np.testing.assert_array_equal(np.asarray(a[key])[good], np.asarray(b[key])[good])
        assert not np.isin(a["number"], (4, 11)).any()
        assert ids[step] == [f"q{n}" for n in a["number"]]


def test_nothing_is_skipped_of_sound_data(data):
    batches, skipped, _ = _skipping(data, _breaks(), steps=6)
    _assert_equal(batches, _train(data, _breaks(), steps=6))
    assert skipped == []


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"num_workers": 2}, {"prefetch": 0}])
def test_replacements_come_from_seed_and_step_alone(data, options):
    bad = range(0, N_TRAIN, 3)
    batches, skipped, ids = _skipping(data, _breaks(*bad), steps=6, num_threads=1)
    assert len(skipped) > 15
    other = _skipping(data, _breaks(*bad), steps=4, start_step=2, **options)
    _assert_equal(other[0], batches[2:])
    assert json.dumps(other[1]) == json.dumps([s for s in skipped if s["step"] >= 2])
    assert other[2] == ids[2:]


def test_replacements_in_a_mixture_are_of_the_same_set(data):
    cfg, options = _mixture(data, pp=_breaks(*range(0, 200, 2)))
    plain, _ = _mix(data, dict(big=2, small=1), steps=4, total_steps=9)
    weights = cfg.pop("data")
    batches, skipped, ids = _skipping(weights, cfg.pop("pp"), steps=4, total_steps=9, **cfg)
    for a, b in zip(batches, plain):
        np.testing.assert_array_equal(a["number"] >= 100, b["number"] >= 100)
        assert (a["number"] % 2 == 1).all()
    assert {s["set"] for s in skipped} == {"big", "small"}
    assert all(len(s["question_id"]) > 3 for s in skipped if s["set"] == "small")
    assert ids[0] == [f"{'small' if n >= 100 else 'big'}:q{n}" for n in batches[0]["number"]]


def test_only_records_of_batches_handed_out_count_and_the_count_goes_on(data):
    cfg = {"data": data, "pp": _breaks(*range(12)), "batch_size": 8, "on_error": "skip"}
    with input_pipeline.training(cfg | {"prefetch": 5}, seed=7) as batches:
        assert batches.skipped() == [] and batches.num_skipped == 0
        counts = []
        for step in range(3):
            next(batches)
            new = batches.skipped()
            assert new and {s["step"] for s in new} == {step}
            counts.append(len(new))
            assert batches.num_skipped == sum(counts)
            if step == 1:
                state = batches.state()
    assert state["skipped"] == sum(counts[:2])
    with input_pipeline.training(cfg, seed=7, start_step=2, state=state) as batches:
        next(batches)
        assert len(batches.skipped()) == counts[2]
        assert batches.num_skipped == sum(counts)


def test_a_run_that_met_an_error_may_go_on_with_skip(data):
    cfg = {"data": data, "pp": _make_pp(), "batch_size": 8}
    state = input_pipeline.training(cfg, seed=7).state()
    input_pipeline.training({**cfg, "on_error": "skip"}, seed=7, state=state)


def test_a_record_that_cannot_be_read_is_skipped(data, data_dir, tmp_path):
    sound = _train(data, steps=3)
    data, _ = _damaged_copy(data, data_dir, tmp_path)
    batches, skipped, ids = _skipping(data, _make_pp(), steps=3)
    assert skipped and all(s["question_id"] is None for s in skipped)
    assert "can't be read" in skipped[0]["reason"]
    changed = sum(int((a["number"] != b["number"]).sum()) for a, b in zip(batches, sound))
    assert 0 < changed <= len(skipped)
    assert ids == [[f"q{n}" for n in b["number"]] for b in batches]
    with pytest.raises(InputError, match=r"record \d+: can't be read"):
        _train(data, steps=3)
    # Its question id can't be known; it goes by its place.
    cfg = {"data": data, "pp": _make_pp(), "batch_size": N_TRAIN}
    assert f"train[{skipped[0]['record']}]" in input_pipeline.training(cfg, seed=7).question_ids(0)


def _raises(error):
    def pp(d, rng):
        raise error

    return pp


@pytest.mark.parametrize(
    ("pp", "words"),
    [
        (_raises(KeyError("imgae")), "10 records drawn one after another .*KeyError: 'imgae'"),
        (_raises(MemoryError("no room")), "record .*no room"),
        (_make_pp(eos=False), "no supervised EOS"),
        (_make_pp(extra=lambda d: {"answer": "left"}), "input.pp leaves keys"),
    ],
)
def test_what_is_no_fault_of_a_record_is_not_skipped(data, pp, words):
    with pytest.raises(InputError, match=words):
        _skipping(data, pp, steps=1)


def test_images_that_are_damaged_are_skipped(data, monkeypatch):
    read = input_pipeline.Source.__getitem__

    def damaged(self, index):
        record = read(self, index)
        kinds = {3: b"", 8: record["image"][:40], 9: b"GIF89a" + record["image"][6:]}
        return {**record, "image": kinds.get(int(record["number"]), record["image"])}

    monkeypatch.setattr(input_pipeline.Source, "__getitem__", damaged)
    pp = 'decode|resize(16)|value_range(-1, 1)|keep("image")'
    options = dict(steps=4, allow_missing_eos=True, num_threads=1)
    batches, skipped, _ = _skipping(data, pp, **options)
    assert {s["question_id"] for s in skipped} == {"q3", "q8", "q9"}
    assert all(np.isfinite(b["image"]).all() for b in batches)
    with pytest.raises(InputError, match=r"question_id q[389]\): pp failed"):
        _train(data, pp, **options)


# --- Which questions, and going on ---


def test_question_ids_of_any_step_without_pp(data):
    expected = [[f"q{n}" for n in b["number"]] for b in _train(data, steps=5)]
    cfg = {"data": data, "pp": _make_pp(fail_on=0), "batch_size": 8}
    with input_pipeline.training(cfg, seed=7, start_step=3) as batches:
        assert [batches.question_ids(step) for step in range(5)] == expected
    other = input_pipeline.training(cfg, seed=8)
    assert other.question_ids(0) != expected[0]


def test_records_without_a_question_id_are_called_by_their_place(data, monkeypatch):
    source = input_pipeline.open_source(data)
    places = {int(source[i]["number"]): f"train[{i}]" for i in range(len(source))}
    expected = [places[int(n)] for n in _train(data, steps=1)[0]["number"]]
    read = input_pipeline.Source.__getitem__

    def without(self, index):
        return {k: v for k, v in read(self, index).items() if k != "question_id"}

    monkeypatch.setattr(input_pipeline.Source, "__getitem__", without)
    cfg = {"data": data, "pp": _make_pp(), "batch_size": 8}
    assert input_pipeline.training(cfg, seed=7).question_ids(0) == expected


def _mixture(data, total_steps=9, **kw):
    sets = dict(big=dict(data=data), small=dict(data={**data, "split": "validate"}))
    cfg = {"data": dict(big=2, small=1), "pp": _make_pp(), "batch_size": 8, **sets, **kw}
    return cfg, dict(seed=7, total_steps=total_steps)


def test_question_ids_of_a_mixture_say_the_set(data):
    cfg, options = _mixture(data)
    with input_pipeline.training(cfg, **options) as batches:
        for step in range(4):
            numbers = [int(n) for n in next(batches)["number"]]
            expected = [f"{'small' if n >= 100 else 'big'}:q{n}" for n in numbers]
            assert batches.question_ids(step) == expected


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_goes_on_from_its_state(data, mixed):
    cfg, options = {"data": data, "pp": _make_pp(), "batch_size": 8}, {"seed": 7}
    if mixed:
        cfg, options = _mixture(data)
    with input_pipeline.training(cfg, **options) as batches:
        whole = [next(batches) for _ in range(3)]
        state = json.loads(json.dumps(batches.state()))
        whole.append(next(batches))
    assert state["next_step"] == 3 and state["batch_size"] == 8
    sets = {"big": ["train", N_TRAIN], "small": ["validate", N_VALID]}
    assert state["sets"] == (sets if mixed else {"tiny_vqa/en": ["train", N_TRAIN]})
    with input_pipeline.training(cfg, **options, start_step=3, state=state) as batches:
        _assert_equal([next(batches)], whole[3:])
        assert batches.state() == {**state, "next_step": 4}


@pytest.mark.parametrize(
    ("cfg", "options", "word"),
    [
        ({"batch_size": 4}, {}, "batch_size was 8 and is now 4"),
        ({}, {"seed": 8}, "seed was 7 and is now 8"),
        ({}, {"start_step": 2}, "next_step was 3 and is now 2"),
        ({"data": dict(big=1, small=1)}, {}, "mixture was .*0.66.* and is now .*0.5"),
        ({"data": dict(big=1, small=0)}, {}, "mixture was|sets was"),
        ({"big": "train[:9]"}, {}, r"sets was .*\['train', 23\].* is now .*\['train\[:9\]', 9\]"),
        ({"anneal": [(0.5, dict(big=1, small=2))]}, {}, "mixture was"),
    ],
)
def test_a_run_does_not_go_on_with_another_input(data, cfg, options, word):
    before, at = _mixture(data)
    state = input_pipeline.training(before, **at, start_step=3).state()
    # More steps of the same mixture are the same mixture, but not where it is annealed.
    input_pipeline.training(before, **{**at, "total_steps": 20}, start_step=3, state=state)
    if "big" in cfg:
        cfg = {"big": dict(data={**data, "split": cfg["big"]})}
    options = {**at, "start_step": 3, **options}
    with pytest.raises(InputError, match=word):
        input_pipeline.training({**before, **cfg}, **options, state=state)


def test_annealing_refers_to_a_length_that_may_not_change(data):
    cfg, options = _mixture(data, anneal=[(0.5, dict(big=1, small=2))])
    state = input_pipeline.training(cfg, **options).state()
    with pytest.raises(InputError, match="total_steps was 9 and is now 20"):
        input_pipeline.training(cfg, **{**options, "total_steps": 20}, state=state)


# --- Evaluation ---


def _eval_pp(d, rng):
    assert rng is None
    return {
        "text": np.full(4, int(d["number"]), np.int32),
        "number": d["number"],
        "question_id": d["question_id"],
        "boxes": d["boxes"],
        "_truncated": np.int32(d["number"] == 3),
    }


def test_columns_are_those_of_whole_records(data):
    source = input_pipeline.open_source(data)
    keys = ("question_id", "answer")
    rows = list(source.columns(keys))
    assert rows == [{k: source[i][k] for k in keys} for i in range(len(source))]
    assert all(isinstance(v, str) for row in rows for v in row.values())
    assert rows == list(source.columns(keys)) and len(rows) == source.about()["examples"]
    part = input_pipeline.open_source({**data, "split": "train[:3]"})
    assert list(part.columns(keys)) == rows[:3]
    about = part.about()
    assert (about["name"], about["split"]) == (data["name"], "train[:3]")
    assert about["version"] and about["bytes"] > 0


@pytest.mark.parametrize("batch_size", [1, 8, 23, 32])
def test_evaluation_goes_through_the_split_once_in_order(data, batch_size):
    source = input_pipeline.open_source(data)
    expected = [source[i]["question_id"] for i in range(len(source))]
    batches = input_pipeline.evaluation(data, _eval_pp, batch_size)
    assert len(batches) == N_TRAIN
    for _ in range(2):
        seen, texts, count = [], [], 0
        for batch, rows in batches:
            count += 1
            mask = np.asarray(batch["_mask"])
            assert mask.dtype == bool and mask.shape == (batch_size,)
            assert set(batch) == {"text", "number", "_mask"}
            assert mask.sum() == len(rows) and mask[: len(rows)].all()
            # Padding is a copy of row 0.
            text = np.asarray(batch["text"])
            assert (text[~mask] == text[0]).all()
            assert set(rows[0]) == {"question_id", "boxes"}
            seen += [row["question_id"] for row in rows]
            texts += list(text[mask][:, 0])
        assert seen == expected
        assert [f"q{n}" for n in texts] == expected
        assert count == batches.num_batches == -(-N_TRAIN // batch_size)
        assert batches.stats == {"examples": N_TRAIN, "truncated": 1}


def test_evaluation_can_be_left_and_started_again(data):
    batches = input_pipeline.evaluation(data, _eval_pp, 4)
    first = _ids(next(iter(batches))[1])
    assert _ids(next(iter(batches))[1]) == first
    assert sum(len(rows) for _, rows in batches) == N_TRAIN


def test_evaluation_on_a_mesh_and_with_workers(data):
    mesh = sharding.make_mesh([("data", -1)])

    def pp(d, rng):
        return {"number": d["number"], "answer": d["answer"]}

    plain = list(input_pipeline.evaluation(data, pp, 8))
    other = list(input_pipeline.evaluation(data, pp, 8, mesh=mesh, num_workers=1))
    _assert_equal([b for b, _ in other], [b for b, _ in plain])
    assert [rows for _, rows in other] == [rows for _, rows in plain]
    assert len(other[0][0]["number"].addressable_shards) == 8
    with pytest.raises(InputError, match="batch_size=6"):
        input_pipeline.evaluation(data, pp, 6, mesh=mesh)


def test_evaluation_errors_name_the_row(data):
    with pytest.raises(InputError, match=r"record \d+ \(question_id q4\): pp failed"):
        list(input_pipeline.evaluation(data, _make_pp(fail_on=4), 4))


class _Together:
    """Runs what several processes would do in threads: process p holds piece `shares[p]`."""

    def __init__(self, monkeypatch, shares):
        self._shares = shares
        self._local = threading.local()
        self._barrier = threading.Barrier(len(shares), timeout=20)
        self._said = [None] * len(shares)
        monkeypatch.setattr(jax, "process_count", lambda: len(shares))
        monkeypatch.setattr(input_pipeline, "_put", lambda batch, *_: batch)
        monkeypatch.setattr(input_pipeline, "_process_share", lambda *_: self._local.share)
        monkeypatch.setattr(input_pipeline.distributed, "gather", self._gather)

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
    whole = [rows for _, rows in input_pipeline.evaluation(data, _eval_pp, 8)]

    def run(process):
        batches = input_pipeline.evaluation(data, _eval_pp, 8)
        return [rows for _, rows in batches], batches.stats

    for rows, stats in _Together(monkeypatch, shares)(run):
        assert json.dumps(rows) == json.dumps(whole, default=np.ndarray.tolist)
        assert stats == {"examples": N_TRAIN, "truncated": 1}


@pytest.mark.parametrize("shares", [[(0, 2), (1, 2)], [(1, 2), (0, 2), (0, 2), (1, 2)]])
def test_every_process_is_told_of_all_skipped_records(data, monkeypatch, shares):
    pp = _breaks(*range(9))
    _, skipped, ids = _skipping(data, pp, steps=3)
    for _, told, said in _Together(monkeypatch, shares)(lambda p: _skipping(data, pp, steps=3)):
        assert told == skipped and said == ids


def test_an_error_in_the_rows_of_one_process_ends_all(data, monkeypatch):
    together = _Together(monkeypatch, [(0, 2), (1, 2)])
    pp = _make_pp(fail_on=4)
    errors = together(lambda p: list(input_pipeline.evaluation(data, pp, 8)))
    assert all(isinstance(e, InputError) and "(question_id q4)" in str(e) for e in errors)
    assert sum(str(e).startswith("in process ") for e in errors) == 1
    errors = together(lambda p: list(input_pipeline.evaluation(data, lambda d, _: d, 8)))
    assert all("type bytes; leave its key out of keep" in str(e) for e in errors)


# --- With the project's own pp ---


def test_pp_strings(data):
    concat = (
        'strfmt("answer en {question}", outkey="prefix")|copy("answer", "suffix")'
        '|tok(model="tiny", key="prefix", bos="yes")|tok(model="tiny", key="suffix", eos="yes")'
        '|masked_concat(["prefix", "suffix"], outkey="text", mask_ar=[0, 1], mask_loss=[0, 1])'
    )
    image = "decode|resize(16)|value_range(-1, 1)"
    lengths = '|tolen({n}, pad_value=0, key="text")|tolen({n}, pad_value=0, key="mask_loss")'
    pp = f'{image}|{concat}{lengths.format(n=64)}|keep("image", "text", "mask_loss")'
    batch = _train(data, pp, steps=1, batch_size=4)[0]
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((4, 16, 16, 3), "float32"),
        "text": ((4, 64), "int32"),
        "mask_loss": ((4, 64), "int32"),
    }
    assert isinstance(batch["image"], jax.Array)
    with pytest.raises(InputError, match=r"question_id q\d+.*tolen cut \d+ tokens.*now 10"):
        _train(data, pp.replace("64", "10"), steps=1)
    with pytest.raises(ValueError, match="unknown pp op 'decoed'"):
        _train(data, "decoed|resize(16)", steps=0)
