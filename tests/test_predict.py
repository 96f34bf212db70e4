"""Answers to questions about one image, from Python and from the command line."""

import pathlib
import re
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from paligemma_med import predict
from paligemma_med.checkpoints import workdir as workdirs
from paligemma_med.config import files as config_files
from paligemma_med.pp import own_rows
from tests import tiny

QUESTIONS = ["Is this an MRI?", "Which organ is abnormal, the left or the right lung?"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, its config, an image file)."""
    folder = tmp_path_factory.mktemp("predict")
    tiny.write_workdir(folder / "w", tiny.config(evals={}))
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "film.png")
    config = config_files.from_json(workdirs.read_config(folder / "w"))
    return str(folder / "w"), config, folder / "film.png"


def program(root, *args):
    command = [sys.executable, "-m", "paligemma_med.predict", *args]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


def test_an_entry_for_each_question(run):
    workdir, config, image = run
    found = predict.predict(config, workdir, image.read_bytes(), QUESTIONS, max_new_tokens=3)
    assert [row["question"] for row in found] == QUESTIONS
    # What the model read: no answer, and nothing of the other question.
    assert [row["prompt"] for row in found] == [f"answer en {q}\n" for q in QUESTIONS]
    for row in found:
        (answer,) = row["answers"]
        assert set(answer) == {"answer", "logprob"} and answer["logprob"] < 0
        assert "answer en" not in answer["answer"]


def test_pixels_and_files_are_the_same_image(run):
    workdir, config, image = run
    with PIL.Image.open(image) as opened:
        pixels = np.asarray(opened)
    kw = dict(max_new_tokens=3)
    from_file = predict.predict(config, workdir, image.read_bytes(), QUESTIONS, **kw)
    assert predict.predict(config, workdir, pixels, QUESTIONS, **kw) == from_file
    black = predict.predict(config, workdir, 0 * pixels, QUESTIONS, **kw)
    assert black[0]["answers"][0]["logprob"] != from_file[0]["answers"][0]["logprob"]


def test_choices_stand_in_the_prompt(run):
    workdir, config, image = run
    config = config.copy_and_resolve_references()
    config.predict_pp = config.predict_pp.replace("{question}", "{question} A: {choice_a} B: {choice_b}")
    assert "choice_a" in config.predict_pp
    choices = own_rows.choices_of_flag("Left kidney | Heart")
    (row,) = predict.predict(config, workdir, image.read_bytes(), ["Which?"], choices=choices, max_new_tokens=1)
    assert row["prompt"] == "answer en Which? A: Left kidney B: Heart\n"
    with pytest.raises(ValueError, match="no key 'choice_a'.*--choices"):
        predict.predict(config, workdir, image.read_bytes(), ["Which?"], max_new_tokens=1)
    assert own_rows.choices_of_flag(None) == {}
    for text in ("", "Heart", "Heart|", "["):
        with pytest.raises(ValueError, match=f"--choices={re.escape(text)}: "):
            own_rows.choices_of_flag(text)


@pytest.mark.parametrize("questions", [[], (), "Is it?", ["  "], [QUESTIONS[0], ""], [None]])
def test_without_a_question(run, questions):
    workdir, config, image = run
    with pytest.raises(ValueError, match="expected a list of one question at least"):
        predict.predict(config, workdir, image.read_bytes(), questions)


def test_dicom_is_read_as_what_it_shows(run):
    """The picture on a screen, as PNG, gets the same answer to the last digit."""
    pytest.importorskip("pydicom")
    from tests.pp.dicom_files import make

    workdir, config, _ = run
    values = np.random.default_rng(1).integers(-1024, 1024, (40, 50), np.int16)
    content = make(values, RescaleSlope=1, RescaleIntercept=-20, WindowCenter=40, WindowWidth=400)
    kw = dict(max_new_tokens=3)
    found = predict.predict(config, workdir, content, QUESTIONS, **kw)
    shown = np.floor(np.clip((values - 20 - 39.5) / 399 + 0.5, 0, 1) * 255 + 0.5).astype(np.uint8)
    assert found == predict.predict(config, workdir, shown, QUESTIONS, **kw)


def test_samples(run):
    workdir, config, image = run
    kw = dict(max_new_tokens=3, num_samples=4, temperature=1.0, seed=5)
    (row,) = predict.predict(config, workdir, image.read_bytes(), QUESTIONS[:1], **kw)
    assert len(row["answers"]) == 4
    assert len({a["logprob"] for a in row["answers"]}) > 1


def test_question_too_long_is_reported(run, caplog):
    workdir, config, image = run
    long = "Is it " + "very " * 60 + "bad?"
    predict.predict(config, workdir, image.read_bytes(), [long, QUESTIONS[1]], max_new_tokens=3)
    (message,) = [r.getMessage() for r in caplog.records if "The prompt lost" in r.getMessage()]
    assert "Is it very" in message


def test_config_without_a_prompt(run):
    workdir, config, image = run
    config = config.copy_and_resolve_references()
    del config.predict_pp
    with pytest.raises(ValueError, match="no predict_pp"):
        predict.predict(config, workdir, image.read_bytes(), QUESTIONS)


def test_command_line(run, repo_root):
    workdir, _, image = run
    args = [f"--workdir={workdir}", f"--image={image}", "--max_new_tokens=3"]
    done = program(repo_root, *args, *(f"--question={q}" for q in QUESTIONS))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.split("\n")  # an untrained model may answer with line breaks
    assert [s for s in lines if s in QUESTIONS] == QUESTIONS
    assert done.stdout.count("(log-probability -") == 2


def test_help_and_mistakes(run, repo_root):
    workdir, *_ = run
    shown = program(repo_root, "--help").stdout
    assert "python -m paligemma_med.predict --workdir=out/s1 --image=film.jpg --question=" in shown
    question = "--question=Is it?"
    done = program(repo_root, f"--workdir={workdir}", "--image=/no/such.png", question)
    assert done.returncode != 0
    assert "--image /no/such.png: No such file or directory." in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for args in (["--question="], []):
        done = program(repo_root, f"--workdir={workdir}", "--image=x.png", *args)
        assert done.returncode != 0 and "--question" in done.stdout + done.stderr and "Traceback" not in done.stderr
    done = program(repo_root, f"--workdir={workdir}", "--image=x.png", question, "--num_samples=3")
    assert done.returncode != 0
    assert "--num_samples=3 at --temperature=0 is one answer so many" in done.stdout + done.stderr


def test_the_programs_define_no_flags_when_imported(repo_root):
    """They would clash with each other, and with a program that imports them."""
    code = (
        "from absl import flags; import paligemma_med.train, paligemma_med.evaluate,"
        " paligemma_med.predict; import data_prep.build;"
        "assert not {'config', 'workdir', 'image', 'data_dir'} & set(flags.FLAGS)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_programs_say_what_they_do():
    for name in ("train", "evaluate", "predict"):
        source = pathlib.Path(predict.__file__).with_name(f"{name}.py").read_text("utf-8")
        assert f"python -m paligemma_med.{name} " in source.split('"""')[1]
