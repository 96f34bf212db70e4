"""--profile: which steps are traced, what is written, and what it may not break."""

import gzip
import json
import pathlib

import jax
import pytest

from paligemma_med.training import profiling


@pytest.fixture
def calls(monkeypatch):
    """Stands in for JAX's profiler, and notes the steps between which it was on."""
    out = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: out.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: out.append("stop"))
    return out


def run(profile, first, last, calls):
    for i in range(first, last):
        profile.step(i)
        calls.append(i)
    profile.close()
    return calls


@pytest.mark.parametrize(
    "steps, first, total, expected",
    [
        ("2:4", 0, 6, [0, 1, "start", 2, 3, "stop", 4, 5]),
        ("0:1", 0, 2, ["start", 0, "stop", 1]),
        ("1:9", 0, 3, [0, "start", 1, 2, "stop"]),
        ("1:4", 3, 6, ["start", 3, "stop", 4, 5]),
        ("1:3", 3, 5, [3, 4]),  # resumed behind it
        (None, 0, 2, [0, 1]),
    ],
)
def test_which_steps(steps, first, total, expected, calls, tmp_path):
    profile = profiling.Profile(steps, str(tmp_path), total)
    assert run(profile, first, total, calls) == expected


def test_other_processes_trace_nothing(calls, tmp_path, monkeypatch):
    monkeypatch.setattr(profiling.distributed, "is_main", lambda: False)
    profile = profiling.Profile("0:2", str(tmp_path), 2)
    assert run(profile, 0, 2, calls) == [0, 1]


def test_a_trace_that_cannot_be_written_is_a_warning(calls, tmp_path, monkeypatch, caplog):
    def fail():
        raise OSError("no space")

    monkeypatch.setattr(jax.profiler, "stop_trace", fail)
    profile = profiling.Profile("0:1", str(tmp_path), 2)
    assert run(profile, 0, 2, calls) == ["start", 0, 1]
    assert "no space" in caplog.text


@pytest.mark.parametrize("steps", ["", "10", "15:10", "3:3", "-1:2", "a:b", "1:2:3", "1.5:2"])
def test_bad_values(steps):
    with pytest.raises(ValueError, match="--profile is .*; expected first:last"):
        profiling.parse(steps)


def test_beyond_the_end(tmp_path):
    with pytest.raises(ValueError, match="--profile=6:8 begins after the run's 6 steps"):
        profiling.Profile("6:8", str(tmp_path), 6)


def test_a_real_trace_has_the_steps_and_what_they_ran(tmp_path):
    profile = profiling.Profile("1:3", str(tmp_path), 5)
    step = jax.jit(lambda x: (x @ x).sum())
    out = None
    for i in range(5):
        profile.step(i, out)
        out = step(jax.numpy.ones((64, 64)))
    profile.close(out)
    (path,) = pathlib.Path(tmp_path, "profile").rglob("*.trace.json.gz")
    with gzip.open(path, "rt") as f:
        events = json.load(f)["traceEvents"]
    steps = {e["args"]["step_num"] for e in events if e.get("name") == "train"}
    assert steps == {"1", "2"}
