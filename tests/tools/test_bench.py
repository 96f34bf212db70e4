"""The benchmarks: all sides do the same work, and one that doesn't is found out."""

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
    __main__,
    decode_hf,
    decode_ours,
    decode_speed,
    load_speed,
    peers_big_vision,
    peers_hf,
    peers_ours,
    saliency_hf,
    saliency_ours,
    saliency_speed,
    sizes,
    train_speed,
    turns,
    workers,
    yardstick,
)

ROWS = 2
BIG_VISION = pytest.mark.skipif("BIG_VISION_DIR" not in os.environ, reason="BIG_VISION_DIR is not set")


@pytest.fixture(autouse=True)
def unbound(monkeypatch):
    """What binds to cores would do so for the tests that follow."""
    monkeypatch.setattr(turns, "bind", lambda cores: None)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Settings of the tiny size, with weights."""
    folder = str(tmp_path_factory.mktemp("weights"))
    sizes.write_weights(folder, sizes.SIZES["tiny"], "float32")
    return dict(turns.model_settings("tiny", None, 1), weights=folder, rows=ROWS, samples=3, tokens=4)


@pytest.fixture
def torch_threads():
    """PyTorch's sides set their own."""
    threads = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == 1
    torch.set_num_threads(threads)


def losses(peer, settings, steps=3):
    side = peer.build(settings)
    return [side.value(side.step()) for _ in range(steps)], side.about


@pytest.mark.parametrize("what", ["lora", *(pytest.param(x, marks=pytest.mark.slow) for x in ("stage1", "full"))])
def test_ours_and_torch_do_the_same(drawn, what, torch_threads):
    ours, about = losses(peers_ours, dict(drawn, what=what))
    theirs, of_theirs = losses(peers_hf, dict(drawn, what=what))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert about["trained"] == of_theirs["trained"]
    # The steps must have done something, or it would not matter what is trained.
    assert ours[0] - ours[-1] > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantised_weights_are_other_weights_and_smaller(drawn, kind):
    settings = dict(drawn, what="lora")
    dense, about = losses(peers_ours, settings)
    found, of_found = losses(peers_ours, dict(settings, frozen_dtype=kind))
    assert of_found == about
    assert found != dense and found == pytest.approx(dense, rel=0.05)


def test_both_draw_the_same_answers(drawn, torch_threads):
    ours, theirs = decode_ours.build(drawn), decode_hf.build(drawn)
    greedy = {"ours": ours.result(), "hf": theirs.result()}
    assert decode_speed.check_answers(greedy, "float32") == {"ours": 1.0, "hf": 1.0}
    assert np.shape(greedy["ours"]) == (ROWS, 4)
    for side in (ours, theirs):
        assert side.value(side.step()) == ROWS * 3 * 4
    # Each call draws anew, or a cache might answer.
    assert not np.array_equal(ours.step(), ours.step())
    assert not np.array_equal(theirs.step(), theirs.step())


