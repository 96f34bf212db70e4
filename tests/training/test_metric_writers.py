"""TensorBoard and W&B: the same rows, gone on with after a resume, and never in training's way."""

import json
import os
import pathlib
import struct
import sys
import types

import pytest

from paligemma_med import train
from paligemma_med.training import metric_writers, progress
from tests import tiny

event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")


def events(folder):
    """All events of the files in `folder`, as TensorBoard takes them: file after file by name."""
    for path in sorted(pathlib.Path(folder).iterdir()):
        data = path.read_bytes()
        while data:
            (size,) = struct.unpack_from("Q", data)  # and a checksum; the data; another
            yield event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[12 + size + 4 :]


def scalars(folder):
    """{(name, step): value}, with what restarts have made void taken out."""
    out = {}
    for event in events(folder):
        if event.HasField("session_log"):
            out = {(n, s): v for (n, s), v in out.items() if s < event.step}
        for value in event.summary.value:
            out[value.tag, event.step] = value.simple_value
    return out


class FakeWandb:
    """Stands in for the package: notes what it's told."""

    def __init__(self, fail=None):
        self.calls, self.rows, self.fail = [], [], fail
        self.Settings = types.SimpleNamespace
        self.finished = False

    def init(self, **kw):
        if self.fail == "init":
            raise RuntimeError("no API key\nconfigured")
        self.calls.append(kw)
        return self

    def define_metric(self, name, **kw):
        self.calls.append((name, kw))

    def log(self, row):
        if self.fail == "log":
            raise ConnectionError("network is down")
        self.rows.append(row)

    def finish(self):
        self.finished = True
        if self.fail == "log":
            raise ConnectionError("network is still down")


@pytest.fixture
def fake(monkeypatch):
    def make(**kw):
        out = FakeWandb(**kw)
        monkeypatch.setitem(sys.modules, "wandb", out)
        return out

    return make


def test_tensorboard_has_the_rows(tmp_path):
    writers = metric_writers.open_writers(tiny.config(tensorboard=True), str(tmp_path), 0)
    writers.write(1, {"training_loss": 0.5, "lr": 1, "questions": ["q1"], "none": None})
    writers.write(2, {"training_loss": float("inf"), "val/model/overall/acc": 0.25})
    # Nothing waits to be written: a kill -9 here would lose no row.
    assert scalars(tmp_path / "tensorboard") == {
        ("training_loss", 1): 0.5,
        ("lr", 1): 1,
        ("training_loss", 2): float("inf"),
        ("val/model/overall/acc", 2): 0.25,
    }
    writers.close()
    assert os.listdir(tmp_path) == ["tensorboard"]


