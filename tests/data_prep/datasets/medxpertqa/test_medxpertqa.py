"""MedXpertQA in both of its forms; what a row with one image leaves out is counted. All questions made up."""

import json

import pytest

from data_prep.datasets.medxpertqa import layout
from data_prep.files import DataError
from tests.data_prep import made

CHOICES = ("Lung", "Liver", "Heart", "Bone", "Brain")


def question(i, number=1, **kw):
    shown = " ".join(f"({c}) {o}" for c, o in zip("ABCDE", CHOICES))
    found = dict(
        id=f"MM-{i}",
        question=f"What is\nshown in {i}?\nAnswer Choices: {shown}",
        options=dict(zip("ABCDE", CHOICES)),
        label="ABCDE"[i % 5],
        images=[f"MM-{i}-{'abcdef'[k]}.jpeg" for k in range(number)],
        medical_task="Diagnosis",
        body_system="Skeletal",
        question_type="Reasoning",
    )
    return found | kw


def as_evaluated(row):
    """The form of the authors' evaluation."""
    options = [dict(letter=k, content=v) for k, v in row["options"].items()]
    images = [dict(image_path=name) for name in row["images"]]
    return row | dict(options=options, images=images, label=[row["label"]])


@pytest.fixture
def rows():
    return [question(0), question(1, 2), question(2), question(3, 6), question(4)]


def write(root, rows, name="MM/test.jsonl"):
    made.write(root / name, "".join(json.dumps(row) + "\n" for row in rows))
    for i, row in enumerate(rows):
        for k, image in enumerate(row["images"]):
            image = image["image_path"] if isinstance(image, dict) else image
            made.write(root / "images" / image, made.image(10 * i + k))
    return root


@pytest.mark.parametrize("form", ["hub", "evaluation"])
def test_records(rows, tmp_path, form):
    name = "MM/test.jsonl" if form == "hub" else "eval/data/medxpertqa/input/medxpertqa_mm_input.jsonl"
    root = write(tmp_path / "raw", rows if form == "hub" else [*map(as_evaluated, rows)], name)
    report, splits = made.built("medxpertqa", root, tmp_path / "d", "one_image")
    assert list(splits) == ["test"] and sorted(splits["test"]) == ["MM-0", "MM-2", "MM-4"]
    assert splits["test"]["MM-2"] == dict(
        image=made.image(20),
        question_id="MM-2",
        image_id="MM-2-a.jpeg",
        question="What is shown in 2?",
        answer="Heart",
        answer_type="CLOSED",
        content_type="Reasoning",
        body_system="Skeletal",
        medical_task="Diagnosis",
        images="1",
        options_text="A: Lung B: Liver C: Heart D: Bone E: Brain",
        answer_letter="C",
        **{f"choice_{c}": o for c, o in zip("abcde", CHOICES)},
    )
    dropped = {k: v["first"] for k, v in report["splits"]["test"]["dropped"].items()}
    assert dropped == {"about 2 images": ["MM-1"], "about 6 images": ["MM-3"]}
    assert report["notes"] == {"questions about several images, of which a row has one": 2}


def test_first_images_and_dev_questions(rows, tmp_path):
    root = write(tmp_path / "raw", rows)
    made.write(root / "MM" / "dev.jsonl", json.dumps(question(9, images=[rows[0]["images"][0]])) + "\n")
    report, kept = made.checked(layout.read_folder(root, first_image=True), root, tmp_path / "work")
    assert set(kept) == {"MM-0", "MM-1", "MM-2", "MM-3", "MM-4", "MM-9"} and kept["MM-3"]["images"] == "6"
    assert report["splits"]["validate"]["rows_kept"] == 1
    assert {k: v["first"] for k, v in report["splits"]["test"]["flags"].items()} == {
        "about 2 images, only the first is here": ["MM-1"],
        "about 6 images, only the first is here": ["MM-3"],
    }


def test_a_question_without_its_choices_is_told(rows, tmp_path):
    rows[0]["question"] = "What is it?"
    root = write(tmp_path / "raw", rows)
    report, kept = made.checked(layout.read_folder(root, False), root, tmp_path / "work")
    assert report["splits"]["test"]["flags"]["the question doesn't repeat its choices"]["first"] == ["MM-0"]
    assert kept["MM-0"]["question"] == "What is it?"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(label="F"), "test.jsonl line 3: label is 'F'; expected one of A, B, C, D, E"),
        (dict(label=["A", "B"]), "label is .*; expected one of A"),
        (dict(options={"A": "x"}), "options is .*; expected texts of A, B, C, D, E"),
        (dict(images=["../x.png"]), "images: .*expected a relative path inside"),
        (dict(images=None), "images: .*expected a relative path inside"),
        (dict(question=None), "question is None; expected text"),
    ],
)
def test_lines_refused(rows, tmp_path, change, message):
    root = write(tmp_path / "raw", rows)
    rows[2] |= change
    made.write(root / "MM/test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=message):
        layout.read_folder(root, False)


def test_folders_refused(rows, tmp_path):
    with pytest.raises(DataError, match="none of MM/test.jsonl"):
        layout.check_folder(tmp_path)
    made.write(tmp_path / "MM/test.jsonl", "{}\n")
    with pytest.raises(DataError, match="found none of images, MM/images, images.zip"):
        layout.read_folder(tmp_path, False)
