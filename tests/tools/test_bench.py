"""The benchmarks of training: all sides do the same work, and a side that doesn't is found out."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch

from paligemma_med.models import paligemma
from tools.bench import (
    load_speed,
    peers_big_vision,
    peers_hf,
    peers_ours,
    sizes,
    train_speed,
    workers,
)

ROWS = 2
BIG_VISION = pytest.mark.skipif(
    "BIG_VISION_DIR" not in os.environ, reason="BIG_VISION_DIR is not set"
)


@pytest.fixture(scope="module", autouse=True)
def compile_quickly():
    """Compiling is nearly all that these tests take; what XLA optimises is not what they test."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def unbound(monkeypatch):
    """What binds to cores would do so for the tests that follow."""
    monkeypatch.setattr(train_speed, "bind", lambda cores: None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """{what: settings of the tiny size, with weights}."""

    def one(what):
        folder = str(tmp_path_factory.mktemp(what))
        sizes.write_weights(folder, sizes.SIZES["tiny"], "float32", what)
        return dict(size="tiny", dtype="float32", what=what, weights=folder, rows=ROWS,
                    remat_policy="nothing_saveable", scan=True)  # fmt: skip

    return {what: one(what) for what in sizes.WHATS}


def losses(peer, settings, steps=3):
    side = peer.build(settings)
    return [side.value(side.step()) for _ in range(steps)], side.about


@pytest.mark.parametrize(
    "what", ["lora", *(pytest.param(x, marks=pytest.mark.slow) for x in ("stage1", "full"))]
)
def test_ours_and_torch_do_the_same(drawn, what):
    threads = torch.get_num_threads()
    ours, about = losses(peers_ours, drawn[what])
    theirs, of_theirs = losses(peers_hf, dict(drawn[what], cores=1))
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert about["trained"] == of_theirs["trained"]
    # The steps must have done something, or it would not matter what is trained.
    assert ours[0] - ours[-1] > 0.01


@BIG_VISION
@pytest.mark.slow
@pytest.mark.parametrize("what", sizes.WHATS)
def test_ours_and_big_vision_do_the_same(drawn, what):
    ours, about = losses(peers_ours, drawn[what])
    theirs, of_theirs = losses(peers_big_vision, drawn[what])
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert about["trained"] == of_theirs["trained"]


def test_big_vision_is_refused_where_it_is_not_or_can_not(drawn, monkeypatch):
    monkeypatch.setenv("BIG_VISION_DIR", "/no/such")
    with pytest.raises(ValueError, match="'/no/such'; expected a checkout of google-research/big"):
        peers_big_vision.build(drawn["lora"])
    with pytest.raises(ValueError, match="float32 alone, found --dtype=bfloat16"):
        peers_big_vision.build(dict(drawn["lora"], dtype="bfloat16"))


def test_sizes_are_those_of_the_issue():
    s = sizes.SIZES["bench-s"]
    assert (s.res, s.batch_size, s.text_len, s.dtype, s.cores) == (224, 4, 32, "float32", 2)

    def shapes(name):
        size = sizes.SIZES[name]
        return paligemma.abstract_params(
            paligemma.Model(img=size.img, llm=size.llm), image_size=size.res
        )

    small = shapes("bench-s")
    block = small["img"]["Transformer"]["encoderblock"]["MlpBlock_0"]["Dense_0"]["kernel"]
    assert block.shape == (6, 384, 1536)
    assert small["llm"]["layers"]["mlp"]["linear"].shape == (8, 2048, 512)
    assert small["llm"]["embedder"]["input_embedding"].shape == (8256, 512)
    for name, patches in (("3b-224", 256), ("3b-448", 1024)):
        true = shapes(name)
        assert sum(x.size for x in jax.tree.leaves(true)) == pytest.approx(2.92e9, rel=0.01)
        assert true["img"]["pos_embedding"].shape == (1, patches, 1152)
        assert sizes.SIZES[name].text_len == 128


def test_every_row_has_the_same_answer_and_no_padding():
    size = sizes.SIZES["tiny"]
    batch = sizes.draw_batch(size, 3)
    assert batch["text"].min() >= 3 and batch["text"].max() < size.llm["vocab_size"]
    np.testing.assert_array_equal(batch["mask_loss"].sum(1), [size.answer_len] * 3)
    assert batch["text"].shape == (3, size.text_len + 1)


# ---- Turns, with sides that only tell numbers

FAKE = """
import sys
sys.path.insert(0, {root!r})
from tools.bench import workers

class Side:
    about = dict(trained={trained}, parameters=7, flops_per_example=10**9)
    def __init__(self):
        self.taken = 0
    def step(self):
        print("a library says something")
        self.taken += 1
        return {loss} - self.taken
    value = staticmethod(float)
    def multiply(self, n):
        pass
    def peak(self):
        return {peak}

def build(settings):
    if {refuses}:
        raise ValueError("no weights at " + settings["weights"][:1])
    return Side()

workers.serve(lambda: dict(platform={platform!r}, device="a chip"), build)
"""


@pytest.fixture
def sides(tmp_path, monkeypatch, repo_root):
    """Makes `workers.SIDES` and the drawing of weights quick; sides are made by its arguments."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(train_speed, "draw", lambda *args: None)
    found = {}
    monkeypatch.setattr(workers, "SIDES", found)

    def add(name, trained=5, loss=9.0, peak=2 * 10**9, platform="gpu", refuses=False):
        kw = dict(trained=trained, loss=loss, peak=peak, platform=platform, refuses=refuses)
        (tmp_path / f"side_{name}.py").write_text(FAKE.format(root=str(repo_root), **kw), "utf-8")
        found[name] = f"side_{name}"

    return add


KW = dict(size="tiny", what="lora", dtype=None, batch_size=None, remat_policy=None, scan=None,
          cores=None)  # fmt: skip
TRAIN = dict(KW, peer_batch_size=None, rounds=3, steps=2)


def test_figures_of_turns(sides, monkeypatch):
    sides("ours")
    sides("hf", peak=3 * 10**9)
    ask = workers.Worker.ask
    turns = []

    def slow(self, **request):
        found = ask(self, **request)
        if request["do"] == "steps" and request["n"] == 2:
            turns.append(self.name)
            # One bad turn of the peer's, which a mean would show.
            seconds = 0.2 if self.name == "ours" else 0.6 if len(turns) > 2 else 60.0
            found |= dict(seconds=seconds, cpu_seconds=seconds / 2)
        if request["do"] == "multiply":
            found = dict(flops_per_second=4e10 if self.name == "hf" else 1e10)
        return found

    monkeypatch.setattr(workers.Worker, "ask", slow)
    out = train_speed.run(peer="hf", **TRAIN)
    assert turns == ["ours", "hf"] * 3
    assert out["ratio"] == pytest.approx(3) and out["cpu_ratio"] == 3
    assert out["losses"]["ours"] == [8.0, 7.0, 6.0]
    assert out["memory_gb"] == {"ours": 2.0, "hf": 3.0}
    # 1 GFLOP an example, two examples in 0.2 s, by the better of both products.
    assert out["tflops_per_second"]["ours"] == 0.01 and out["of_peak"]["ours"] == 0.25
    assert out["row"].count("|") == 8 and "| 0.200, 0.600 | 3.00 | 2.00, 3.00 |" in out["row"]
    assert json.loads(json.dumps(out)) == out
    # Half the batch in the same time is half as fast.
    turns.clear()
    out = train_speed.run(peer="hf", **{**TRAIN, "peer_batch_size": 1})
    assert out["ratio"] == pytest.approx(6)


@pytest.mark.parametrize(
    "theirs, message",
    [
        (dict(loss=9.01), "the loss of hf at step 1 is 8.01, that of ours 8.0"),
        (dict(loss="float('nan')"), "the loss of hf at step 1 is nan"),
        (dict(trained=6), r"train different numbers of parameters: {'ours': 5, 'hf': 6}"),
        (dict(platform="cpu"), "different devices, {'ours': 'gpu', 'hf': 'cpu'}"),
        (dict(refuses=True), "^no weights at /$"),
        (dict(peak="1 / 0"), "hf ended early"),
    ],
)
def test_a_side_that_differs_is_found_out(sides, theirs, message):
    sides("ours")
    sides("hf", **theirs)
    with pytest.raises(ValueError, match=message):
        train_speed.run(peer="hf", **TRAIN)


def test_losses_of_another_type_or_batch_may_differ(sides):
    sides("ours")
    sides("hf", loss=9.01)
    assert train_speed.run(peer="hf", **{**TRAIN, "dtype": "bfloat16"})["ratio"] > 0
    assert train_speed.run(peer="hf", **{**TRAIN, "peer_batch_size": 1})["ratio"] > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(size="2b"), "'2b'; expected one of .*bench-s"),
        (dict(what="head"), "'head'; expected one of .*stage1"),
        (dict(dtype="float16"), "'float16'; expected one of"),
        (dict(peer="vllm"), "'vllm'; expected 'hf', 'big_vision'"),
        (dict(rounds=0), "--rounds=0 and --steps=2 must be 1"),
    ],
)
def test_wrong_settings_are_told(wrong, message):
    with pytest.raises(ValueError, match=message):
        train_speed.run(**{**TRAIN, "peer": "hf", **wrong})


def test_load_starts_processes_in_turns(sides, monkeypatch):
    sides("ours")
    sides("hf")
    started = []
    start = workers.Worker.__init__

    def spied(self, name, settings, env=None):
        cache = (env or {}).get("JAX_COMPILATION_CACHE_DIR", "")
        started.append((name, os.path.basename(cache)))
        start(self, name, settings, env)

    monkeypatch.setattr(workers.Worker, "__init__", spied)
    out = load_speed.run(peer="hf", rounds=2, **KW)
    turns = [[("ours", f"cold{i}"), ("ours", "warm"), ("hf", "")] for i in range(2)]
    assert started == [("ours", "warm"), *turns[0], *turns[1]]
    for found in out["seconds_until"].values():
        assert 0 < found["imported"] <= found["built"] <= found["first_step"] < 60
    assert out["ratio"] > 0 and out["row"].startswith("| load, lora, tiny, float32 |")


def test_the_program_needs_neither_tfds_nor_grain(repo_root):
    """Nor does it hold a device: the driver has no JAX."""
    code = (
        "import sys; from tools.bench import train_speed, load_speed, __main__;"
        "print([m for m in ('tensorflow_datasets', 'grain', 'jax', 'torch') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=60
    )
    assert run.stdout.strip() == "[]", run.stderr


@pytest.mark.parametrize("peer", ["ours", "hf", pytest.param("big_vision", marks=BIG_VISION)])
@pytest.mark.slow
def test_sides_need_neither_tfds_nor_grain(drawn, peer):
    with workers.Worker(peer, drawn["lora"]) as side:
        assert side.about["unwanted"] == []
        assert len(side.ask(do="steps", n=1)["losses"]) == 1
        if side.about["platform"] == "cpu":
            assert 10**6 < side.ask(do="memory")["bytes"] < 10**10


@pytest.mark.slow
@pytest.mark.parametrize("part", ["train_step", "load"])
def test_the_command(repo_root, part):
    command = [sys.executable, "-m", "tools.bench", part, "--size=tiny", "--peer=hf", "--rounds=1"]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=900)
    assert run.returncode == 0, run.stderr
    *found, row, last = run.stdout.strip().splitlines()
    assert json.loads("\n".join(found))["size"] == "tiny"
    assert row.startswith("| ") and last.startswith("ratio ") and float(last.split()[1]) > 0


def test_the_command_tells_mistakes_in_a_line(repo_root):
    command = [sys.executable, "-m", "tools.bench", "train_step", "--size=2b"]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stderr.startswith("error: found '2b'; expected one of")
    assert "Traceback" not in run.stderr