def test_both_roll_the_same_attention_out(drawn, torch_threads):
    found = {n: s.build(drawn).result() for n, s in (("ours", saliency_ours), ("hf", saliency_hf))}
    differ = saliency_speed.check_results(found, "float32")
    assert sorted(differ) == ["image_rollout", "logprobs", "rollout"]
    size = sizes.SIZES["tiny"]
    # The text that is read holds all of the answer but its last token.
    assert np.shape(found["ours"]["rollout"]) == (size.answer_len - 1, 9 + size.text_len)
    np.testing.assert_allclose(np.sum(found["hf"]["rollout"], axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    "theirs, message",
    [
        ([[1, 2], [3, 5]], "greedy answers of hf differ from ours: 75.0% are the same"),
        ([[1, 2]], r"greedy answers of hf have shape \(1, 2\), ours \(2, 2\)"),
    ],
)
def test_other_answers_are_found_out(theirs, message):
    greedy = {"ours": [[1, 2], [3, 4]], "hf": theirs}
    with pytest.raises(ValueError, match=message):
        decode_speed.check_answers(greedy, "float32")


def test_answers_in_bfloat16_may_differ():
    greedy = {"ours": [[1, 2], [3, 4]], "hf": [[1, 2], [3, 5]]}
    assert decode_speed.check_answers(greedy, "bfloat16") == {"ours": 1.0, "hf": 0.75}


def test_another_rollout_is_found_out():
    found = {"ours": dict(rollout=[[0.5, 0.5]]), "hf": dict(rollout=[[0.501, 0.499]])}
    with pytest.raises(ValueError, match="rollout of hf differs from ours by 0.002 of it"):
        saliency_speed.check_results(found, "float32")
    assert saliency_speed.check_results(found, "bfloat16")["rollout"]["hf"] == 0.002
    found["hf"] = dict(rollout=[[0.5]])
    with pytest.raises(ValueError, match=r"rollout of hf has shape \(1, 1\)"):
        saliency_speed.check_results(found, "bfloat16")


@BIG_VISION
@pytest.mark.slow
@pytest.mark.parametrize("what", sizes.WHATS)
def test_ours_and_big_vision_do_the_same(drawn, what):
    ours, about = losses(peers_ours, dict(drawn, what=what))
    theirs, of_theirs = losses(peers_big_vision, dict(drawn, what=what))
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert about["trained"] == of_theirs["trained"]


def test_big_vision_is_refused_where_it_is_not_or_can_not(drawn, monkeypatch):
    monkeypatch.setenv("BIG_VISION_DIR", "/no/such")
    with pytest.raises(ValueError, match="'/no/such'; expected a checkout of google-research/big"):
        peers_big_vision.build(drawn)
    with pytest.raises(ValueError, match="float32 alone, found --dtype=bfloat16"):
        peers_big_vision.build(dict(drawn, dtype="bfloat16"))


def test_sizes_are_those_of_the_issue():
    s = sizes.SIZES["bench-s"]
    assert (s.res, s.batch_size, s.text_len, s.dtype, s.cores) == (224, 4, 32, "float32", 2)

    def shapes(name):
        size = sizes.SIZES[name]
        return paligemma.abstract_params(paligemma.Model(img=size.img, llm=size.llm), image_size=size.res)

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


def test_prompts_are_questions_and_the_first_is_the_longest():
    batch = sizes.draw_prompts(sizes.SIZES["3b-224"], 8)
    lengths = batch["mask_input"].sum(1)
    assert lengths[0] == lengths.max() == 28 and 12 <= lengths.min() < 28
    np.testing.assert_array_equal(batch["text"] > 0, batch["mask_input"] > 0)
    assert sizes.draw_prompts(sizes.SIZES["tiny"], 2)["mask_input"].sum(1)[0] == 12


def test_weights_are_kept_where_told(tmp_path, monkeypatch):
    drawn = []

    def draw(folder, size, dtype):
        drawn.append((size, dtype))
        with open(os.path.join(folder, "base"), "w") as f:
            f.write(size)
        if size == "3b-448":
            raise ValueError("no space")

    monkeypatch.setattr(turns, "draw", draw)
    for _ in range(2):
        with turns.weights("tiny", "float32", str(tmp_path / "kept")) as folder:
            assert open(os.path.join(folder, "base")).read() == "tiny"
    assert drawn == [("tiny", "float32")]
    with turns.weights("tiny", "float32") as folder:
        pass
    assert not os.path.exists(folder) and len(drawn) == 2
    with pytest.raises(ValueError, match="no space"):
        with turns.weights("3b-448", "bfloat16", str(tmp_path / "kept")):
            pass
    assert os.listdir(tmp_path / "kept") == ["tiny-float32"]  # nothing half drawn is found again


# ---- Turns, with sides that only tell numbers

FAKE = """
import sys
sys.path.insert(0, {root!r})
from tools.bench import workers

class Side:
    about = dict(trained={trained}, parameters=7, flops_a_step=2 * 10**9)
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
    monkeypatch.setattr(turns, "draw", lambda *args: None)
    found = {}
    monkeypatch.setattr(workers, "SIDES", {"train_step": found})

    def add(name, trained=5, loss=9.0, peak=2 * 10**9, platform="gpu", refuses=False):
        kw = dict(trained=trained, loss=loss, peak=peak, platform=platform, refuses=refuses)
        (tmp_path / f"side_{name}.py").write_text(FAKE.format(root=str(repo_root), **kw), "utf-8")
        found[name] = f"side_{name}"

    return add


KW = dict(
    size="tiny", what="lora", dtype=None, batch_size=None, remat_policy=None, scan=None, attn_impl=None, cores=None
)
TRAIN = dict(KW, frozen_dtype=None, peer_batch_size=None, rounds=3, steps=2)


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
    assert out["row"].count("|") == 10
    assert "| 0.200, 0.600 | 0.100, 0.300 | 3.00 | 3.00 | 2.00, 3.00 |" in out["row"]
    assert out["peak_tflops_per_second"] == 0.04 and out["processor"]["isa"] in out["machine"]
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
        (dict(peer="vllm"), "'vllm'; expected 'hf', 'big_vision' or 'none'"),
        (dict(frozen_dtype="int4"), "--frozen_dtype is 'int4'; expected 'int8' or 'nf4'"),
        (dict(rounds=0), "--rounds is 0; expected 1 or more"),
        (dict(peer_batch_size=0), "--peer_batch_size is 0; expected 1"),
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

    def spied(self, name, settings, env=None, **kw):
        cache = (env or {}).get("JAX_COMPILATION_CACHE_DIR", "")
        started.append((name, os.path.basename(cache)))
        start(self, name, settings, env, **kw)

    monkeypatch.setattr(workers.Worker, "__init__", spied)
    out = load_speed.run(peer="hf", rounds=2, **KW)
    turns = [[("ours", f"cold{i}"), ("ours", "warm"), ("hf", "")] for i in range(2)]
    assert started == [("ours", "warm"), *turns[0], *turns[1]]
    for found in out["seconds_until"].values():
        assert found["processor"] > 0
        assert 0 < found["imported"] <= found["built"] <= found["first_step"] < 60
    assert out["ratio"] > 0 and out["row"].startswith("| load, lora, tiny, float32 |")


def test_the_yardstick_is_the_share_of_the_peak(sides, monkeypatch):
    """All sides in one run, and the limit: 2 GFLOPs at 40 GFLOP/s."""
    for name in ("ours", "hf", "big_vision"):
        sides(name)
    monkeypatch.setattr(yardstick, "peers", lambda: ["hf", "big_vision"])
    monkeypatch.setattr(yardstick, "_profile", lambda *args: dict(error="no profiler here", invalid=None))
    seconds = {"ours": 0.1, "hf": 0.2, "big_vision": 0.15}
    ask = workers.Worker.ask

    def slow(self, **request):
        found = ask(self, **request)
        if request["do"] == "steps":
            found |= dict(seconds=seconds[self.name], cpu_seconds=seconds[self.name] * 1.5)
        return dict(flops_per_second=4e10) if request["do"] == "multiply" else found

    monkeypatch.setattr(workers.Worker, "ask", slow)
    out = yardstick.run(size="tiny", batch_size=None, cores=None, rounds=2, steps=1, remat_policy=None, scan=None)
    assert out["limit_seconds"] == 0.05 and out["of_peak"] == {"ours": 0.5, "hf": 0.25, "big_vision": 0.333}
    assert out["over_ours"] == {"ours": 1, "hf": 2, "big_vision": 1.5} == out["cpu_over_ours"]
    assert "| hf | 0.200 | 0.300 | 2.00 | 2.00 | 25% |" in out["row"] and "no profile: no profiler here" in out["row"]
    assert "ratio" not in out and json.loads(json.dumps(out)) == out


def test_parts_without_such_a_peer_say_so():
    given = {k: v for k, v in __main__.PARTS["decode"][1].items()}
    with pytest.raises(ValueError, match="--peer is 'big_vision'; expected 'hf' or 'none'"):
        decode_speed.run(**{**given, "peer": "big_vision"})
    given = dict(__main__.PARTS["saliency"][1])
    with pytest.raises(ValueError, match="--peer is 'big_vision'; expected 'hf' or 'none'"):
        saliency_speed.run(**{**given, "peer": "big_vision"})


# ---- What a bare GPU box lacks

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow_datasets", "grain", "ml_collections"):
            raise ModuleNotFoundError(name + " is not on this box")
sys.meta_path.insert(0, Blocker())
"""


@pytest.fixture
def bare(tmp_path, repo_root):
    """Runs Python where neither TFDS, Grain nor ml_collections can be imported."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(BLOCKER, "utf-8")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "bare")}

    def run(*args, timeout=60):
        return subprocess.run(
            [sys.executable, *args],
            cwd=repo_root,
            env=env,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    assert "not on this box" in run("-c", "import grain").stderr
    return run


def test_all_but_input_import_on_a_bare_box(bare):
    """Nor does the driver hold a device: it has neither JAX nor PyTorch."""
    drivers = "train_speed, load_speed, decode_speed, saliency_speed, gpu, __main__"
    ours = "peers_ours, decode_ours, saliency_ours, saliency_memory"
    found = bare(
        "-c",
        f"import sys; from tools.bench import {drivers};"
        "print([m for m in ('jax', 'torch') if m in sys.modules]);"
        f"from tools.bench import {ours}",
    )
    assert (found.stdout.strip(), found.returncode) == ("[]", 0), found.stderr


@pytest.mark.parametrize("part", ["train_step", "decode", "saliency", "load"])
@pytest.mark.slow
def test_the_command(bare, tmp_path, part):
    found = bare(
        "-m",
        "tools.bench",
        part,
        "--size=tiny",
        "--peer=hf",
        "--rounds=1",
        f"--json={tmp_path}/found.json",
        "--allow_busy",
        timeout=900,
    )
    assert found.returncode == 0, found.stderr
    lines = found.stdout.strip().splitlines()
    *figures, row, last = lines[:-1] if lines[-1].startswith("INVALID: ") else lines
    figures = json.loads("\n".join(figures))
    assert (figures["invalid"] is not None) == lines[-1].startswith("INVALID: ")
    assert figures["size"] == "tiny" and figures["versions"]["torch"] == torch.__version__
    assert row.startswith("| ") and last.startswith("ratio ") and float(last.split()[1]) > 0
    assert json.loads((tmp_path / "found.json").read_text()) == {**figures, "row": row}


@pytest.mark.slow
def test_the_command_alone(bare):
    args = ["decode", "--size=tiny", "--peer=none", "--rounds=1", "--allow_busy"]
    found = bare("-m", "tools.bench", *args, timeout=300)
    assert found.returncode == 0, found.stderr
    assert "\n| 2 × 5 answers of 8, tiny, float32 |" in found.stdout


@pytest.mark.parametrize("peer", ["ours", "hf", pytest.param("big_vision", marks=BIG_VISION)])
@pytest.mark.slow
def test_sides_tell_what_they_import_and_take(drawn, peer):
    settings = dict(drawn, work="train_step", what="lora")
    with workers.Worker(peer, settings) as side:
        assert side.about["unwanted"] == (["ml_collections"] if peer == "big_vision" else [])
        assert len(side.ask(do="steps", n=1)["values"]) == 1
        if side.about["platform"] == "cpu":
            assert 10**6 < side.ask(do="memory")["bytes"] < 10**10


@pytest.mark.parametrize(
    "args, message",
    [
        (["train_step", "--size=2b"], "found '2b'; expected one of"),
        (["load", "--samples=3"], "load has no --samples; it takes"),
    ],
)
def test_the_command_tells_mistakes_in_a_line(repo_root, args, message):
    command = [sys.executable, "-m", "tools.bench", *args]
    run = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=60)
    assert run.returncode == 1 and run.stderr.startswith("error: ") and message in run.stderr
    assert "Traceback" not in run.stderr


def test_help_names_every_argument():
    takes = {k for _, given in __main__.PARTS.values() for k in given} - {"peer"}
    assert takes == {name for of_kind in __main__._TYPES.values() for name in of_kind}
