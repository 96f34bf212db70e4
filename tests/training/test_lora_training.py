"""Two stages: the head alone, then adapters on top of that run; and what loading makes of them."""

import json
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from paligemma_med import checkpoints, evaluate, experiment, train, weights
from paligemma_med.checkpoints import npz
from paligemma_med.config import files as config_files
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import step as train_step
from tests import tiny

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]
ADAPTERS = [(".*/lora_[ab]", dict(decay_type="constant")), (".*", None)]
RULES = [("img/Transformer/.*/(query|out)/kernel|llm/layers/attn/.*", dict(rank=2, alpha=4))]


def stage2(data, init, **kw):
    kw = dict(lora=RULES, schedule=ADAPTERS, total_steps=3, lr=1e-2, evals={}) | kw
    return tiny.config(data, model_init=init, **kw)


def flat(spec):
    return flatten_tree(checkpoints.load_params(spec))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """An npz of random weights."""
    c = tiny.config()
    rng = np.random.default_rng(0)
    shapes = experiment.abstract_params(c, experiment.make_model(c))
    tree = {n: rng.normal(0, 0.1, x.shape).astype("f4") for n, x in shapes.items()}
    path = tmp_path_factory.mktemp("base") / "w.npz"
    npz.save_npz(path, unflatten_tree(tree))
    return str(path)


@pytest.fixture(scope="module")
def stage1(tiny_data, base, tmp_path_factory):
    """Workdir of two steps of stage 1."""
    folder = str(tmp_path_factory.mktemp("stage1") / "w")
    train.train(tiny.config(tiny_data, model_init=base, schedule=HEAD, total_steps=2, evals={}, lr=1e-2), folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_data, stage1, tmp_path_factory):
    """(workdir of stage 2 on top of it, with dropout; what its eval said)."""
    folder = str(tmp_path_factory.mktemp("stage2") / "w")
    evals = tiny.config(tiny_data).evals.to_dict()
    rules = [(RULES[0][0], dict(RULES[0][1], dropout=0.2))]
    results = train.train(stage2(tiny_data, stage1, lora=rules, evals=evals), folder)
    return folder, results


def test_stage2_is_stage1_with_adapters_that_learnt(base, stage1, finished):
    before, head, after = flat(base), flat(stage1), flat(finished[0])
    assert not np.array_equal(before["img/head/kernel"], head["img/head/kernel"])
    factors = {n for n in after if lora.is_factor(n)}
    assert after.keys() - factors == head.keys()
    for n in head:
        np.testing.assert_array_equal(after[n], head[n], err_msg=n)
    assert {n.split("/")[0] for n in factors} == {"img", "llm"}
    for n in factors:
        assert np.abs(after[n]).max() > 0, n
    # Its checkpoint holds adapters alone, and nothing was written beside it.
    assert not os.path.exists(os.path.join(finished[0], "base.npz"))
    kept = os.path.join(finished[0], "checkpoints")
    size = sum(os.path.getsize(os.path.join(d, f)) for d, _, fs in os.walk(kept) for f in fs)
    assert 0 < size < os.path.getsize(base) / 3


def test_first_step_of_stage2_has_the_loss_of_its_start(tiny_data, stage1, tmp_path):
    """A fresh adapter adds nothing, so at learning rate 0 the loss is the plain model's."""
    losses = []
    for i, kw in enumerate((dict(lora=RULES), dict(lora=None, schedule=HEAD))):
        c = stage2(tiny_data, stage1, total_steps=1, lr=0.0, **kw)
        train.train(c, str(tmp_path / str(i)))
        with open(tmp_path / str(i) / "metrics.jsonl", encoding="utf-8") as f:
            losses.append(json.loads(f.readline())["training_loss"])
    assert losses[0] == losses[1]


def test_resumed_run_equals_the_straight_one(tiny_data, stage1, finished, tmp_path, monkeypatch):
    folder = str(tmp_path / "w")
    rules = [(RULES[0][0], dict(RULES[0][1], dropout=0.2))]
    c = stage2(tiny_data, stage1, lora=rules)
    jit_step, calls = train_step.jit_step, []

    def jit_and_stop(*args):
        step = jit_step(*args)

        def stop_at_the_second(*args):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return step(*args)

        return stop_at_the_second

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "jit_step", jit_and_stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(c, folder)
    train.train(c, folder)
    straight = flat(finished[0])
    for n, x in flat(folder).items():
        np.testing.assert_array_equal(x, straight[n], err_msg=n)


