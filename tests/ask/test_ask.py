"""The program: a table as people write it, one line for each row, and going on after a kill."""

import csv
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from paligemma_med.ask.answering import Answerer
from paligemma_med.ask.table import ask_table, check_images, identity_of, questions_of
from paligemma_med.pp import own_table
from tests import tiny

QUESTIONS = ("Is this an MRI?", "Größe?", "=1+1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder with w/, films/ and q.csv; an `Answerer` of w)."""
    folder = tmp_path_factory.mktemp("ask")
    config = tiny.config(evals={})
    tiny.write_workdir(folder / "w", config)
    (folder / "films").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "films" / f"{i}.png")
    lines = ["Bild;question;Alter;answer", *(f"{i}.png;{q};{50 + i};yes" for i in range(5) for q in QUESTIONS)]
    (folder / "q.csv").write_text("\r\n".join([*lines, "0.png; ;1;", ""]), encoding="cp1252", newline="")
    return folder, Answerer(config, str(folder / "w"), batch_size=8, max_new_tokens=3)


def table_of(folder):
    return own_table.open_table(folder / "q.csv", images=folder / "films", columns="image=Bild", missing_images=True)


def read(folder):
    with open(folder / "answers.csv", encoding="utf-8-sig", newline="") as f:
        return list(csv.DictReader(f, delimiter=";"))


def test_a_line_for_each_row(run, tmp_path):
    folder, answerer = run
    table = table_of(folder)
    done = ask_table(answerer, table, tmp_path, identity_of(answerer, table))
    rows = read(tmp_path)
    own = ["Bild", "question", "Alter", "answer"]
    assert list(rows[0]) == [*own, "model_answer", "logprob", "note", "error"]
    asked = [(f"{i}.png", q) for i in range(5) for q in QUESTIONS]
    assert [(r["Bild"], r["question"].lstrip("'")) for r in rows] == asked
    assert [r["Alter"] for r in rows[::3]] == ["50", "51", "52", "53", "54"]
    assert (done.rows, done.failed, done.before, done.images) == (15, 3, 0, 4)
    assert all("4.png: No such file" in r["error"] and not r["model_answer"] for r in rows[12:])
    assert all(float(r["logprob"]) < 0 and not r["error"] for r in rows[:12])
    assert [line for line, _ in table.dropped] == [17]


def test_no_image_at_all_is_another_folder(run, tmp_path):
    folder, _ = run
    check_images(table_of(folder))
    table = own_table.open_table(folder / "q.csv", images=tmp_path, columns="image=Bild", missing_images=True)
    with pytest.raises(ValueError, match="none of the images that it names is there; the first would be .*0.png"):
        check_images(table)


def test_stopped_after_a_batch_it_goes_on(run, tmp_path, monkeypatch):
    folder, answerer = run
    table = table_of(folder)
    identity = identity_of(answerer, table)
    ask_table(answerer, table, tmp_path / "a", identity)

    def stopped(table, start=0):
        for question in questions_of(table, start):
            if question.number == 11:
                raise KeyboardInterrupt
            yield question

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr("paligemma_med.ask.table.questions_of", stopped)
        ask_table(answerer, table, tmp_path / "b", identity)
    ask_table(answerer, table, tmp_path / "b", identity)
    texts = [[(r["question"], r["model_answer"], r["error"]) for r in read(tmp_path / x)] for x in "ab"]
    assert texts[0] == texts[1]


def test_the_program_goes_on_where_it_was_killed(run, tmp_path, repo_root):
    folder, answerer = run
    table = table_of(folder)
    settings = dict(max_new_tokens=3, temperature=0.0, top_k=0, top_p=1.0, seed=0)
    identity = identity_of(answerer, table, images=str(folder / "films"), settings=settings)
    ask_table(answerer, table, tmp_path, identity)
    whole = (tmp_path / "answers.csv").read_bytes()
    cut = len(b"\r\n".join(whole.split(b"\r\n")[:10])) + 5  # killed while it wrote the tenth line
    (tmp_path / "answers.csv").write_bytes(whole[:cut])
    args = [f"--workdir={folder / 'w'}", f"--images={folder / 'films'}", "--columns=image=Bild", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "paligemma_med.ask", *args, "--max_new_tokens=3", f"--table={folder / 'q.csv'}"]
    done = subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Rows: 15 (9 of them from an earlier start); answers: 12; images read: 1." in done.stdout
    assert "without an answer: 3;" in done.stdout and "told above: 1." in done.stdout and "apostrophe" in done.stdout
    assert "python -m paligemma_med.evaluate --table=" in done.stdout
    found = (tmp_path / "answers.csv").read_bytes()
    assert found.startswith(whole[:cut]) and len(found) == len(whole) and found.count(b"\r\n") == 16
