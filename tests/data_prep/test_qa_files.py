"""The authors' question-answer files in all their forms, and what the reader refuses."""

import csv
import json
import re

import pytest

from data_prep import qa_files
from data_prep.files import DataError

RULES = [
    ("Q: What is shown?\nA: A cyst.", "Q:"),
    ("**Q: What is shown?**\nA: A cyst.", "**Q: …**"),
    ("**Q: What is shown?**\n**A: A cyst.**", "**Q: …**"),
    ("**Q:** What is shown?\n**A:** A cyst.", "**Q:**"),
    ("**Q**: What is shown?\n**A**: A cyst.", "**Q:**"),
    ("**Q1:** What is shown?\n**A1:** A cyst.", "Q1:"),
    ("**Q1: What is shown?**\nA1: A cyst.", "Q1:"),
    ("Q1: What is shown?\nA1: A cyst.", "Q1:"),
    ("1. Q: What is shown?\n   A: A cyst.", "Q:"),
    ("- **Question:** What is shown?\n- **Answer:** A cyst.", "**Q:**"),
    ("Q: What is shown? A: A cyst.", "Q:"),
    ("**Q: What is shown?** A: A cyst.", "**Q: …**"),
    ("Q: What is\n shown?\nA: A cyst.", "Q:"),
    ("Q: What is shown?\n\nA:\n\nA cyst.", "Q:"),
    ("question: What is shown?\nanswer: A cyst.", "Q:"),
    ("Q1. What is shown?\nA1. A cyst.", "Q1:"),
    ("### Q1: What is shown?\nA: A cyst.", "Q1:"),
    ("**Question 1:** What is shown? **Answer:** A cyst.", "Q1:"),
    ("**Question 1**\nWhat is shown?\n**Answer**\nA cyst.", "heading"),
    ("1. What is shown?\n   A: A cyst.", "? A:"),
    ("**What is shown?**\n- **Answer:** A cyst.", "? A:"),
    ("1. What is shown?\n   A cyst.", "1."),
    ("1. **What is shown?** A cyst.", "1."),
    ("2) What is shown?\n\n- A cyst.", "1."),
    ("What is shown?\n\nA cyst.", "unmarked"),
    ("Here are the pairs:\n\nWhat is shown?\n A cyst.", "unmarked"),
]


@pytest.mark.parametrize("text, rule", RULES)
def test_each_way_to_mark_a_pair(text, rule):
    assert qa_files.parse_pairs(text) == ([("What is shown?", "A cyst.", rule)], [])


@pytest.mark.parametrize("text, rule", RULES)
def test_several_pairs_with_chatter_around_them(text, rule):
    more = re.sub(r"What is\s+shown", "Why", text).replace("A cyst", "It grew")
    if rule == "unmarked":
        whole = f"{text}\n\n{more.removeprefix('Here are the pairs:')}"
    else:
        whole = f"Here are 2 pairs:\n\n{text}\n\n{more}\n\nLet me know if you want more: ask!"
    pairs, rejected = qa_files.parse_pairs(whole)
    assert pairs == [("What is shown?", "A cyst.", rule), ("Why?", "It grew.", rule)]
    assert not rejected


def test_answers_that_begin_with_the_letter_of_a_mark():
    pairs, _ = qa_files.parse_pairs(
        'Q: A man of 60 has pain. Why?\nA: A "whirlpool" sign.\n\nQ: Question of size?\nA: A/P view'
    )
    assert [p[:2] for p in pairs] == [
        ("A man of 60 has pain. Why?", 'A "whirlpool" sign.'),
        ("Question of size?", "A/P view"),
    ]


def test_an_answer_of_several_lines_keeps_them():
    pairs, _ = qa_files.parse_pairs("Q: Which?\nA: Two:\n* one\n* two\n\nNote: no numbers.")
    assert pairs == [("Which?", "Two:\n* one\n* two", "Q:")]


