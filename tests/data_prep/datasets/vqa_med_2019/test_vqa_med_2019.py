"""VQA-Med 2019 in its released layout, and what its test answers stand for; all rows made up."""

import zipfile

import pytest

from data_prep.datasets.vqa_med_2019 import layout
from data_prep.files import DataError
from paligemma_med.metrics import scoring
from tests.data_prep import made

CATEGORIES = ("Modality", "Plane", "Organ", "Abnormality")
TEST_ANSWERS = ("mri (t2)#flair", "skull and contents#face, sinuses", "yes", "tumör")


@pytest.fixture
def release(tmp_path):
    """Three train images, two of validation, four of test, without a newline at the files' ends."""
    root = tmp_path / "raw"
    for short, long, images in (
        ("train", "Training", (0, 1, 2)),
        ("val", "Validation", (3, 4)),
    ):
        folder = root / f"ImageClef-2019-VQA-Med-{long}"
        lines = [
            [f"synpic{i}|what is {c} of {i}?|{'no' if c == 'Plane' else f'a ({c})'}" for i in images]
            for c in CATEGORIES
        ]
        made.write(folder / f"All_QA_Pairs_{short}.txt", "\n".join(sum(lines, [])))
        for number, (category, some) in enumerate(zip(CATEGORIES, lines), 1):
            made.write(folder / "QAPairsByCategory" / f"C{number}_{category}_{short}.txt", "\n".join(some))
        for i in images:
            made.write(folder / f"{short.capitalize()}_images" / f"synpic{i}.jpg", made.image(i))
    folder = root / "VQAMed2019Test"
    lines = [f"synpic{5 + i}|{c.lower()}|what is it?|{a}" for i, (c, a) in enumerate(zip(CATEGORIES, TEST_ANSWERS))]
    made.write(folder / "VQAMed2019_Test_Questions_w_Ref_Answers.txt", "\n".join(lines))
    for i in range(4):
        made.write(folder / "VQAMed2019_Test_Images" / f"synpic{5 + i}.jpg", made.image(5 + i))
    return root


def checked(release, tmp_path, **kw):
    return made.checked(layout.read_folder(release), release, tmp_path / "work", **kw)


def edit(path, *changes):
    text = path.read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)


def test_records(release, tmp_path):
    report, splits = made.built("vqa_med_2019", release, tmp_path / "d")
    assert {s: len(rows) for s, rows in splits.items()} == {"train": 12, "validate": 8, "test": 4}
    first, plane = splits["train"]["train_1"], splits["train"]["train_4"]
    assert first == dict(
        image=made.image(0),
        question_id="train_1",
        image_id="synpic0",
        question="what is Modality of 0?",
        answer="a (Modality)",
        answer_type="OPEN",
        content_type="Modality",
        accepted_answers="",
    )
    assert (plane["answer_type"], plane["content_type"]) == ("CLOSED", "Plane")
    tested = splits["test"]
    assert tested["test_1"]["answer"] == "mri (t2)" and tested["test_4"]["answer"] == "tumör"
    assert tested["test_1"]["accepted_answers"].split("\n") == ["mri (t2)", "mri t2", "mri", "flair"]
    assert tested["test_3"] | {"accepted_answers": "", "answer_type": "CLOSED"} == tested["test_3"]
    assert [x["content_type"] for x in tested.values()] and {x["content_type"] for x in tested.values()} == {
        *CATEGORIES
    }
    flags = report["splits"]["test"]["flags"]
    assert flags["several right answers"]["first"] == ["test_1", "test_2"]
    assert flags["parts of the answer may be left out"]["first"] == ["test_1"]
    assert report["shared"]["image"]["train+test"]["count"] == 0


@pytest.mark.parametrize(
    "written, wanted",
    [
        ("axial", ["axial"]),
        ("a#b # c", ["a", "b", "c"]),
        ("noncontrast (mri)", ["noncontrast (mri)", "noncontrast mri", "noncontrast"]),
        ("(iatrogenic) air", ["(iatrogenic) air", "iatrogenic air", "air"]),
        ("(a) b (c)", ["(a) b (c)", "a b c", "a b", "b c", "b"]),
        ("(a)(b)(c)(d)(e) f", ["(a)(b)(c)(d)(e) f", "f"]),
        ("half (open", ["half (open"]),
        ("#", []),
    ],
)
def test_what_a_test_answer_stands_for(written, wanted):
    assert layout.accepted_answers(written) == wanted


