"""What answering would take: the programs are those that evaluations run, and what can't be compiled is a sentence.

With the compilers at hand (`paligemma_med[chips-gpu]`, `[chips-tpu]`) slow tests compile for chips that aren't here.
"""

import importlib
import importlib.util
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from absl import app

from configs import common
from paligemma_med import cli, experiment, forecast
from paligemma_med.decode import losses
from paligemma_med.decode import options as scoring
from paligemma_med.evaluators import vqa
from paligemma_med.parallel import chips
from paligemma_med.setup import Setup
from tests import environ, tiny
from tools import audit

generate = importlib.import_module("paligemma_med.decode.generate")


def config(data_dir="/no/such/folder", **section):
    c = tiny.config(data_dir)
    c.evals.val.update({"batch_size": 8, **section})
    c.evals.loss = common.loss_eval(c, "phantom", "validate", batch_size=8, data_dir=str(data_dir))
    return c


def here(memory=2**30):
    """A chip that is one of this machine's devices."""
    return chips.Chip("here", "cpu", tuple(jax.devices()[:1]), memory, (), 1e9)


class Recorder:
    """Stands for a jitted function: what it is called with, or lowered from, as shapes."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kw):
        known = (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)
        shape = lambda x: (x.shape, str(x.dtype)) if isinstance(x, known) else x  # noqa: E731
        self.calls.append(jax.tree.map(shape, (args, kw)))
        raise KeyboardInterrupt

    lower = __call__


@pytest.mark.parametrize("name, where, what", [("val", generate, "_generate"), ("loss", losses, "answer_losses")])
def test_programs_are_those_that_an_evaluation_runs(name, where, what, tiny_data, monkeypatch):
    c = config(tiny_data, pred_kw=dict(max_new_tokens=4, num_samples=2, temperature=0.7))
    setup, seen = Setup(c), Recorder()
    params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), forecast.params_of(setup))
    monkeypatch.setattr(where, what, seen)
    monkeypatch.setattr("paligemma_med.decode.answer_losses", seen)
    evaluator, _ = experiment.make_evaluators(setup.config, setup.model, setup.tokenizer, setup.mesh)[name]
    evaluator.about = None  # or all weights would be read for their fingerprint
    with pytest.raises(KeyboardInterrupt):
        evaluator.run(params)
    (ran,) = seen.calls
    if what == "answer_losses":  # of keys that the model doesn't read
        ran[0][2].pop("image_at", None)
    (program,) = [p for p in forecast.of_evals(setup, text_len=20) if p.name.startswith(name)]
    with pytest.raises(KeyboardInterrupt):
        program.lower()
    assert seen.calls[1] == ran


@pytest.fixture(scope="module")
def made():
    """Of the tiny model, for one device: its setup, and the program that answers."""
    with here().target():
        setup = Setup(config())
        return setup, forecast.compile_program(setup, forecast.of_evals(setup)[1])


def test_what_is_printed(made, monkeypatch, capsys):
    setup, answers = made
    monkeypatch.setattr(forecast, "compile_program", lambda setup, program: answers)
    with here().target():
        (found,) = forecast.run(setup, [answers.program], "ask less").values()
    out = capsys.readouterr().out
    assert "val: answers, 8 rows with texts of 40 tokens" in out and "Fits: " in out
    assert "once for a batch" in out and "for one token of every answer, 3 times at most" in out
    weighs = sum(4 * x.size for x in setup.abstract.values()) / 2**30
    assert found["weights"] == pytest.approx(weighs)
    parts = ("weights", "batches", "temporary", "results", "program")
    assert found["peak"] == pytest.approx(sum(found[k] for k in parts))
    # A token reads each kernel of the language model once at least.
    of_llm = sum(4 * x.size for n, x in setup.abstract.items() if n.startswith("llm/layers"))
    assert found["bound_of_round"] > of_llm / 1e9
    with here(memory=2**20).target(), pytest.raises(ValueError, match="doesn't fit: .* temporary .*: ask less"):
        forecast.run(setup, [answers.program], "ask less")
    assert "config.frozen_dtype" in forecast._advice("weights", setup, "ask less")


def test_the_search_for_a_batch_size(made, monkeypatch, capsys):
    setup, _ = made
    monkeypatch.setattr(forecast, "compile_program", lambda setup, program: program)
    monkeypatch.setattr(forecast, "memory", lambda setup, program: {"temporary": 2**20 * program.rows})
    with here(memory=2**25).target():
        assert forecast.find_batch_sizes(setup) == {"val": 32, "loss": 32}
    assert "--config.evals.val.batch_size=32" in capsys.readouterr().out
    with here(memory=2**19).target(), pytest.raises(ValueError, match="doesn't fit: .* lower batch_size"):
        forecast.find_batch_sizes(setup)


def test_the_audit_of_decoding(made, monkeypatch, capsys):
    """Each of its parts alone: a stack that is copied is found, in the loop or outside."""
    setup, answers = made
    monkeypatch.setattr(forecast, "compile_program", lambda setup, program: answers)
    assert audit.run(setup.config, here(), program="decode") == []
    assert audit.run(setup.config, here(), program="prefill") == []
    assert "val: answers, prefill: 0 findings" in capsys.readouterr().out
    once, each = answers.parts
    of = audit.facts_of_program(setup, answers.program, least=2**8)
    assert {n for _, n in audit._stacks(once, of).values()} == {n for _, n in audit._stacks(each, of).values()}
    assert "llm/embedder/input_embedding" in {n for _, n in audit._stacks(once, of).values()}
    c = config()
    del c.evals.val
    with pytest.raises(ValueError, match="--program=decode: none of config.evals generates answers"):
        audit.run(c, here(), program="decode")


def of(**section):
    return forecast.of_evals(Setup(config(**section)))


def test_options_and_dialogues_have_programs_of_their_own(monkeypatch):
    seen = Recorder()
    monkeypatch.setattr(scoring, "_score_options", seen)
    found = {p.name: p for p in of(options="letter", choices=("choice_a", "choice_b", "choice_c"))}
    assert set(found) == {"val: answers", "val: options", "loss: losses"}
    with pytest.raises(KeyboardInterrupt):
        found["val: options"].lower()
    assert seen.calls[0][0][3] == ((8, 3, 4), "int32")
    c = config()
    c.evals.val = common.dialogue_eval(c, "phantom", "test", text_len=64, max_new_tokens=8)
    found = {p.name: p for p in forecast.of_evals(Setup(c))}
    assert set(found) == {"val: images", "val: answers", "loss: losses"}
    assert found["val: answers"].batch["zimg"].shape == (64, 4, 64) and found["val: answers"].text_len == 64


def test_saliency_is_of_the_longest_text(monkeypatch):
    c = config()
    found = forecast.of_saliency(Setup(c), max_new_tokens=10, methods=("rollout", "occlusion"))
    assert len(found) == 4 and [p.rows for p in found] == [3, 1, 1, 32]
    # As `explain` pads a prompt of 40 tokens and an answer of 10.
    assert {p.text_len for p in found[2:]} == {64}
    assert [p.batch["image"].shape[0] for p in found] == [p.rows for p in found]
    found[3].lower()
    c.predict_pp = ""
    with pytest.raises(ValueError, match="config has no predict_pp"):
        forecast.of_saliency(Setup(c))


@pytest.mark.parametrize(
    "section, sentence",
    [
        (dict(type="proj.paligemma.transfers.vqa"), "config.evals.val.type is .* big_vision's own"),
        (dict(pp_fn="keep('text')"), r"config.evals.val.pp_fn has no tolen\(…, key='text'\)"),
        (dict(num_sample=3), "config.evals.val has unknown keys .*num_sample"),
        (dict(batch_size=12), "config.evals.val.batch_size=12 doesn't divide by the 8 shards"),
    ],
)
def test_what_has_no_program_is_a_sentence(section, sentence):
    c = config()
    c.evals.val.update(section)
    with pytest.raises(ValueError, match=sentence):
        forecast.of_evals(Setup(c))


def test_an_evaluator_that_says_nothing(monkeypatch):
    monkeypatch.delattr(vqa, "PROGRAM")
    with pytest.raises(ValueError, match="config.evals.val.type is 'vqa', whose file doesn't say"):
        of()
    c = config()
    del c.evals
    with pytest.raises(ValueError, match="there is nothing to compile"):
        forecast.of_evals(Setup(c))


def test_a_chip_goes_with_a_dry_run(monkeypatch):
    """It would be an evaluation here, when a look at another machine was meant."""
    values = {name: types.SimpleNamespace(value=False) for name in ("dry_run", "find_batch_size")}
    monkeypatch.setattr(cli.flags, "FLAGS", type("Flags", (dict,), dict(chip="h200"))(values))
    with pytest.raises(app.UsageError, match="--chip is for --dry_run and --find_batch_size alone"):
        cli.check_chip_flags("dry_run", "find_batch_size")
    values["dry_run"].value = True
    assert cli.check_chip_flags("dry_run", "find_batch_size")


@pytest.mark.slow
@pytest.mark.parametrize(
    "chip, needs, device", [("h200", "jax_cuda12_plugin", "NVIDIA H200"), ("v5e:2x2", "libtpu", "TPU v5")]
)
@pytest.mark.parametrize(
    "program, printed", [("evaluate", "one token of every answer"), ("explain", "relevancy of the first tokens, 1 row")]
)
def test_compiles(chip, needs, device, program, printed):
    command = [sys.executable, "-m", f"paligemma_med.{program}", "--config=configs/slake_mini.py", "--dry_run"]
    env = environ.of_program()
    run = subprocess.run([*command, f"--chip={chip}"], capture_output=True, text=True, env=env)
    if importlib.util.find_spec(needs) is None:
        assert run.returncode == 1 and f"error: --chip={chip}: its compiler can't be started" in run.stderr
        assert run.stderr.count("\n") <= 3
        return
    assert run.returncode == 0, run.stderr
    assert device in run.stdout and "bound (roofline)" in run.stdout and printed in run.stdout and "Fits" in run.stdout