def test_evaluating_the_workdir_gives_the_metrics_of_training(finished, tmp_path):
    folder, results = finished
    c = config_files.from_json(checkpoints.workdir.read_config(folder))
    assert evaluate.evaluate(c, folder, str(tmp_path)) == results


def test_frozen_a_is_kept_with_the_run(tiny_data, base, tmp_path):
    """LoRA-FA: what is random and not trained must be found again."""
    folder = str(tmp_path / "w")
    schedule = [(".*/lora_b", dict(decay_type="constant")), (".*", None)]
    c = stage2(tiny_data, base, schedule=schedule)
    train.train(c, folder)
    expected, _ = weights.initial_params(TrainingSetup.without_data(c))
    found = flat(folder)
    names = [n for n in found if n.endswith("lora_a")]
    assert names and found.keys() == expected.keys()
    for n in names:
        np.testing.assert_array_equal(found[n], expected[n])
    assert {n for n in flatten_tree(npz.load_npz(os.path.join(folder, "base.npz")))} == {*names}


def test_stage2_keeps_the_stage1_it_started_from(tiny_data, base, tmp_path):
    """Stage 1 goes on afterwards: stage 2 must not become something else without a word."""
    s1, s2 = str(tmp_path / "s1"), str(tmp_path / "s2")
    kw = dict(model_init=base, schedule=HEAD, evals={}, lr=1e-2, keep_ckpt=2)
    train.train(tiny.config(tiny_data, total_steps=1, **kw), s1)
    train.train(stage2(tiny_data, s1, total_steps=1), s2)
    assert checkpoints.workdir.read_config(s2)["model_init"] == f"{s1}@1"
    before, head = flat(s2), flat(s1)["img/head/kernel"]
    train.train(tiny.config(tiny_data, total_steps=2, **kw), s1)
    assert not np.array_equal(flat(s1)["img/head/kernel"], head)
    np.testing.assert_array_equal(flat(f"{s1}@1")["img/head/kernel"], head)
    for n, x in flat(s2).items():
        np.testing.assert_array_equal(x, before[n], err_msg=n)
    # Resumed by the same command, it goes on from there too.
    train.train(stage2(tiny_data, s1, total_steps=2), s2)
    np.testing.assert_array_equal(flat(s2)["img/head/kernel"], head)
    assert checkpoints.workdir.read_config(s2)["model_init"] == f"{s1}@1"
    # With the old checkpoint gone, it says so.
    train.train(tiny.config(tiny_data, total_steps=4, **dict(kw, keep_ckpt=1)), s1)
    with pytest.raises(checkpoints.CheckpointError, match="no checkpoint of step 1 any more, only"):
        flat(s2)


# --- What loading makes of adapters and of config.lora


def test_a_config_without_lora_takes_that_of_the_run(finished):
    folder, _ = finished
    model, *_, params = weights.load(tiny.config(), folder)
    assert model.lora and flatten_tree(params).keys() == flat(folder).keys()


def test_weights_without_adapters_give_the_plain_model_and_say_so(base, capsys):
    model, *_, params = weights.load(tiny.config(lora=RULES), base)
    assert not model.lora and not any(map(lora.is_factor, flatten_tree(params)))
    assert "has no adapters: config.lora is left out" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(alpha=8), dict(rslora=True)])
def test_another_scale_than_in_training_is_refused(finished, change):
    c = tiny.config(lora=[(RULES[0][0], dict(RULES[0][1], **change))])
    with pytest.raises(checkpoints.CheckpointError, match="scaled otherwise than in training"):
        weights.load(c, finished[0])
    c.model_init = finished[0]
    with pytest.raises(checkpoints.CheckpointError, match="scaled otherwise than in training"):
        weights.initial_params(TrainingSetup.without_data(c))


def test_another_rank_than_in_training_is_refused(finished):
    c = tiny.config(lora=[(RULES[0][0], dict(rank=3, alpha=6))])
    message = r"lora_a: expected \(1, 32, 3\), found \(1, 32, 2\)"
    with pytest.raises(checkpoints.CheckpointError, match=message):
        weights.load(c, finished[0])