def test_the_metric_takes_each_accepted_answer():
    rows = [
        dict(
            question_id=str(i),
            question="q",
            answer="a (b)",
            answer_type="OPEN",
            accepted_answers="a (b)\na b\na\nc d",
            predictions=[said],
        )
        for i, said in enumerate(["A.", "a b", "C d", "a c", "a (b)"])
    ]
    figures = scoring.summarise(rows, "open")
    assert figures["model/overall/acc"] == 4 / 5
    assert figures["model/overall/f1"] > 0.9  # "a c" shares one of its two words with "a"
    for row in rows:
        del row["accepted_answers"]
    assert scoring.summarise(rows)["model/overall/acc"] == 1 / 5
    assert scoring.correct("c  D", ("x", "C d"), "p_") == dict(
        p_correct=True, p_correct_strict=False, p_correct_set=True
    )


def test_odd_lines_are_dropped_or_told(release, tmp_path):
    train = release / "ImageClef-2019-VQA-Med-Training" / "All_QA_Pairs_train.txt"
    edit(
        train,
        ("synpic0|what is Modality of 0?|a (Modality)", "synpic0 what is it"),
        ("synpic1|what is Modality of 1?|a (Modality)", "synpic1|another question?|x|y"),
        ("of 2?|a (Modality)", "of 2?| "),
    )
    report, rows = checked(release, tmp_path)
    book = report["splits"]["train"]
    assert (book["rows_read"], book["rows_kept"]) == (12, 10)
    assert book["dropped"]["another number of parts between | than expected"]["first"] == ["train_1"]
    assert book["dropped"]["no answer"]["first"] == ["train_3"]
    assert book["flags"]["category unknown: not in QAPairsByCategory"]["first"] == ["train_2"]
    assert rows["train_2"]["answer"] == "x|y"


def test_leakage_is_told_by_content_and_answer(release, tmp_path):
    test = release / "VQAMed2019Test"
    (test / "VQAMed2019_Test_Images" / "synpic5.jpg").write_bytes(made.image(0))
    edit(test / "VQAMed2019_Test_Questions_w_Ref_Answers.txt", ("mri (t2)#flair", "a (organ)"))
    report, _ = checked(release, tmp_path)
    shared = {kind: pairs["train+test"] for kind, pairs in report["shared"].items()}
    assert shared["image"] == {"count": 1, "first": ["synpic5"]}
    assert shared["answer about the same image"] == {"count": 1, "first": ["test_1"]}
    assert shared["question about the same image"]["count"] == shared["MedPix image"]["count"] == 0


def test_images_in_zip_files_and_missing_ones(release, tmp_path):
    folder = release / "VQAMed2019Test"
    with zipfile.ZipFile(folder / "VQAMed2019_Test_Images.zip", "w") as z:
        for path in sorted((folder / "VQAMed2019_Test_Images").iterdir()):
            z.write(path, path.name)
            path.unlink()
    (folder / "VQAMed2019_Test_Images").rmdir()
    _, rows = checked(release, tmp_path)
    assert len(rows) == 24
    (release / "ImageClef-2019-VQA-Med-Training" / "Train_images" / "synpic1.jpg").unlink()
    (release / "ImageClef-2019-VQA-Med-Training" / "Train_images" / "synpic2.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1 of 9 images are missing, e.g. synpic1.jpg; .*--allow_missing"):
        checked(release, tmp_path)
    report, _ = checked(release, tmp_path, allow_missing=True)
    assert {k: v["count"] for k, v in report["splits"]["train"]["dropped"].items()} == {
        "image missing": 4,
        "image broken": 4,
    }


def test_folders_refused(release, tmp_path):
    with pytest.raises(DataError, match=f"did you mean {release}"):
        layout.check_folder(tmp_path)
    test = release / "VQAMed2019Test" / "VQAMed2019_Test_Questions_w_Ref_Answers.txt"
    test.write_bytes(b"synpic5|organ|what?|\xff")
    with pytest.raises(DataError, match="not UTF-8 text at byte 20"):
        layout.read_folder(release)
    test.write_text("../../etc/passwd|organ|what?|x")
    with pytest.raises(DataError, match="would leave|expected a relative path inside"):
        layout.read_folder(release)
    test.unlink()
    with pytest.raises(DataError, match="nothing found of split test"):
        checked(release, tmp_path)
    report, _ = checked(release, tmp_path, allow_missing=True)
    assert report["splits_left_out"] == ["test"]
