"""answers.csv: goes on after any interruption, refuses other questions, and runs nothing in a spreadsheet."""

import csv
import os

import pytest

from paligemma_med.ask import sheet as sheets
from paligemma_med.ask.sheet import Sheet

COLUMNS = ("image", "question")
IDENTITY = dict(table="t", weights="w", settings=dict(seed=0))
ROWS = [
    ({"image": "a.png", "question": 'What,\r\nthen "now"?'}, ("ja, größer", -0.5, "", "")),
    ({"image": "b.png", "question": "Why?"}, ("", None, "", "b.png: not an image")),
    ({"image": "c.png", "question": "How\u2028many?"}, ("two\nlines", -2.25, "cut off", "")),
]


@pytest.fixture(autouse=True)
def no_disk(monkeypatch):
    """No power is cut here, and waiting for the disk some thousand times takes minutes."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def write(folder, rows=ROWS, start=0, **kw):
    with Sheet(folder, COLUMNS, IDENTITY, **kw) as sheet:
        for row in rows[sheet.done :]:
            sheet.add([row])
    return sheet


def read(folder, delimiter=","):
    with open(folder / "answers.csv", encoding="utf-8-sig", newline="") as f:
        return list(csv.reader(f, delimiter=delimiter))


def test_a_row_is_the_tables_and_ours(tmp_path):
    sheet = write(tmp_path)
    header, *rows = read(tmp_path)
    assert header == ["image", "question", "model_answer", "logprob", "note", "error"]
    assert rows[0] == ["a.png", 'What,\r\nthen "now"?', "ja, größer", "-0.500000", "", ""]
    assert rows[1][2:] == ["", "", "", "b.png: not an image"]
    assert rows[2][2] == "two\nlines" and sheet.failed == 1
    assert (tmp_path / "answers.csv").read_bytes().startswith(b"\xef\xbb\xbf")  # or Excel takes it for another code


def test_killed_at_any_byte_it_goes_on(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "answers.csv").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "answers.csv").write_bytes(whole[:length])
        sheet = write(tmp_path)
        assert (tmp_path / "answers.csv").read_bytes() == whole, length
        assert sheet.failed == 1


def test_killed_before_the_header(tmp_path):
    write(tmp_path)
    whole = (tmp_path / "answers.csv").read_bytes()
    (tmp_path / "answers.csv").unlink()
    write(tmp_path)
    assert (tmp_path / "answers.csv").read_bytes() == whole


@pytest.mark.parametrize(
    "key, value, what",
    [("table", "u", "the table"), ("weights", "v", "the weights"), ("settings", {"seed": 1}, "the settings")],
)
def test_other_questions_are_refused(tmp_path, key, value, what):
    write(tmp_path)
    before = (tmp_path / "answers.csv").read_bytes()
    with pytest.raises(ValueError, match=f"changed since: {what}"), Sheet(tmp_path, COLUMNS, {**IDENTITY, key: value}):
        pass
    assert (tmp_path / "answers.csv").read_bytes() == before
    sheets.remove(tmp_path)
    with Sheet(tmp_path, COLUMNS, {**IDENTITY, key: value}) as sheet:
        assert sheet.done == 0


def test_a_file_of_somebody_elses_stays(tmp_path):
    (tmp_path / "answers.csv").write_text("mine", encoding="utf-8")
    sheets.remove(tmp_path)
    with pytest.raises(ValueError, match=r"answers.csv is there without ask.json"):
        write(tmp_path)
    assert (tmp_path / "answers.csv").read_text(encoding="utf-8") == "mine"


def test_one_program_at_a_time(tmp_path):
    with Sheet(tmp_path, COLUMNS, IDENTITY):
        with pytest.raises(OSError, match="is in use by"), Sheet(tmp_path, COLUMNS, IDENTITY):
            pass


@pytest.mark.parametrize(
    "text", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "- no nodule", " =1"]
)
def test_formulas_are_text(tmp_path, text):
    row = ({"image": text, "question": "What?"}, (text, -1.0, "", ""))
    assert write(tmp_path, [row]).escaped == 2
    assert read(tmp_path)[1][:3] == [f"'{text}", "What?", f"'{text}"]
    write(tmp_path / "raw", [row], raw=True)
    assert read(tmp_path / "raw")[1][2] == text


@pytest.mark.parametrize("text", ["-5", "+3,5", "-1.5e-3", "a=b", "3-4", "", "it's"])
def test_numbers_and_words_stay(tmp_path, text):
    assert write(tmp_path, [({}, (text, -1.0, "", ""))]).escaped == 0
    assert read(tmp_path)[1][2] == text


def test_columns_of_the_table_keep_their_names(tmp_path):
    with Sheet(tmp_path, ["Error", "answer", "model_answer"], IDENTITY, delimiter=";") as sheet:
        sheet.add([({"Error": "a", "answer": "b;c", "model_answer": "d"}, ("e", -1.0, "", ""))])
    assert read(tmp_path, ";") == [
        ["Error", "answer", "model_answer", "model_answer_2", "logprob", "note", "error_2"],
        ["a", "b;c", "d", "e", "-1.000000", "", ""],
    ]