def test_tensorboard_brings_no_torch(tmp_path, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    metric_writers.open_writers(tiny.config(tensorboard=True), str(tmp_path), 0).close()
    assert "torch" not in sys.modules
    monkeypatch.setitem(sys.modules, "torch", "loaded")
    metric_writers.open_writers(tiny.config(tensorboard=True), str(tmp_path), 0).close()
    assert sys.modules["torch"] == "loaded"


def test_a_run_writes_the_same_rows_everywhere(tiny_data, tmp_path):
    c = tiny.config(tiny_data, total_steps=3, tensorboard=True, evals={}, peak_tflops=0.01)
    train.train(c, str(tmp_path), profile="1:2")
    rows = [json.loads(s) for s in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3] and progress.TIMING < set(rows[0])
    expected = {(k, r["step"]): v for r in rows for k, v in r.items() if k != "step"}
    assert scalars(tmp_path / "tensorboard") == pytest.approx(expected, rel=1e-6)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_tensorboard_forgets_what_a_resumed_run_takes_again(tmp_path):
    def run(first, last, value):
        writers = metric_writers.open_writers(tiny.config(tensorboard=True), str(tmp_path), first)
        for step in range(first + 1, last + 1):
            writers.write(step, {"x": value})
        return writers

    run(0, 5, 1.0)  # killed
    run(2, 4, 2.0)  # killed
    run(3, 6, 4.0).close()
    found = scalars(tmp_path / "tensorboard")
    assert found == {("x", i): v for i, v in enumerate([1.0, 1, 2, 4, 4, 4], 1)}


def test_wandb(tmp_path, fake):
    wandb = fake()
    c = tiny.config(wandb=dict(project="p", tags=["a"]))
    writers = metric_writers.open_writers(c, str(tmp_path), 0)
    started, axis = wandb.calls
    assert started["project"] == "p" and started["tags"] == ["a"]
    assert started["resume"] == "allow" and started["dir"] == str(tmp_path)
    assert "mode" not in started  # WANDB_MODE is the user's
    assert started["config"]["lr"] == c.lr
    assert axis == ("*", {"step_metric": "step"})
    writers.write(3, {"training_loss": 0.5})
    writers.write(3, {"val/acc": 0.25})
    assert wandb.rows == [{"step": 3, "training_loss": 0.5}, {"step": 3, "val/acc": 0.25}]
    writers.close()
    assert wandb.finished
    again = fake()
    metric_writers.open_writers(tiny.config(wandb=True), str(tmp_path), 3)
    assert again.calls[0]["id"] == started["id"] == (tmp_path / "wandb_id.txt").read_text().strip()


def test_other_runs_have_other_ids(tmp_path, fake):
    wandb = fake()
    for name in "ab":
        (tmp_path / name).mkdir()
        metric_writers.open_writers(tiny.config(wandb=True), str(tmp_path / name), 0)
    assert wandb.calls[0]["id"] != wandb.calls[2]["id"]


def test_wandb_that_does_not_start(tmp_path, fake, caplog):
    fake(fail="init")
    c = tiny.config(wandb=True)
    with pytest.raises(ValueError, match=r"W&B doesn't start \(no API key configured\).*login"):
        metric_writers.open_writers(c, str(tmp_path), 0)
    # A run that has come some way is worth more than its plots.
    writers = metric_writers.open_writers(c, str(tmp_path), 5)
    writers.write(6, {"x": 1.0})
    writers.close()
    assert "The run continues without it." in caplog.text


def test_a_writer_that_fails_is_dropped_with_one_warning(tmp_path, fake, caplog):
    fake(fail="log")
    c = tiny.config(wandb=True, tensorboard=True)
    writers = metric_writers.open_writers(c, str(tmp_path), 0)
    for step in (1, 2, 3):
        writers.write(step, {"x": float(step)})
    writers.close()
    writers.close()
    assert caplog.text.count("network is") == 1
    assert "W&B fails; the run continues without it" in caplog.text
    assert len(scalars(tmp_path / "tensorboard")) == 3  # the other one goes on


def test_a_full_disk_does_not_stop_training(tmp_path, caplog):
    writers = metric_writers.open_writers(tiny.config(tensorboard=True), str(tmp_path), 0)
    writers._writers[0]._file.close()
    writers._writers[0]._file._py_recordio_writer._writer = open("/dev/full", "wb", buffering=0)
    writers.write(1, {"x": 1.0})
    writers.write(2, {"x": 1.0})
    writers.close()
    assert caplog.text.count("TensorBoard fails") == 1 and "No space left" in caplog.text


@pytest.mark.parametrize("key, package", [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_absent_packages(key, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    for step in (0, 5):
        with pytest.raises(ValueError) as e:
            metric_writers.open_writers(tiny.config(**{key: True}), str(tmp_path), step)
        assert str(e.value).startswith(f"config.{key} is set, but {package} isn't installed: pip")


@pytest.mark.parametrize("value", ["project", 1, ["p"]])
def test_bad_wandb(value, tmp_path, fake):
    fake()
    with pytest.raises(ValueError, match="config.wandb is .*; expected True or a dict"):
        metric_writers.open_writers(tiny.config(wandb=value), str(tmp_path), 0)


@pytest.mark.parametrize("kw", [dict(), dict(tensorboard=False, wandb=False), dict(wandb=None)])
def test_nothing_asked_for_nothing_imported(kw, tmp_path, monkeypatch):
    for name in ("tensorboardX", "wandb"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    writers = metric_writers.open_writers(tiny.config(**kw), str(tmp_path), 0)
    writers.write(1, {"x": 1.0})
    writers.close()
    assert not os.listdir(tmp_path)


def test_other_processes_write_nothing(tmp_path, monkeypatch, fake):
    wandb = fake()
    monkeypatch.setattr(metric_writers.distributed, "is_main", lambda: False)
    c = tiny.config(wandb=True, tensorboard=True)
    writers = metric_writers.open_writers(c, str(tmp_path), 0)
    writers.write(1, {"x": 1.0})
    writers.close()
    assert not wandb.calls and not os.listdir(tmp_path)
