"""PathVQA in both of its layouts, its pickles, and its two versions; all rows made up."""

import io
import json
import os
import pathlib
import pickle

import numpy as np
import PIL.Image
import pytest

from data_prep.datasets.pathvqa import layout, pickles
from data_prep.files import DataError
from tests.data_prep import made

IMAGES = {"train": (0, 1, 2), "val": (3, 4), "test": (5, 6)}


@pytest.fixture
def rows():
    """{split: rows of its pickle}; each image has three questions, one of them twice."""
    found = {}
    for split, images in IMAGES.items():
        found[split] = []
        for i in images:
            image = f"{split}_{i:04}"
            asked = [(f"What is  {i}?", "liver"), (f"Is {i} here?", "yes"), (f"What is  {i}?", "liver"), ("why?", "no")]
            found[split] += [dict(image=image, question=q, answer=a) for q, a in asked]
    return found


def write(root, rows, form="pickle"):
    for split, images in IMAGES.items():
        for i in images:
            made.write(root / "split" / "images" / split / f"{split}_{i:04}.jpg", made.image(i))
        if form == "pickle":
            made.write(root / "split" / "qas" / f"{split}_qa.pkl", pickle.dumps(rows[split], protocol=2))
            continue
        by_image = {row["image"]: ([], []) for row in rows[split]} | {f"{split}_9999": ([], [])}
        for row in rows[split]:
            by_image[row["image"]][0].append(row["question"])
            by_image[row["image"]][1].append({row["answer"]: 1})
        content = [dict(img_id=k, labelf={"pvqa": a}, sentf={"pvqa": q}) for k, (q, a) in by_image.items()]
        made.write(root / f"pvqa_{split}.json", json.dumps(content))
    return root


@pytest.mark.parametrize("form", ["pickle", "json"])
def test_records_and_versions(rows, tmp_path, form):
    root = write(tmp_path / "raw", rows, form)
    report, splits = made.built("pathvqa", root, tmp_path / "d", "official")
    assert {s: len(x) for s, x in splits.items()} == {"train": 12, "validate": 8, "test": 8}
    assert splits["validate"]["val_q1"] == dict(
        image=made.image(3),
        question_id="val_q1",
        image_id="val_0003",
        question="Is 3 here?",
        answer="yes",
        answer_type="CLOSED",
        content_type="Yes or no",
    )
    assert splits["test"]["test_q0"]["question"] == "What is 5?"
    again = "the same question and answer again"
    assert report["splits"]["train"]["flags"][again]["first"] == ["train_q2", "train_q6", "train_q10"]
    assert report["notes"]["questions read"].startswith("12 / 8 / 8, neither of the versions in use (19,755 /")
    found = layout.read_folder(root, without_repeats=True)
    report, kept = made.checked(found, root, tmp_path / "work")
    assert report["splits"]["train"]["dropped"] == {again: {"count": 3, "first": ["train_q2", "train_q6", "train_q10"]}}
    assert {k for k in kept if k.startswith("val")} == {"val_q0", "val_q1", "val_q3", "val_q4", "val_q5", "val_q7"}


def test_the_two_versions_are_told_apart():
    assert layout.which_version([19_755, 6_279, 6_761]).endswith("the official release")
    assert "Hub's copy" in layout.which_version([19_654, 6_259, 6_719])
    assert "neither" in layout.which_version([19_654, 6_279, 6_761])


def test_cmyk_images_become_the_colours_that_they_are(rows, tmp_path):
    root = write(tmp_path / "raw", rows)
    out = io.BytesIO()
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(out, "JPEG", quality=100)
    made.write(root / "split" / "images" / "test" / "test_0005.jpg", out.getvalue())
    _, splits = made.built("pathvqa", root, tmp_path / "d", "official")
    found = PIL.Image.open(io.BytesIO(splits["test"]["test_q0"]["image"]))
    assert (found.format, found.mode) == ("PNG", "RGB")
    assert np.abs(np.asarray(found).astype(int) - [255, 0, 0]).max() < 12


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol(rows, protocol):
    content = [rows["train"], {"a": [1, 2.5, None, True, -70_000, 1 << 70]}, "é" * 300, [], {}]
    assert pickles.load(pickle.dumps(content, protocol), "x") == content


class Harmful:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_that_do_something_are_refused_and_not_done(rows, tmp_path, protocol):
    rows["val"][1]["answer"] = Harmful(tmp_path / "done")
    root = write(tmp_path / "raw", rows)
    made.write(root / "split" / "qas" / "val_qa.pkl", pickle.dumps(rows["val"], protocol))
    with pytest.raises(
        DataError, match="val_qa.pkl: the pickle has the step (STACK_)?GLOBAL, which plain data doesn't"
    ):
        layout.read_folder(root, False)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("content", [{1, 2}, pathlib.PurePath("x"), (1, 2), b"bytes"], ids=str)
def test_other_objects_are_refused(content):
    with pytest.raises(DataError, match="^x: the pickle has the step"):
        pickles.load(pickle.dumps([content], 4), "x")


def test_pickles_that_would_grow_without_end_are_refused():
    twice = ["lol"]
    for _ in range(64):
        twice = [twice, twice]
    endless = []
    endless.append(endless)
    for content in (twice, endless, [dict(a=(shared := []), b=shared)]):
        with pytest.raises(DataError, match="^x: the pickle has one list or dict at two places"):
            pickles.load(pickle.dumps(content, 2), "x")


def test_damaged_pickles_are_one_sentence(rows):
    whole = pickle.dumps(rows["train"], 2)
    rng = np.random.default_rng(0)
    for end in range(0, len(whole), 37):
        with pytest.raises(DataError, match="^x: "):
            pickles.load(whole[:end], "x")
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] = rng.integers(256)
        try:
            pickles.load(bytes(damaged), "x")
        except DataError as e:
            assert str(e).startswith("x: ")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image="../../x"), "val_qa.pkl row 1: image: .*expected a relative path inside"),
        (dict(answer=None), "row 1: answer is None; expected text"),
        (dict(question=["x"]), r"row 1: question is \['x'\]; expected text"),
    ],
)
def test_rows_refused(rows, tmp_path, change, message):
    rows["val"][1].update(change)
    with pytest.raises(DataError, match=message):
        layout.read_folder(write(tmp_path / "raw", rows), False)


def test_lists_that_do_not_go_together_and_folders_refused(rows, tmp_path):
    root = write(tmp_path / "raw", rows, "json")
    path = root / "pvqa_val.json"
    content = json.loads(path.read_text())
    content[0]["labelf"]["pvqa"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="row 0: 4 questions and 3 answers; expected as many"):
        layout.read_folder(root, False)
    content[0]["labelf"]["pvqa"].append({"a": 1, "b": 1})
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="expected one answer to each question"):
        layout.read_folder(root, False)
    with pytest.raises(DataError, match=f"did you mean {root}"):
        layout.check_folder(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match="nothing found of split validate"):
        made.built("pathvqa", root, tmp_path / "d", "official")