@pytest.mark.parametrize(
    "text, reason, what",
    [
        ("Q: One?\nQ: Two?\nA: B", "question without an answer", "One?"),
        ("Q: Two?\nA: B\nQ: One?", "question without an answer", "One?"),
        ("A: B\nQ: Two?\nA: B", "answer without a question", "B"),
        ("1. What is it?\n2. Why?", "no pair found", "1. What is it? 2. Why?"),
        ("I can't help with that.", "no pair found", "I can't help with that."),
        ("Is it?\nWhy?", "no pair found", "Is it? Why?"),
        ("Is it?\nYes.\nNo.", "no pair found", "Is it? Yes. No."),
        ("", "no pair found", ""),
    ],
)
def test_what_is_no_pair_is_told(text, reason, what):
    pairs, rejected = qa_files.parse_pairs(text)
    assert rejected[:1] == [(reason, what)]
    assert pairs == ([("Two?", "B", "Q:")] if "Two" in text else [])


@pytest.mark.parametrize(
    "question, word",
    [
        ("What is it?", "What"),
        ("what's that", "What"),
        ("In which plane was it taken?", "Which"),
        ("Based on this, how does it form?", "How"),
        ("How many lesions are there?", "How many"),
        ("Is there a mass? If so, where?", "Yes or no"),
        ("Describe what is shown.", "Describe"),
        ("A patient has pain. Why?", "Why"),
        ("The diagnosis?", "Other"),
        ("", "Other"),
    ],
)
def test_question_words(question, word):
    assert qa_files.question_word(question) == word


def _raw(image, *pairs):
    text = "Here are pairs:\n\n" + "\n\n".join(f"Q: {q}\nA: {a}" for q, a in pairs)
    return {"U_id": "C1", "image_id": image, "qa_pairs_raw": text}


def _read(path):
    ledger = qa_files.qa_ledger()
    return list(qa_files.read_qa(path, ledger)), ledger.to_report()["splits"]


ROWS = [_raw("C1_a", ("What?", "Yes."), ("Why?", "Not known")), _raw("C1_b", ("What?", "no"))]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", ["concatenated", "indented", "list", "jsonl", "bom"])
def test_json_in_each_form_gives_the_same_rows(tmp_path, monkeypatch, form, chunk):
    monkeypatch.setattr(qa_files, "_CHUNK", chunk)
    text = {
        "concatenated": "".join(json.dumps(r) for r in ROWS),
        "indented": "\n".join(json.dumps(r, indent=4) for r in ROWS) + "\n",
        "list": json.dumps(ROWS),
        "jsonl": "\n".join(json.dumps(r) for r in ROWS),
        "bom": "\ufeff" + "\n\n".join(json.dumps(r) for r in ROWS),
    }[form]
    path = tmp_path / "qa.json"
    path.write_text(text, encoding="utf-8")
    pairs, splits = _read(path)
    assert [(p.question_id, p.image_id, p.question, p.answer, p.answer_type) for p in pairs] == [
        ("C1_a_1", "C1_a", "What?", "Yes.", "CLOSED"),
        ("C1_a_2", "C1_a", "Why?", "Not known", "OPEN"),
        ("C1_b_1", "C1_b", "What?", "no", "CLOSED"),
    ]
    assert pairs[0].extra == {"U_id": "C1"}
    assert splits["records"]["rows_read"] == 2 and splits["pairs"]["rows_kept"] == 3


def test_an_image_with_two_records_keeps_both_and_ids_stay_apart(tmp_path):
    path = tmp_path / "qa.json"
    rows = [*ROWS, _raw("C1_a", ("What?", "Yes."), ("What?", "Maybe"), ("Where?", "Left"))]
    path.write_text("".join(json.dumps(r) for r in rows))
    pairs, splits = _read(path)
    ids = [p.question_id for p in pairs]
    assert len(set(ids)) == len(ids) == 5
    assert splits["records"]["flags"]["another record of the same image"]["first"] == ["C1_a"]
    again = splits["pairs"]["dropped"]["the same question and answer again"]
    assert again == {"count": 1, "first": ["C1_a_3"]}
    assert splits["pairs"]["flags"]["asked again about the image, other answer"]["count"] == 1
    assert splits["pairs"]["rows_read"] == 6