def test_adapters_of_the_weights_are_not_dropped_silently(finished):
    c = tiny.config(model_init=finished[0])
    with pytest.raises(checkpoints.CheckpointError, match="lora_a: unexpected"):
        weights.initial_params(TrainingSetup.without_data(c))


def test_rules_that_match_nothing_are_refused_at_once():
    with pytest.raises(ValueError, match="'img/haed/kernel' matches nothing that can be adapted"):
        experiment.make_model(tiny.config(lora=[("img/haed/kernel", dict(rank=2))]))


# --- adapter_init: from a PEFT folder


@pytest.fixture(scope="module")
def peft_folder(finished, tmp_path_factory):
    """The adapter of stage 2 as a PEFT folder."""
    folder = str(tmp_path_factory.mktemp("peft") / "adapter")
    checkpoints.save_adapter(folder, checkpoints.extract_adapter(RULES, checkpoints.load_params(finished[0])))
    return folder


def test_training_starts_from_an_adapter_and_takes_its_rules(tiny_data, stage1, finished, peft_folder, tmp_path):
    folder = str(tmp_path / "w")
    c = stage2(tiny_data, stage1, lora=None, adapter_init=peft_folder, total_steps=1, lr=0.0)
    train.train(c, folder)
    before = flat(finished[0])
    for n, x in flat(folder).items():
        np.testing.assert_array_equal(x, before[n], err_msg=n)
    written = checkpoints.workdir.read_config(folder)
    assert written["adapter_init"] == peft_folder
    found = config_files.from_json(written)
    specs = experiment.adapted(found, experiment.make_model(found))
    assert {(s.rank, s.scale) for s in specs.values()} == {(2, 2.0)}
    weights.load(found, folder)  # whose adapter began as adapter_init, and is its own since


def test_evaluating_base_and_adapter_equals_evaluating_the_run(tiny_data, stage1, finished, peft_folder, tmp_path):
    c = tiny.config(tiny_data, adapter_init=peft_folder)
    assert evaluate.evaluate(c, stage1, str(tmp_path)) == finished[1]


@pytest.mark.parametrize("rules", [[(RULES[0][0], dict(rank=2, alpha=8))], [("llm/.*", dict(rank=2, alpha=4))]])
def test_an_adapter_that_differs_from_the_rules_is_refused(stage1, peft_folder, rules):
    c = tiny.config(model_init=stage1, lora=rules, adapter_init=peft_folder)
    with pytest.raises(checkpoints.CheckpointError, match="differs from config.lora at"):
        weights.initial_params(TrainingSetup.without_data(c))


def test_dropout_of_an_adapter_may_differ_from_the_rules(stage1, peft_folder):
    rules = [(RULES[0][0], dict(RULES[0][1], dropout=0.3))]
    c = tiny.config(model_init=stage1, lora=rules, adapter_init=peft_folder)
    weights.initial_params(TrainingSetup.without_data(c))


def test_two_adapters_at_once_are_refused(finished, peft_folder):
    c = tiny.config(model_init=finished[0], lora=RULES, adapter_init=peft_folder)
    with pytest.raises(checkpoints.CheckpointError, match="give one of them"):
        weights.initial_params(TrainingSetup.without_data(c))
    with pytest.raises(checkpoints.CheckpointError, match="give one of them"):
        weights.load(c, finished[0])


def test_command_line_puts_an_adapter_on_weights(stage1, finished, peft_folder, tiny_data):
    """predict --checkpoint --adapter answers as predict --workdir does."""
    image = os.path.join(str(tiny_data), "..", "x.png")
    PIL.Image.new("RGB", (40, 40), (9, 99, 200)).save(image)
    ask = [f"--image={image}", "--question=Is this a CT?"]
    outs = []
    for flags in (
        [f"--workdir={finished[0]}"],
        [f"--workdir={stage1}", f"--adapter={peft_folder}"],
    ):
        command = [sys.executable, "-m", "paligemma_med.predict", *flags, *ask]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        outs.append(done.stdout)
    assert outs[0] == outs[1] and "log-probability" in outs[0]
