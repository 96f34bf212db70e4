"""The program of all GPU rows: rows go on where a call ended, and none is lost or done twice."""

import json
import subprocess
import sys
import types

import pytest

from tools.bench import __main__, gpu, sizes

KW = dict(minutes=9.0, size="tiny", only=None, retry=False)
FIGURES = dict(
    size="tiny",
    batch_size={"ours": 2, "hf": 2},
    per_second={"ours": 5.0, "hf": 2.0},
    ours=dict(remat_policy="nothing_saveable", attn_impl="xla"),
    row="| work | 1.0 | 0.5 | 2.00 | 1.90 | 3 | 4 | 5% | chip |",
)


@pytest.fixture
def commands(monkeypatch):
    """Commands in place of running them; `answer` may be changed."""
    made = types.SimpleNamespace(found=[], answer=lambda name, flags: FIGURES)

    def run_one(out, name, part, flags, seconds):
        made.found.append((name, part, flags))
        return made.answer(name, flags)

    monkeypatch.setattr(gpu, "_run_one", run_one)
    return made


def test_all_rows_are_commands_that_there_are(tmp_path, commands):
    out = gpu.run(out=str(tmp_path), **KW)
    assert out["left"] == [] and out["failed"] == {}
    assert [c[0] for c in commands.found] == list(gpu.ROWS)
    for _, part, flags in commands.found:
        takes = __main__.PARTS[part][1]
        assert set(flags) <= set(takes) and flags["size"] == "tiny"
        assert None not in flags.values()  # or the command would say --x=None
    assert out["row"].count("\n") == len(gpu.ROWS) + 1
    # What the issue asks of a GPU: a step and sampled answers beside transformers, memory at one.
    of = {name: (part, flags) for name, part, flags in commands.found}
    assert of["train"] == ("train_step", dict(size="tiny", peer="hf", what="lora", rounds=5, steps=4))
    assert of["decode"][1]["peer"] == "hf" and of["memory-1"][1]["batch_size"] == 1


def test_a_second_call_goes_on(tmp_path, commands):
    def stop(name, flags):
        if name == "memory-1":
            raise KeyboardInterrupt
        return FIGURES

    commands.answer = stop
    with pytest.raises(KeyboardInterrupt):
        gpu.run(out=str(tmp_path), **KW)
    commands.answer = lambda name, flags: FIGURES
    commands.found.clear()
    gpu.run(out=str(tmp_path), **KW)
    assert [c[0] for c in commands.found] == list(gpu.ROWS)[2:]
    commands.found.clear()
    assert gpu.run(out=str(tmp_path), **KW)["left"] == [] and commands.found == []


def test_rows_wait_for_time_but_the_first_does_not(tmp_path, commands):
    out = gpu.run(out=str(tmp_path), **{**KW, "minutes": 0.01})
    assert [c[0] for c in commands.found] == ["train"]
    assert out["left"] == list(gpu.ROWS)[1:]
    # A first row that takes longer than a call has is told, or calls would go on for ever; a later
    # one is left for the next call.
    commands.answer = lambda name, flags: None if name == "decode" else FIGURES
    out = gpu.run(out=str(tmp_path), **KW)
    assert "decode" in out["failed"] and "longer than --minutes=9" in out["failed"]["decode"]


def test_a_later_row_that_ran_out_of_time_is_left(tmp_path, commands):
    commands.answer = lambda name, flags: None if name == "decode" else FIGURES
    out = gpu.run(out=str(tmp_path), **KW)
    assert out["failed"] == {} and out["left"][0] == "decode"


def test_the_best_of_each_side_meet(tmp_path, commands):
    speeds = {"train-ours-32": 9.0, "train-ours-16": 8.0, "train-hf-16": 3.0}

    def answer(name, flags):
        if name == "train-ours-16-cudnn":
            return dict(size="tiny", error="RuntimeError: no cuDNN")
        batch = {"ours": flags.get("batch_size", 2)}
        speed = {"ours": speeds.get(name, 1.0)}
        if flags["peer"] == "hf":
            batch["hf"], speed["hf"] = flags.get("peer_batch_size", 2), speeds.get(name, 2.0)
            speed["ours"] = 100.0 if name == "train-hf-16" else 5.0  # not a row of ours
        return {**FIGURES, "batch_size": batch, "per_second": speed}

    commands.answer = answer
    out = gpu.run(out=str(tmp_path), **KW)
    best = next(c[2] for c in commands.found if c[0] == "train-best")
    assert (best["batch_size"], best["peer_batch_size"], best["peer"]) == (32, 16, "hf")
    assert out["failed"] == {"train-ours-16-cudnn": "RuntimeError: no cuDNN"}
    # Failed rows are for --retry alone.
    commands.found.clear()
    gpu.run(out=str(tmp_path), **KW)
    assert commands.found == []
    gpu.run(out=str(tmp_path), **{**KW, "retry": True})
    assert [c[0] for c in commands.found] == ["train-ours-16-cudnn"]


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(out=None), "give --out"),
        (dict(size="2b"), "found '2b'; expected one of"),
        (dict(only=["train", "trian"]), r"--only has \['trian'\]; expected some of"),
        (dict(size="bench-s"), "train.json is of size 'tiny'; expected 'bench-s'"),
    ],
)
def test_mistakes_are_told(tmp_path, commands, wrong, message):
    gpu.run(out=str(tmp_path), **{**KW, "only": ["train"]})
    with pytest.raises(ValueError, match=message):
        gpu.run(**{"out": str(tmp_path), **KW, **wrong})


def test_a_command_is_ended_with_what_it_started_and_its_error_is_kept(tmp_path, monkeypatch):
    (tmp_path / "cache").mkdir()
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho 'jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory' >&2\n"
        "echo 'error: ours ended early (status 1); see above.' >&2\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(script))
    found = gpu._run_one(str(tmp_path), "x", "train_step", dict(size="tiny"), 20)
    assert "RESOURCE_EXHAUSTED" in found["error"] and "ended early" in found["error"]
    assert found["command"] == "python -m tools.bench train_step --size=tiny"
    script.write_text(f"#!/bin/sh\nsleep 300 &\necho $! > {tmp_path}/pid\nwait\n")
    assert gpu._run_one(str(tmp_path), "x", "train_step", dict(size="tiny"), 1.0) is None
    pid = int((tmp_path / "pid").read_text())
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    assert state.stdout.strip()[:1] in ("", "Z")  # gone, or waiting to be collected


@pytest.mark.slow
def test_the_program_on_a_cpu(tmp_path, repo_root):
    command = [
        sys.executable,
        "-m",
        "tools.bench",
        "gpu",
        f"--out={tmp_path}/out",
        "--size=tiny",
        "--minutes=20",
        "--only=train,memory-1,decode",
    ]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr
    for name in ("train", "memory-1", "decode"):
        found = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert found["per_second"]["ours"] > 0 and "--size=tiny" in found["command"]
    assert (tmp_path / "out/cache/weights/tiny-float32/base").is_dir()
    assert "| train | lora, tiny, float32, batch 2, hf |" in run.stdout
    assert sizes.SIZES["tiny"].batch_size == 2