def test_the_two_schemas_of_roco(tmp_path):
    test, valid = tmp_path / "test.json", tmp_path / "valid.json"
    test.write_text(json.dumps([{"image_id": "R_1", "answer": "A scan.", "question": "What?"}]))
    valid.write_text(json.dumps([{"image_id": "R_1", "original caption": " A scan.", "qa_pair": "What?"}]))
    (a,), _ = _read(test)
    (b,), _ = _read(valid)
    assert (a.question, a.answer, a.rule) == ("What?", "A scan.", "columns")
    assert (b.question, b.answer, b.rule) == ("What?", "A scan.", "caption")


def test_the_list_with_captions_and_subjects(tmp_path):
    path = tmp_path / "ours_qa_pairs.json"
    text = "Here are the pairs:\n\nQ: Enlarged?\nA: Yes\n\nQ: Where?\n(not asked here)\n\nLet me know!"
    row = {"image_id": "C1_a", "split": "Train", "caption": "c", "subject": "CT \u2022 Axial"}
    path.write_text(json.dumps([row | {"qa_pairs": text}, row | {"qa_pairs": "Sorry."}], indent=4))
    (pair,), splits = _read(path)
    assert (pair.question, pair.answer, pair.answer_type) == ("Enlarged?", "Yes", "CLOSED")
    assert pair.extra == {"split": "Train", "caption": "c", "subject": "CT \u2022 Axial"}
    assert splits["pairs"]["dropped"]["question without an answer"]["count"] == 1
    assert splits["records"]["dropped"]["no pair found"] == {"count": 1, "first": ["C1_a"]}


def test_questions_of_several_lines_are_joined_and_told(tmp_path):
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"image_id": "R_1", "question": "What is it? \nWhere ", "answer": "x"}))
    (pair,), splits = _read(path)
    assert pair.question == "What is it? Where"
    assert splits["pairs"]["flags"]["question on several lines, joined"]["count"] == 1
    assert splits["pairs"]["flags"]["question without a question mark"]["count"] == 1


def test_csv_with_line_breaks_commas_and_leading_spaces(tmp_path):
    path = tmp_path / "dataset_sa.csv"
    header = "image_id case_id question answer ans_len mode split new_lines".split()
    rows = [
        ["sample/C1_a.png", "C1", " What, then?", "One\nTwo, three.", "3", "alignment", "Train", 1],
        ["sample\\C1_b.PNG", "C1", "Why?", '"So" it is', "3", "pre_training", "Test", 0],
        ["sample/C1_b.png", "C1", "Why not?", " ", "0", "pre_training", "Test", 0],
    ]
    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f).writerows([header, *rows])
        f.write("cut,short\n\n")
    pairs, splits = _read(path)
    assert [(p.image_id, p.question, p.answer) for p in pairs] == [
        ("C1_a", "What, then?", "One\nTwo, three."),
        ("C1_b", "Why?", '"So" it is'),
    ]
    assert pairs[1].extra["mode"] == "pre_training" and pairs[1].extra["case_id"] == "C1"
    assert splits["records"]["dropped"] == {
        "another number of cells than the header": {"count": 1, "first": ["dataset_sa.csv line 6"]}
    }
    assert splits["pairs"]["dropped"] == {"empty answer": {"count": 1, "first": ["C1_b_2"]}}


def test_csv_with_the_index_column_of_pandas(tmp_path):
    path = tmp_path / "alignment.csv"
    path.write_text(",image_id,case_id,question,answer\n0,C1_a,C1,What?,That.\n")
    (pair,), _ = _read(path)
    assert pair.extra == {"case_id": "C1"} and pair.image_id == "C1_a"


