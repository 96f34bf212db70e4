"""tools.report: others' predictions, of lmms-eval, VLMEvalKit and tables, and ours in their formats."""

import json

import openpyxl
import pytest

from paligemma_med.evaluation import results
from tests.tools.report.reports import HOSTILE, report, row, rows, save, table, warnings
from tools import export_predictions
from tools.report import evaluations, foreign, foreign_files


def write_sheet(path, lines):
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append(list(line))
    book.save(path)


def texts(path):
    """What a file says, without what is made of it."""
    keys = ("question", "predictions", "answer", "image_id")
    return [{k: r[k] for k in keys} for r in foreign_files.read(path).rows]


def text_of(made):
    return " ".join(b.text for s in made for b in s.blocks if b.kind in ("text", "warning"))


# --- Tables ---


@pytest.mark.parametrize("kind", ["json", "pandas.json", "jsonl", "csv", "xlsx"])
def test_files_of_every_kind_read_alike(tmp_path, kind):
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
        write_sheet(path, [lines[0], *(line.values() for line in lines)])
    assert texts(path) == [
        dict(image_id="1", question="q, 1", predictions=["a\n1"], answer="b"),
        dict(image_id="2", question="q 2", predictions=[""], answer="d"),
    ]


@pytest.mark.parametrize("name", ["f.csv", "f.jsonl"])
def test_files_of_spreadsheets_and_with_separators_in_their_texts(tmp_path, name):
    said = "A lesion.\u2028No\x85effusion."
    if name == "f.csv":
        text = f"\ufeffquestion;predicted_answer;answer\r\nq, 1;{said};b\r\n"
    else:
        text = json.dumps(dict(question="q, 1", predicted_answer=said, answer="b"), ensure_ascii=False) + "\r\n"
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert texts(tmp_path / name) == [dict(image_id=None, question="q, 1", predictions=[said], answer="b")]


SAMPLE = dict(doc_id=0, input="Is it?", target="yes", filtered_resps="no")


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("a.csv", "question,prediction,answer\na,b\n", "a.csv line 2: another number of cells"),
        ("a.txt", "x", "expected a .xlsx, .csv, .tsv, .json or .jsonl"),
        ("a.json", "{", "not valid JSON"),
        ("a.json", "[1]", "expected a list of objects"),
        ("a.json", "[]", "has no rows"),
        ("a.json", '[{"question": 1, "answer": 2}]', "no column for the prediction"),
        ("a.json", '[{"question": "q", "answer": "", "prediction": "a"}]', "no row has a true answer"),
        ("a.xlsx", "no zip", "no .xlsx workbook"),
        (
            "a.tsv",
            "index\tquestion\tanswer\tprediction\n7\ta\tb\tc\n7\td\te\tf\n",
            "line 3: question '7' stands at .* 2",
        ),
        ("a.jsonl", [SAMPLE, SAMPLE], "line 2: question 0 stands at .*line 1, too"),
        ("a.jsonl", [SAMPLE | dict(filtered_resps=[["-1.5", "False"], ["-2.5", "True"]])], "line 1: the answer is "),
        ("a.jsonl", [SAMPLE, SAMPLE | dict(doc_id=1, filtered_resps=["a", "b"])], "'1' has 2 answers; expected 1"),
        ("a.jsonl", [SAMPLE | dict(doc_id="x")], 'doc_id is "x"; expected a whole number'),
        ("a.jsonl", [SAMPLE | dict(input=None)], "input is null; expected a text"),
        ("a.jsonl", [{k: x for k, x in SAMPLE.items() if k != "target"}], "has no 'target'"),
    ],
)
def test_files_that_cannot_be_read_say_why(tmp_path, name, content, said):
    if isinstance(content, list):
        content = "".join(json.dumps(line) + "\n" for line in content)
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=said):
        foreign_files.read(tmp_path / name)


