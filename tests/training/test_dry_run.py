"""The dry run: sizes that can be counted by hand, what it must not touch, and its verdict.

How near it comes to a run's real peak is measured by `python -m tools.bench.step_memory`.
"""

import dataclasses
import json
import subprocess
import sys
import types

import jax
import pytest

from paligemma_med import train
from paligemma_med.models import flops
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from paligemma_med.training import state as states
from paligemma_med.training.state import TrainState
from tests import environ, tiny

pytestmark = pytest.mark.usefixtures("optimised_file")

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]
HEAD_SIZE = 32 * 64 + 64
FSDP = [(".*", 'fsdp(axis="data", min_size_to_shard_mb=0)')]


def config(**kw):
    """No data there: whatever is read of it would be an error."""
    return tiny.config("/no/such/folder", schedule=HEAD, sharding_strategy=FSDP, **kw)


@pytest.fixture(scope="module")
def step(optimised_file):
    """The compiled step of `config()`, on eight devices."""
    return dry_run.compile_step(TrainingSetup.without_data(config()))


@pytest.fixture
def compiled(step, monkeypatch):
    monkeypatch.setattr(dry_run, "compile_step", lambda setup: step)


def test_figures(compiled, step, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    c = config()
    found = dry_run.dry_run(c)
    assert list(tmp_path.iterdir()) == []
    gib = 2**30
    assert found["trained weights"] * gib == 4 * HEAD_SIZE / 8
    assert found["optimizer state"] >= 2 * found["trained weights"]
    # Eight devices, nearly all of it cut in eight.
    count = sum(x.size for x in step.setup.abstract.values()) - HEAD_SIZE
    assert 4 * count / 8 <= found["frozen weights"] * gib < 4.4 * count / 8
    row = 4 * (tiny.RES**2 * 3 + 3 * (tiny.TEXT_LEN + 1))
    assert found["batches"] * gib == 6 * row * c.input.batch_size / 8
    whole = ("frozen weights", "trained weights", "optimizer state", "batches", "temporary")
    whole += ("results", "program")
    assert found["peak"] == pytest.approx(max(found["start"], sum(found[k] for k in whole)))
    # The compiler agrees about what it is given, but for the step's number and unused biases.
    given = sum(found[k] for k in whole[:3]) * gib + row * c.input.batch_size / 8
    assert step.compiled.memory_analysis().argument_size_in_bytes == pytest.approx(given, rel=0.01)
    out = capsys.readouterr().out
    for text in ("2,112 parameters trained", "temporary", "TFLOPs of a step", "8 × cpu", "4N"):
        assert text in out
    assert found["tflops_executed"] > found["tflops"] > 0


def test_prefetched_batches_count(step):
    def batches(c):
        other = dataclasses.replace(step, setup=TrainingSetup.without_data(c))
        return next(v for k, v in dry_run.memory(other).items() if k.startswith("batches"))

    more = config()
    more.input.prefetch = 5
    assert batches(more) * 6 == batches(config()) * 9


def test_fits_or_says_what_to_change(compiled, capsys):
    peak = dry_run.dry_run(config())["peak"]
    dry_run.dry_run(config(), hbm_gib=peak * 1.01)
    assert "Fits: 0.0" in capsys.readouterr().out
    message = r"doesn't fit: 0\.\d+ GiB on each device.* largest part is (temporary|batches).*: .*"
    with pytest.raises(ValueError, match=message + "config"):
        dry_run.dry_run(config(), hbm_gib=peak * 0.99)


def test_hbm_gib_without_dry_run(monkeypatch):
    """It would be a run, when a look at what it takes was meant."""
    values = types.SimpleNamespace(
        dry_run=False, find_batch_size=False, hbm_gib=24.0, workdir="w", config=None, chip=None
    )
    monkeypatch.setattr(train.flags, "FLAGS", values)
    monkeypatch.setattr(train.distributed, "start_from_flags", lambda: None)
    monkeypatch.setattr(train.cli, "with_weight_flags", lambda config: config)
    with pytest.raises(ValueError, match="--hbm_gib is for --dry_run and --find_batch_size alone"):
        train.main.__wrapped__([])


@pytest.mark.parametrize("name", ["frozen weights", "trained weights", "optimizer state"])
def test_advice_is_about_the_largest_part(name, step):
    parts = {"frozen weights": 1, "trained weights": 1, "optimizer state": 1, name: 2**31}
    with pytest.raises(ValueError, match=f"largest part is {name} with 2.00: .*config.sharding"):
        dry_run.check_fit(parts, 1.0, step.setup)


@pytest.mark.parametrize(
    "part, kw, advised, not_advised",
    [
        ("frozen weights", dict(), ["'bfloat16' or 'int8' or 'nf4'", "fsdp"], []),
        ("frozen weights", dict(frozen_dtype="bfloat16"), ["'int8' or 'nf4'"], ["bfloat16"]),
        ("frozen weights", dict(frozen_dtype="nf4"), ["fsdp"], ["frozen_dtype"]),
        ("temporary", dict(), ["supervised_len", "loss_chunk", "grad_accum_steps"], []),
        ("temporary", dict(supervised_len=8), ["loss_chunk"], ["supervised_len"]),
        ("temporary", dict(grad_accum_steps=2, mesh=[("data", 8)]), ["loss_chunk"], ["grad_accum"]),
        ("temporary", dict(loss_chunk=8), ["remat_policy", "config.model.img and config.model.llm"], ["loss_chunk"]),
    ],
)
def test_advice_is_nothing_that_is_done_already(part, kw, advised, not_advised):
    said = dry_run.advice(part, TrainingSetup.without_data(config(**kw)))
    assert all(x in said for x in advised) and not any(x in said for x in not_advised), said


def test_a_verdict_from_a_cpu_names_its_device(step, capsys):
    """The peak above it is the CPU's, and may be more than what it says fits."""
    dry_run.check_fit({"temporary": 2**30}, 2.0, step.setup)
    assert capsys.readouterr().out == "Fits: 1.00 of 2 GiB of a GPU or TPU.\n"


def test_the_start_counts(step):
    """On a CPU an array as its file has it, as float32, and in its own type, beside those that are there."""
    table = 1024 * 64  # the largest leaf, read first
    whole = [4 * x.size for x in step.setup.abstract.values()]
    assert max(whole) == 4 * table
    c = config(frozen_dtype="bfloat16")
    setup = TrainingSetup.without_data(c)
    found = dry_run.start(setup, dry_run.states.abstract(setup))
    assert found >= 6 * table


def activations(policy="nothing_saveable", schedule=HEAD, depth=3, rows=8, **kw):
    """Bytes kept for the backward pass on one device, without compiling."""
    model = {k: dict(v, depth=depth, scan=True, remat_policy=policy) for k, v in tiny.MODEL.items()}
    c = tiny.config(schedule=schedule, model=model, mesh=[("data", 8)], **kw)
    c.input.batch_size = rows
    setup = TrainingSetup.without_data(c)
    frozen = dict(setup.abstract)
    trained = {n: frozen.pop(n) for n in list(frozen) if schedule is not HEAD or "head" in n}
    return dry_run.saved_bytes(setup, TrainState(trained, None, frozen))


def test_activations_by_hand():
    """With everything remade, a layer more costs its input: tokens × width floats."""
    tokens = 4 + tiny.TEXT_LEN
    assert activations(depth=4) - activations(depth=3) == 4 * tokens * 64
    everything = dict(decay_type="constant")
    more = activations(depth=4, schedule=everything) - activations(depth=3, schedule=everything)
    assert more == 4 * (tokens * 64 + 4 * 32)


def test_activations_follow_rows_and_policy():
    assert activations(rows=32) == pytest.approx(4 * activations(rows=8), rel=0.05)
    assert activations(rows=32, grad_accum_steps=4) == activations(rows=8)
    kept = [activations(p) for p in ("nothing_saveable", "dots_saveable", "none")]
    assert kept[0] < kept[1] < kept[2]


@pytest.mark.slow
def test_what_a_step_needs_to_move(step):
    """Weights as they are stored, whole although they are cut over eight devices, but for the table."""
    whole = {n: 4 * x.size for n, x in step.setup.abstract.items()}
    (table,) = (n for n in whole if n.endswith("input_embedding"))
    c = step.setup.config
    kw = dict(res=c.res, text_len=c.text_len)
    expected = flops.weight_reads(step.setup.model, step.setup.trained_names, {**whole, table: whole[table] // 8}, **kw)
    assert dry_run.needed(dataclasses.replace(step, activations=7)) == dry_run.Needed(expected, 14)
    setup = TrainingSetup.without_data(config(grad_accum_steps=2, frozen_dtype="int8"))
    again = dry_run.Step(setup, None, states.abstract(setup), {}, 7, 0.0)
    # Twice as often; a quarter of the bytes, scales and the trained leaf not counted.
    assert expected / 2 < dry_run.needed(again).weights < expected * 0.75 and dry_run.needed(again).activations == 28


def test_bfloat16_is_bounded_by_float32_on_a_cpu():
    found = dry_run.dry_run(config(dtype="bfloat16", frozen_dtype="bfloat16"))
    assert found["peak_elsewhere"] <= found["peak"]
    assert "peak_elsewhere" not in dry_run.dry_run(config())


@pytest.mark.slow
def test_tensor_parallelism_is_told_per_device():
    whole = dry_run.memory(dry_run.compile_step(TrainingSetup.without_data(config())))
    c = config(mesh=[("data", 4), ("model", 2)])
    c.sharding_strategy = [(".*", 'tp(axis="model")')]
    step = dry_run.compile_step(TrainingSetup.without_data(c))
    assert jax.tree.leaves(step.state.frozen)[0].sharding.mesh.shape == {"data": 4, "model": 2}
    assert whole["frozen weights"] < dry_run.memory(step)["frozen weights"]


@pytest.mark.slow
def test_a_real_run_takes_what_was_foretold(repo_root):
    """The benchmark's case of full fine-tuning: 1 GB of state, 1 GB more in a step."""
    command = [sys.executable, "-m", "tools.bench.step_memory", "--case=all", "--steps=2"]
    env = environ.of_program()
    run = subprocess.run(command, cwd=repo_root, env=env, check=True, stdout=subprocess.PIPE)
    out = json.loads(run.stdout)
    assert out["temporary"] > 0.3 * out["foretold"] > 0.3 * 2**30
    assert 0.9 < out["found"] / out["foretold"] < 1.1