def test_several_files_are_one(tmp_path):
    row = dict(image_id="i", question="Left?", answer="Left")
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    (tmp_path / "b.json").write_text(json.dumps([row, row | {"question": "Right?"}]))
    pairs, splits = _read([tmp_path / "a.jsonl", str(tmp_path / "b.json")])
    assert [p.question_id for p in pairs] == ["i_1", "i_3"]
    assert splits["pairs"]["dropped"]["the same question and answer again"]["count"] == 1
    (tmp_path / "a.jsonl").write_text(json.dumps(row | {"question_id": "i_2"}))
    with pytest.raises(DataError, match=r"b.json record 0: question_id 'i_2' is used before"):
        _read([tmp_path / "a.jsonl", tmp_path / "b.json"])


def test_our_own_rows_keep_their_ids_and_types(tmp_path):
    path = tmp_path / "qa.jsonl"
    row = dict(image_id="i", question="Left?", answer="Left", question_id="q7", score=0.5)
    path.write_text(json.dumps(row | {"answer_type": "closed "}))
    (pair,), _ = _read(path)
    assert (pair.question_id, pair.answer_type) == ("q7", "CLOSED")
    assert pair.extra["score"] == "0.5"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("a.json", "", ["empty"]),
        (
            "a.json",
            '{"image_id": "a", "question": "Q", "answer": "A"}\n{"image_id": ',
            ["line 2", "not valid JSON"],
        ),
        ("a.json", '{"image_id": "a", "question": "Q", "answer": "A"}\n{"cut', ["line 2"]),
        ("a.json", '{"image_id": "a", "question": "Q", "answer": "A"}\n7', ["line 2", "found 7"]),
        ("a.json", "[1]", ["row 0", "found 1"]),
        ("a.json", '[{"image_id": "a"', ["not valid JSON"]),
        ("a.json", '{"name": "a", "text": "b"}', ["record 0", "name, text", "qa_pairs_raw"]),
        ("a.json", '{"question": "a", "answer": "b"}', ["record 0", "no image_id"]),
        ("a.csv", "\n-----\nsample/a.png,C1,What?,That.\n", ["no column image_id, question"]),
        ("a.csv", "image_id,question\na,b\n", ["no column answer"]),
        (
            "a.jsonl",
            '{"image_id": "a", "question": "Q", "answer": "A", "question_id": "7"}\n'
            '{"image_id": "b", "question": "Q", "answer": "A", "question_id": 7}\n',
            ["question_id '7'", "record 1"],
        ),
        (
            "a.json",
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
            ["git-LFS pointer"],
        ),
        ("a.json", b'{"image_id": "\xff\xfe"}', ["not UTF-8"]),
        ("a.csv", b"image_id,question,answer\n\xff,a,b\n", ["not UTF-8"]),
    ],
)
def test_what_is_refused(tmp_path, name, text, words):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as e:
        list(qa_files.read_qa(path))
    message = str(e.value)
    assert message.startswith(str(path)) and "\n" not in message
    for word in words:
        assert word in message


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="nothing.json"):
        list(qa_files.read_qa(tmp_path / "nothing.json"))


@pytest.mark.real_data
def test_the_released_medpix_pairs(real_data):
    pairs, splits = _read(real_data / "medm" / "qa_pairs_generated_all.json")
    assert splits["records"]["rows_read"] == splits["records"]["rows_kept"] == 2052
    assert splits["records"]["images"] == 2050
    twice = splits["records"]["flags"]["another record of the same image"]
    assert twice == {"count": 2, "first": ["MPX1568_synpic21208", "MPX2425_synpic50900"]}
    assert splits["pairs"]["tables"]["rule"] == {"Q:": 6290, "**Q: …**": 3260, "**Q:**": 430, "Q1:": 275, "unmarked": 5}
    assert not splits["pairs"]["dropped"] and len(pairs) == 10260


@pytest.mark.real_data
@pytest.mark.parametrize("split, rule", [("test", "columns"), ("valid", "caption")])
def test_the_released_roco_pairs(real_data, split, rule):
    pairs, splits = _read(real_data / "medm" / f"roco_{split}_qa.first400.json")
    assert splits["pairs"]["tables"]["rule"] == {rule: 400} and len(pairs) == 400