def test_what_is_doubtful_in_a_file_is_counted_with_its_questions(tmp_path):
    head = ["index", "question", "answer", "prediction"]
    lines = [
        [1, "Which?", "", "a"],
        [2, "Which?", "['a', 'b']", "a"],
        [3, "How large?", "5 cm", "=5 cm"],  # openpyxl writes it as a formula, and so would others
        [4, "Which?", "a", "Failed to obtain answer via API."],
        [5, "How many?", 2.0, 2],
    ]
    write_sheet(tmp_path / "m_d.xlsx", [head, *lines])
    e = foreign.load(tmp_path / "m_d.xlsx", []).evaluation
    assert e.problems == [
        "1 of 5 rows have no true answer and are left out (1)",
        "1 of 4 answers are the message of a failed request, and count as wrong (4)",
        "1 of 4 true answers are lists written as a text, and are compared as they stand (2)",
        "1 of 4 answers begin with = as formulas do; results of formulas aren't read (3)",
    ]
    assert e.metrics["model/overall/acc"] == 1 / 4
    assert [r["predictions"] for r in e.rows] == [["a"], ["=5 cm"], ["Failed to obtain answer via API."], ["2"]]


def test_a_table_of_choices_is_scored_by_letter(tmp_path):
    lines = [("index", "question", "A", "B", "C", "answer", "category", "prediction")]
    lines += [
        (i, f"Which {i}?", "CT", "MRI", "X-ray", "B", "x" if i % 2 else "y", said) for i, said in enumerate("BACB")
    ]
    (tmp_path / "MyModel").mkdir()
    write_sheet(tmp_path / "MyModel" / "MyModel_Some_Set.xlsx", lines)
    e = foreign.load(tmp_path / "MyModel" / "MyModel_Some_Set.xlsx", []).evaluation
    assert (e.run, e.name, e.rule, e.about["protocol"]) == ("MyModel", "Some_Set", "acc_letter", "multiple_choice")
    assert e.metrics["model/overall/acc_letter"] == 0.5 and e.metrics["model/category/y/acc_letter"] == 0.5


# --- lmms-eval ---


@pytest.mark.parametrize("nested", ["no", ["no"], [["no"]]])
def test_samples_of_every_version_are_read(tmp_path, nested):
    record = dict(id="q7", prediction="no", answer_type="closed", modality="ct")  # as its SLAKE task writes it
    line = SAMPLE | dict(filtered_resps=nested, slake_accuracy=record)
    (tmp_path / "org__model").mkdir()
    path = tmp_path / "org__model" / "20260806_102223_samples_slake_en.jsonl"
    path.write_text(json.dumps(line) + "\n")
    file = foreign_files.read(path)
    (found,) = file.rows
    assert (file.kind, file.run, file.name) == ("lmms-eval", "org__model", "slake_en")
    assert found["predictions"] == ["no"] and found["question_id"] == "q7" and found["modality"] == "ct"
    assert found["answer_type"] == "CLOSED" and found["image_id"] is None


def test_an_instruction_behind_all_questions_is_no_part_of_them(tmp_path):
    asked = ["Is it?\nSay yes\nor no.", "Is there\nany?\nSay yes\nor no."]
    lines = [SAMPLE | dict(doc_id=i, input=text) for i, text in enumerate(asked)]
    found = foreign_files.read(write_samples(tmp_path / "a.jsonl", lines)).rows
    assert [r["question"] for r in found] == ["Is it?", "Is there\nany?"] and [r["prompt"] for r in found] == asked
    found = foreign_files.read(write_samples(tmp_path / "a.jsonl", lines[:1])).rows
    assert found[0]["question"] == asked[0]
    same = [SAMPLE | dict(doc_id=i, input="Is it?\nSay.") for i in range(2)]
    assert foreign_files.read(write_samples(tmp_path / "a.jsonl", same)).rows[0]["question"] == "Is it?"


