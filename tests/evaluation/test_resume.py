"""An evaluation that is killed goes on, and ends with the same bytes; what is another starts anew.

A function answers in the model's place; the slow test kills the program.
"""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.evaluation import results
from paligemma_med.evaluators import vqa
from paligemma_med.metrics import scoring
from tests import tiny
from tests.evaluators import answering
from tests.evaluators.answering import QUESTIONS, TOKENIZER, TRAIN, look, make_inputs

ABOUT = dict(fingerprint="f1", section=dict(batch_size=2), split="x test")


class Killed(BaseException):
    """As SIGKILL: nothing catches it, and nothing is tidied up."""


def count_calls(monkeypatch, dies_at=None):
    """Answers as `look` does; the n-th call raises. → the calls so far."""
    calls = answering.answer_with(monkeypatch, look)
    generate = decode.generate

    def counted(*args, **kw):
        if len(calls) == dies_at:
            raise Killed
        return generate(*args, **kw)

    monkeypatch.setattr(decode, "generate", counted)
    return calls


def evaluate(outdir, about=ABOUT, resume=True, inputs=None, **kw):
    kw = dict(controls=scoring.CONTROLS) | kw
    evaluator = vqa.Evaluator(
        None,
        TOKENIZER,
        inputs=inputs or list(make_inputs()),
        train_data=TRAIN,
        outdir=outdir,
        about=about and (lambda params: about),
        **kw,
    )
    evaluator.resume = resume
    return evaluator.run({})


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def straight(monkeypatch, tmp_path):
    """(files of an undisturbed evaluation, how often it asked the model)."""
    calls = count_calls(monkeypatch)
    evaluate(tmp_path / "straight")
    return files(tmp_path / "straight"), len(calls)


def test_killed_anywhere_it_ends_with_the_same_bytes(straight, monkeypatch, tmp_path):
    expected, total = straight
    assert total == 12  # three batches, by the model and with grey, noise, others' images
    for at in range(total):
        folder = tmp_path / str(at)
        count_calls(monkeypatch, dies_at=at)
        with pytest.raises(Killed):
            evaluate(folder)
        assert sorted(files(folder)) == [results.PART]
        calls = count_calls(monkeypatch)
        evaluate(folder)
        assert files(folder) == expected
        # What was on the disk isn't asked again: at most the calls of one batch are.
        assert total - at <= len(calls) < total - at + 3


def test_killed_again_and_again(straight, monkeypatch, tmp_path):
    for _ in range(8):
        count_calls(monkeypatch, dies_at=3)  # a batch of the first pass takes three
        try:
            evaluate(tmp_path / "e")
        except Killed:
            continue
        break
    assert files(tmp_path / "e") == straight[0]


def test_a_line_that_was_cut_off_is_asked_again(straight, monkeypatch, tmp_path):
    path = tmp_path / "e" / results.PART
    count_calls(monkeypatch, dies_at=10)
    with pytest.raises(Killed):
        evaluate(tmp_path / "e")
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 5  # what it is of, three batches, one with others' images
    cuts = [len(whole) - 1, len(b"".join(lines[:2])) + 5, len(lines[0]) - 1, 3, 0]
    for size in cuts:
        path.write_bytes(whole[:size])
        calls = count_calls(monkeypatch)
        evaluate(tmp_path / "e")
        assert files(tmp_path / "e") == straight[0]
        assert len(calls) == {0: 3, 1: 9}.get(cuts.index(size), 12)
        (tmp_path / "e" / results.METRICS).unlink()


@pytest.mark.parametrize(
    "change",
    [
        dict(about=ABOUT | dict(fingerprint="f2")),
        dict(about=ABOUT | dict(section=dict(batch_size=3))),
        dict(controls=("majority", "shuffled_images")),
        dict(resume=False),
        dict(about=None),
    ],
)
def test_of_something_else_it_starts_anew(straight, monkeypatch, tmp_path, change):
    count_calls(monkeypatch, dies_at=10)
    with pytest.raises(Killed):
        evaluate(tmp_path / "e")
    calls = count_calls(monkeypatch)
    evaluate(tmp_path / "e", **change)
    assert len(calls) == (6 if "controls" in change else 12)
    assert sorted(files(tmp_path / "e")) == [results.METRICS, results.PREDICTIONS]


def test_what_is_finished_is_not_asked_again(straight, monkeypatch, tmp_path, capsys):
    calls = count_calls(monkeypatch)
    folder = tmp_path / "straight"
    metrics = evaluate(folder)
    assert not calls and files(folder) == straight[0]
    assert metrics == results.read_metrics(folder / results.METRICS)[0]
    assert "is there for these weights" in capsys.readouterr().err
    # Its figures are made anew from its predictions.
    text = (folder / results.METRICS).read_text()
    (folder / results.METRICS).write_text(text.replace('"n": 5', '"n": 6'))
    assert evaluate(folder) == metrics and files(folder) == straight[0]
    evaluate(folder, resume=False)
    assert len(calls) == 12
    evaluate(folder, about=ABOUT | dict(fingerprint="f2"))
    assert len(calls) == 24
    (folder / results.PREDICTIONS).write_text("{")
    evaluate(folder, about=ABOUT | dict(fingerprint="f2"))
    assert len(calls) == 36


