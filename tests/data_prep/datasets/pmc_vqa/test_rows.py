"""How PMC-VQA's tables are written: every leftover that its readers met, and what is made of it."""

import csv

import pytest

from data_prep.datasets.pmc_vqa.rows import clean, parse, read_table
from data_prep.files import DataError

V1 = {
    "figure path": "PMC1064097_F1.jpg",
    "question": " What is the uptake pattern? ",
    "answer": "Focal uptake",
    "choice a": "A:Diffuse uptake ",
    "choice b": "B:Focal uptake",
    "choice c": " C: No uptake",
    "choice d": "D:Cannot be told",
    "answer label": "B",
}


def _parse(blank=False, **changes):
    row = {**V1, **changes}
    return parse({k: v for k, v in row.items() if v is not None}, "q1", "t.csv row 0", blank=blank)


def test_a_row_of_v1():
    q = _parse()
    assert not q.dropped and not q.flags
    assert q.features == {
        "question": "What is the uptake pattern?",
        "answer": "Focal uptake",
        "answer_type": "CLOSED",
        "answer_letter": "B",
        "choice_a": "Diffuse uptake",
        "choice_b": "Focal uptake",
        "choice_c": "No uptake",
        "choice_d": "Cannot be told",
        "caption": "",
        "question_id": "q1",
        "image_id": "PMC1064097_F1.jpg",
        "paper_id": "PMC1064097",
    }


def test_a_row_of_v2_has_the_letter_as_its_answer():
    v2 = {"answer": " C ", "answer label": None, "caption": " A CT\u00a0( blue  arrows ).\n"}
    q = _parse(**v2, **{"choice c": " C: Circumflex Artery "})
    assert not q.dropped and not q.flags
    assert (q.features["answer"], q.features["answer_letter"]) == ("Circumflex Artery", "C")
    assert q.features["caption"] == "A CT ( blue arrows )."


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("\u00a0a\u200a b\t\u202fc\n", "a b c"),
        ("\ufeffa\u200bb\u2060 ", "ab"),
        ("\"'a b'\"", "a b"),
        ('"a b', "a b"),
        ('a "b" c', 'a "b" c'),
        ("5' end", "5' end"),
        ("the patient's", "the patient's"),
        ("'", "'"),
        ('"', ""),
        ("None", "None"),
    ],
)
def test_clean(text, wanted):
    assert clean(text) == wanted
    assert clean(clean(text)) == wanted


@pytest.mark.parametrize("label", ["B", " b", '"B"', "'B'", "B:", "(B)", "B.", "B: Focal", "\u00a0B"])
def test_letters(label):
    q = _parse(**{"answer label": label, "answer": "something else"})
    assert q.features["answer_letter"] == "B" and not q.flags


@pytest.mark.parametrize("label", ["", "E", "BC", None])
def test_answer_by_its_text_where_no_letter_is(label):
    q = _parse(**{"answer label": label, "answer": " focal  Uptake"})
    assert q.features["answer_letter"] == "B" and q.features["answer"] == "Focal uptake"
    assert q.flags == ["answer found by its text, not by a letter"]
    assert _parse(**{"answer label": label, "answer": "Lung"}).dropped == ("no option is named as the answer")


def test_the_letter_counts_where_letter_and_text_disagree():
    q = _parse(answer="No uptake")
    assert q.features["answer"] == "Focal uptake"
    assert q.flags == ["letter and text of the answer disagree; the letter counts"]


@pytest.mark.parametrize(
    "option, wanted",
    [
        ("C. difficile", "C. difficile"),
        ("C：wide", "wide"),
        ("C :x", "x"),
        ("C5: root", "C5: root"),
    ],
)
def test_what_is_no_prefix_stays(option, wanted):
    assert _parse(**{"choice c": option}).features["choice_c"] == wanted


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"question": ' "" '}, "empty question"),
        ({"figure path": " "}, "no image named"),
        ({"choice b": "B: "}, "the answer is an empty option"),
        ({"choice c": ""}, "empty option"),
        ({"choice c": "C: FOCAL uptake"}, "two options are the answer"),
        ({"choice c": "D: none"}, "options under wrong letters"),
    ],
)
def test_rows_that_are_dropped(changes, reason):
    assert _parse(**changes).dropped == reason


def test_missing_values_are_texts():
    q = _parse(**{"choice a": "A:NA", "choice c": "None", "choice d": "nan"})
    assert [q.features[f"choice_{c}"] for c in "acd"] == ["NA", "None", "nan"]


def test_without_options():
    q = _parse(blank=True, question="Which of the following is shown?", **{"choice c": ""})
    assert q.features["answer_type"] == "OPEN" and q.features["choice_c"] == ""
    assert q.flags == ["the question refers to its options"]
    q = _parse(blank=True, **{"choice c": "C: focal uptake"})
    assert q.flags == ["two options alike"]
    assert _parse(**{"choice c": "C:cannot be told"}).flags == ["two options alike"]


def test_image_paths():
    assert _parse(**{"figure path": "sub\\PMC7_F1.jpg"}).image == "sub/PMC7_F1.jpg"
    assert _parse(**{"figure path": "other.jpg"}).paper == "other.jpg"
    for path in ("../PMC1_F1.jpg", "/PMC1_F1.jpg", "C:\\x.jpg"):
        with pytest.raises(DataError, match="t.csv row 0: Figure_path: path .* would leave"):
            _parse(**{"figure path": path})


def _write(path, lines, encoding="utf-8"):
    with open(path, "w", encoding=encoding, newline="") as f:
        csv.writer(f).writerows(lines)
    return path


HEADER = ["Figure_path", "Question", "Answer", *(f"Choice {c}" for c in "ABCD"), "Answer_label"]


def test_tables(tmp_path):
    row = ["x.jpg", 'a, "b"\nc', "NA", "1", "2", "3", "4", "A"]
    short = row[:-1]
    misspelt = [h.replace("Answer", "Anwser") for h in HEADER]
    for header in (HEADER, misspelt, [h.upper().replace(" ", "_") + " " for h in HEADER]):
        path = _write(tmp_path / "t.csv", [header, row, [], short], "utf-8-sig")
        (i, found), (j, other) = read_table(path)
        assert (i, j, other) == (0, 1, None)
        assert found["question"] == 'a, "b"\nc' and found["answer"] == "NA"
        assert found["answer label"] == "A" and found["figure path"] == "x.jpg"
    assert parse(None, "q", "", blank=False).dropped == "another number of columns than the header"


def test_tables_that_are_refused(tmp_path):
    path = tmp_path / "t.csv"
    with pytest.raises(DataError, match="t.csv: can't be read .No such file"):
        list(read_table(path))
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(DataError, match="t.csv: found a git-LFS pointer, expected a CSV table"):
        list(read_table(path))
    _write(path, [HEADER[:-2]])
    with pytest.raises(DataError, match="t.csv: column 'choice d' missing; expected .* found"):
        list(read_table(path))
    path.write_text(",".join(HEADER) + '\n"never closed' + "x,\n" * (1 << 19))
    with pytest.raises(DataError, match="t.csv row 0: not CSV"):
        list(read_table(path))


def test_bytes_that_are_not_utf8(tmp_path):
    path = _write(tmp_path / "t.csv", [HEADER, ["x.jpg", "é?", "1", *"1234", "A"]], "latin-1")
    ((_, row),) = read_table(path)
    assert parse(row, "q", "", blank=False).flags == ["characters that are not UTF-8"]
