"""tools.report: predictions that hold their own answers."""

import json

import openpyxl
import pytest

from tests.tools.report.reports import table, warnings
from tools.report import (
    contamination,
)
from tools.report.__main__ import make

# --- Contamination ---

# The layout of the authors' sheet: a Python object's address for the image, the prompt in front.
IMAGE = "<PIL.PngImagePlugin.PngImageFile image mode=RGB size=512x327 at 0x74C258F0{:04X}>"


def write_sheet(path, lines):
    book = openpyxl.Workbook()
    for line in [("Image ID", "Question", "Generated Answer", "Label"), *lines]:
        book.active.append(line)
    book.save(path)


def contaminated():
    """Six questions asked of four images each, answered without looking, prompt and all."""
    lines = []
    for q in range(6):
        question = f"What does the finding number {q} suggest?"
        for i in range(4):
            said = f"answer {question}\nThe finding suggests that thing."
            truth = f"The finding suggests tumour {i} in organ {q}."
            lines.append((IMAGE.format(10 * q + i), question, said, truth))
    return lines


def test_the_authors_layout_shows_their_contamination(tmp_path):
    write_sheet(tmp_path / "inference_results.xlsx", contaminated())
    read = contamination.read(tmp_path / "inference_results.xlsx")
    assert len(read) == 24 and read[0]["image"] is None
    found = contamination.examine(read)
    assert found["with_prompt"] == found["starts_with_prompt"] == 24
    assert (found["repeated"], found["always_same"], found["truth_same"]) == (6, 6, 0)
    assert found["constant_right"] == 6 and found["right"] == 0
    made = make([], foreign=[tmp_path / "inference_results.xlsx"])
    said = " ".join(warnings(made))
    assert "24 of 24 (100.0 %) of the predictions begin with the prompt" in said
    assert "the truth differs in 6 of them: the answers do not depend on the image" in said
    signs = table(made, "Signs of contamination")
    assert signs["· always answered the same"]["found"] == "6 of 6 (100.0 %)"
    assert signs["· by a majority answer, which sees no image"]["found"] == "6 of 6 (100.0 %)"
    scored = table(made, "What an answer without the image would score")
    assert set(scored) == {"predictions as given", "without the prompt", "the prompt alone", "the question alone"}


def test_sound_predictions_raise_no_alarm():
    clean = [
        dict(question="What does it show?", prediction=f"tumour {i}", answer=f"tumour {i}", image=str(i))
        for i in range(8)
    ]
    section = contamination.section("t", clean)
    assert not [b for b in section.blocks if b.kind == "warning"]
    found = contamination.examine(clean)
    assert found["always_same"] == 0 and found["right"] == 8 and found["constant_right"] == 1


def test_one_image_asked_twice_is_no_repeated_question():
    two = [dict(question="Same?", prediction="a", answer="b", image="1")] * 2
    assert contamination.examine(two)["repeated"] == 0
    assert contamination.examine([r | {"image": None} for r in two])["repeated"] == 1


def test_an_echo_that_scores_as_well_is_said():
    echo = [
        dict(
            question=f"Is there a large mass in lobe {i}?",
            image=str(i),
            answer=f"large mass {i}",
            prediction=f"answer en Is there a large mass in lobe {i}?\nno",
        )
        for i in range(6)
    ]
    said = [b.text for b in contamination.section("t", echo).blocks if b.kind == "warning"]
    assert any("Repeating the prompt, without image or model, scores" in text for text in said)


@pytest.mark.parametrize(
    "prediction, prompt",
    [
        ("answer en Is it there?\nyes", "answer en Is it there?"),
        ("Is it there?", "Is it there?"),
        ("yes", ""),
        ("The question Is it there? is hard", "The question Is it there?"),
        ("One could well ask Is it there?", ""),
    ],
)
def test_prompt_of(prediction, prompt):
    row = dict(question=" Is it there?", prediction=prediction)
    assert contamination.prompt_of(row) == prompt


@pytest.mark.parametrize("kind", ["json", "pandas.json", "jsonl", "csv", "xlsx"])
def test_foreign_files_of_every_kind_read_alike(tmp_path, kind):
    lines = [
        dict(image_id="1", question="q, 1", predicted_answer="a\n1", answer="b", rouge1=0.5),
        dict(image_id="2", question="q 2", predicted_answer="", answer="d", rouge1=0.1),
    ]
    path = tmp_path / f"f.{kind}"
    if kind == "json":
        path.write_text(json.dumps(lines))
    elif kind == "pandas.json":
        path.write_text(json.dumps({k: {"0": lines[0][k], "1": lines[1][k]} for k in lines[0]}))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    elif kind == "csv":
        path.write_text('image_id,question,predicted_answer,answer\n1,"q, 1","a\n1",b\n2,q 2,,d\n', newline="")
    else:
        book = openpyxl.Workbook()
        book.active.append(list(lines[0]))
        for line in lines:
            book.active.append(list(line.values()))
        book.save(path)
    assert contamination.read(path) == [
        dict(image="1", question="q, 1", prediction="a\n1", answer="b"),
        dict(image="2", question="q 2", prediction="", answer="d"),
    ]


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl"])
def test_foreign_files_of_spreadsheets_and_with_separators_in_their_texts(tmp_path, name):
    said = "A lesion.\u2028No\x85effusion."
    if name == "f.csv":
        text = f"\ufeffquestion;predicted_answer;answer\r\nq, 1;{said};b\r\n"
    else:
        row = dict(question="q, 1", predicted_answer=said, answer="b")
        text = json.dumps(row, ensure_ascii=False) + "\r\n"
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert contamination.read(tmp_path / name) == [dict(image=None, question="q, 1", prediction=said, answer="b")]


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "question,prediction,answer\na,b\n", "a.csv line 2: another number of cells"),
        ("a.txt", "x", "expected a .xlsx, .csv, .json or .jsonl"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"question": 1, "answer": 2}]', "no column for the prediction"),
        ("a.xlsx", "no zip", "can't be read as an Excel file"),
    ],
)
def test_foreign_files_that_cannot_be_read_say_why(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        contamination.read(tmp_path / name)