def test_where_and_how_it_was_started_is_no_difference(straight, monkeypatch, tmp_path):
    calls = count_calls(monkeypatch)
    evaluate(tmp_path / "straight", about=ABOUT | dict(command="python x", checkpoint="/y"))
    assert not calls
    about = results.read_metrics(tmp_path / "straight" / results.METRICS)[1]
    assert about["command"] == "python x" and about["checkpoint"] == "/y"


@pytest.mark.parametrize("key, value", [("question", "Which plane?"), ("answer", "MR")])
def test_questions_that_changed_are_refused(monkeypatch, tmp_path, key, value):
    count_calls(monkeypatch, dies_at=5)
    with pytest.raises(Killed):
        evaluate(tmp_path / "e")
    changed = [QUESTIONS[0] | {key: value}, *QUESTIONS[1:]]
    with pytest.raises(ValueError, match="another question or image at 'q0' .* --noresume"):
        evaluate(tmp_path / "e", inputs=list(make_inputs(changed)))


def test_an_image_that_changed_is_refused(monkeypatch, tmp_path):
    count_calls(monkeypatch, dies_at=5)
    with pytest.raises(Killed):
        evaluate(tmp_path / "e")
    monkeypatch.setitem(answering.IMAGES, "ct", 0.15)
    with pytest.raises(ValueError, match="another question or image at 'q0'"):
        evaluate(tmp_path / "e", inputs=list(make_inputs()))


def test_hashes_say_what_they_are_of():
    row = dict(question_id="1", image_id="a", question="?", answer="x", prompt="answer en ?\n")
    rows = [row, row | dict(question_id="2")]
    splits = {results.split_hash(rows), results.split_hash(rows[::-1]), results.split_hash([row])}
    for key in ("question_id", "image_id", "question", "answer"):
        splits.add(results.split_hash([row | {key: "new"}, rows[1]]))
    assert len(splits) == 7
    assert results.split_hash([r | dict(prompt="p", predictions=["y"]) for r in rows]) in splits
    other = [row | dict(prompt="answer ?\n"), rows[1]]
    assert results.prompt_hash(rows) != results.prompt_hash(other)
    assert results.split_hash(rows) == results.split_hash(other)


def test_values_that_cannot_be_written(monkeypatch, tmp_path):
    count_calls(monkeypatch)
    rows = [QUESTIONS[0] | dict(boxes=dict(label=["a"], bbox=np.ones((1, 4), np.float32)))]
    evaluate(tmp_path / "e", controls=(), inputs=list(make_inputs(rows, 1)))
    (row,) = results.read_rows(tmp_path / "e" / results.PREDICTIONS)
    assert row["boxes"] == dict(label=["a"], bbox=[[1, 1, 1, 1]])
    rows = [QUESTIONS[0] | dict(image_bytes=b"x")]
    with pytest.raises(ValueError, match="'q0' has a value of type bytes.*leave its key out"):
        evaluate(tmp_path / "f", controls=(), inputs=list(make_inputs(rows, 1)))


# --- The program ---


@pytest.mark.slow
def test_the_program_is_killed(tiny_data, tmp_path, repo_root):
    """SIGKILL after each line that appears, until it gets through; then as undisturbed."""
    c = tiny.config(tiny_data)
    c.evals.val.batch_size = 8
    c.evals.val.pred_kw = dict(max_new_tokens=4, num_samples=5, temperature=1.0)
    tiny.write_workdir(tmp_path / "w", c)

    def start(out):
        command = [sys.executable, "-m", "paligemma_med.evaluate", f"--workdir={tmp_path}/w", f"--out={out}"]
        return subprocess.Popen(command, cwd=repo_root, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def lines():
        path = tmp_path / "killed/eval/val" / results.PART
        return path.read_bytes().count(b"\n") if path.exists() else 0

    beside = start(tmp_path / "straight")
    kills, going_on = 0, 0
    while True:
        process, seen = start(tmp_path / "killed"), lines()
        while process.poll() is None and lines() <= max(seen, 1):
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        err = process.communicate()[1]
        going_on += "resumes after" in err
        if process.returncode != -signal.SIGKILL:
            break
        assert kills < 20
    assert process.returncode == 0, err
    assert beside.wait(300) == 0
    assert kills >= 3 and going_on >= 2
    a, b = (tmp_path / x / "eval/val" for x in ("killed", "straight"))
    tiny.assert_same_eval(a, b)
    assert sorted(os.listdir(a)) == [results.METRICS, results.PREDICTIONS]
    rows = results.read_rows(a / results.PREDICTIONS)
    assert all(len(row["noise_image_predictions"]) == 5 for row in rows)
    with open(a / results.METRICS, encoding="utf-8") as f:
        about = json.load(f)["about"]
    assert about["controls"] == list(scoring.CONTROLS)
    metrics = results.read_metrics(a / results.METRICS)[0]
    assert scoring.summarise(rows, about["protocol"]) == metrics


def test_a_second_evaluation_in_a_folder_is_refused(tmp_path):
    part = results.Part(tmp_path, ABOUT)
    with pytest.raises(OSError, match=f"{tmp_path} is in use by process {os.getpid()} on"):
        results.Part(tmp_path, ABOUT)
    part.close()
    results.Part(tmp_path, ABOUT).close()
    assert not (tmp_path / ".lock").exists()
