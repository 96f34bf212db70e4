"""The books of a build: every row counted once, examples few, leakage found."""

import json

from data_prep.ledger import FIRST, Ledger, describe, shared


def _row(image="a", answer_type="OPEN", **features):
    return {"image_id": image, "answer_type": answer_type, **features}


def test_every_row_is_counted():
    books = Ledger(("train", "test"), ("modality",))
    for i in range(30):
        books.read("train")
        if i % 2:
            books.drop("train", "empty answer", i)
        else:
            books.keep("train", _row(f"im{i % 4}", modality="CT" if i % 3 else ""))
    books.read("test", 2)
    books.flag("test", "odd plane", "x")
    report = books.to_report()
    train = report["splits"]["train"]
    assert (train["rows_read"], train["rows_kept"]) == (30, 15)
    assert train["dropped"] == {"empty answer": {"count": 15, "first": [str(i) for i in range(1, 2 * FIRST, 2)]}}
    assert train["tables"] == {"answer_type": {"OPEN": 15}, "modality": {"CT": 10, "(none)": 5}}
    assert train["images"] == 2
    assert report["splits"]["test"]["flags"] == {"odd plane": {"count": 1, "first": ["x"]}}
    assert json.loads(json.dumps(report)) == report
    lines = "\n".join(describe(report))
    assert "train: 30 rows read, 15 kept (OPEN 15), 2 images" in lines
    assert "dropped, empty answer: 15 (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, ...)" in lines


def test_leakage_is_found_by_key_and_told_by_name():
    books = Ledger(("train", "validate", "test"))
    books.member("train", "image", b"same", "a.jpg")
    books.member("test", "image", b"same", "renamed.jpg")
    books.member("train", "case", "1", "1")
    books.member("test", "case", "2", "2")
    report = books.to_report()
    assert report["shared"]["image"]["train+test"] == {"count": 1, "first": ["renamed.jpg"]}
    assert report["shared"]["image"]["train+validate"]["count"] == 0
    lines = describe(report)
    assert "WARNING: 1 image in both train and test (renamed.jpg)" in lines
    assert "no case is in two splits" in lines


def test_shared_of_nothing():
    assert shared({"a": {1: "x"}, "b": {}}) == {"a+b": {"count": 0, "first": []}}