def test_ids_of_metrics_that_repeat_give_way_to_places(tmp_path):
    lines = [SAMPLE | dict(doc_id=i, m=dict(id="same")) for i in range(2)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert [r["question_id"] for r in foreign_files.read(tmp_path / "a.jsonl").rows] == ["0", "1"]


# --- Beside ours ---


def theirs(made, said, prompt="{}\nAnswer with one word."):
    """Our questions as lmms-eval would write them, without ids of ours."""
    asked = [prompt.format(r["question"]) for r in made]
    return [
        dict(doc_id=i, input=q, target=r["answer"], filtered_resps=said[i]) for i, (q, r) in enumerate(zip(asked, made))
    ]


def write_samples(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_they_stand_beside_ours_with_our_images_and_groups(tmp_path):
    made = rows(samples=1)
    save(tmp_path / "a", made)
    path = write_samples(tmp_path / "x_samples_slake.jsonl", theirs(made, ["yes"] * 6 + ["no"] * 6))
    found, markdown, page, _ = report(tmp_path / "a", foreign=[path])
    run = tmp_path.name
    cells = table(found, "1 answer a question, decoded")
    # Six of twelve, on four images of three questions.
    assert cells["overall"]["model"].startswith("50.0 (") and cells["Lung"]["n"] == "3"
    assert cells["overall"]["majority answer"].startswith("0.0 (")
    assert "images shuffled" not in cells["overall"]  # of our model, not theirs
    cells = table(found, "Paired on the same questions")["overall"]
    assert (cells["a"], cells[run]) == ("66.7", "50.0")
    assert "whether this model looks at the image isn't known from it" in text_of(found)
    assert "majority answer" in markdown and "whether this model looks" in page


def test_other_questions_at_the_same_places_are_not_taken_for_ours(tmp_path):
    made = rows(samples=1)
    save(tmp_path / "a", made)
    path = write_samples(tmp_path / "s.jsonl", theirs(made[::-1], ["yes"] * 12))
    found = foreign.load(path, evaluations.load_all([tmp_path / "a"]))
    assert found.partner is None and found.shared is None
    assert "Images aren't told apart" in text_of(foreign.sections_of(found, None, 0))


def test_questions_that_ours_lack_are_said(tmp_path):
    made = rows(samples=1)
    save(tmp_path / "a", made[:8])
    path = write_samples(tmp_path / "s.jsonl", theirs(made, ["yes"] * 12))
    found = foreign.sections_of(foreign.load(path, evaluations.load_all([tmp_path / "a"])), None, 0)
    assert "4 of 12 questions aren't those of a, slake_test (8, 9, 10, …)." in warnings(found)
    assert table(found, "Paired on the same questions")["overall"]["n"] == "8"
    # The majority answers of eight are no column of twelve.
    assert "majority answer" not in table(found, "1 answer a question, decoded")["overall"]


def test_a_question_with_another_truth_is_another_question(tmp_path):
    made = rows(samples=1)
    save(tmp_path / "a", made)
    lines = theirs(made, ["yes"] * 12)
    lines[2]["target"] = "maybe"
    found = foreign.load(write_samples(tmp_path / "s.jsonl", lines), evaluations.load_all([tmp_path / "a"]))
    assert found.evaluation.problems == ["1 of 12 questions aren't those of a, slake_test (2)"]
    assert len(found.shared.rows) == 11 and found.evaluation.metrics["model/overall/acc"] == 11 / 12


# --- Ours in their formats, and back ---


@pytest.fixture
def exported(tmp_path):
    made = rows(samples=1)
    made[3] = row(
        3,
        [HOSTILE],
        "5 cm",
        kind="OPEN",
        location="Lung",
        majority_prediction="no",
        shuffled_images_predictions=["=1+1"],
    )
    made[4] = row(
        4,
        ["=5 cm"],
        "=5 cm",
        kind="OPEN",
        location="Neck",
        majority_prediction="no",
        shuffled_images_predictions=["#N/A"],
    )
    return made, save(tmp_path / "a", made)


@pytest.mark.parametrize("to", export_predictions.FORMATS)
def test_ours_to_theirs_and_back_has_the_same_figures(tmp_path, exported, to):
    made, folder = exported
    path = export_predictions.export(folder, to, tmp_path / "out")
    e = foreign.load(path, []).evaluation
    assert [r["question_id"] for r in e.rows] == [r["question_id"] for r in made]
    for key in ("question", "answer", "answer_type", "image_id", "predictions", "correct"):
        assert [r[key] for r in e.rows] == [r[key] for r in made], key
    ours = results.read_metrics(folder / results.METRICS)[0]
    for name in ("overall", "answer_type/OPEN", "location/Neck"):
        for end in ("", "_cluster_low", "_cluster_high"):
            assert e.metrics[f"model/{name}/acc{end}"] == ours[f"model/{name}/acc{end}"]
    assert (e.run, e.name) == ("a", "slake_test")
    beside = foreign.load(path, evaluations.load_all([tmp_path / "a"]))
    assert beside.partner.label == "a, slake_test" and len(beside.shared.rows) == len(made)
    assert beside.evaluation.controls == ("majority",)


def test_choices_and_samples_survive(tmp_path):
    choices = dict(choices=["CT", "MRI", "X-ray", "PET"], answer_letter="B")
    made = [row(i, said, "B", **choices) for i, said in enumerate((["B", "A"], ["A", "A"], ["(b)", "B"]))]
    folder = save(tmp_path / "a", made, protocol="multiple_choice")
    ours = results.read_metrics(folder / results.METRICS)[0]
    for to in export_predictions.FORMATS:
        e = foreign.load(export_predictions.export(folder, to, tmp_path / to), []).evaluation
        assert e.metrics["model/overall/acc_letter"] == ours["model/overall/acc_letter"] == 2 / 3
        assert e.samples == (2 if to == "lmms-eval" else 1)


def test_the_truth_of_choices_is_their_letter():
    line = export_predictions.line(row(0, ["MRI"], "MRI", choices=["CT", "MRI"], answer_letter="B"))
    assert {k: line[k] for k in ("A", "B", "answer", "prediction")} == dict(
        A="CT", B="MRI", answer="B", prediction="MRI"
    )


def test_lines_have_the_keys_that_their_programs_look_for(tmp_path, exported):
    path = export_predictions.export(exported[1], "lmms-eval", tmp_path / "out", model="org/My model", task="slake")
    assert path.parent.name == "org_My_model" and path.name.endswith("_samples_slake.jsonl")
    line = json.loads(path.read_text().splitlines()[1])
    assert {"doc_id", "doc", "target", "filtered_resps", "doc_hash", "input", "score"} == line.keys()
    assert (line["doc_id"], line["target"], line["filtered_resps"], line["score"]) == (1, "yes", "yes", 1.0)
    path = export_predictions.export(exported[1], "vlmevalkit", tmp_path / "out", task="SLAKE")
    assert path.name == "a_SLAKE.xlsx"
    lines = list(openpyxl.load_workbook(path, data_only=True).active.iter_rows(values_only=True))
    assert lines[0][:3] == ("index", "question", "answer") and lines[0][-1] == "prediction"
    assert lines[1][0] == "q0" and lines[5][-1] == "=5 cm"


@pytest.mark.parametrize("said, why", [("a" * 40_000, "a text of 40,000 characters"), ("a\x01", "that no sheet holds")])
def test_what_no_sheet_holds_is_refused_before_anything_is_written(tmp_path, said, why):
    folder = save(tmp_path / "a", [row(0, ["yes"]), row(1, [said])])
    with pytest.raises(ValueError, match=f"question 'q1': prediction has .*{why}.*--to=vlmevalkit-json writes it"):
        export_predictions.export(folder, "vlmevalkit", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    path = export_predictions.export(folder, "vlmevalkit-json", tmp_path / "out")
    assert foreign_files.read(path).rows[1]["predictions"] == [said]


@pytest.mark.parametrize("name", ["..", "/", ""])
def test_names_become_no_paths(tmp_path, exported, name):
    if name:
        with pytest.raises(ValueError, match="--task=NAME gives it a name"):
            export_predictions.export(exported[1], "lmms-eval", tmp_path / "out", task=name)
    assert export_predictions.export(exported[1], "lmms-eval", tmp_path / "out", model="../x").parent.name == "x"
