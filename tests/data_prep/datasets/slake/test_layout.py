"""The reader of SLAKE's layout: what it keeps, what it reports, and each input that it refuses."""

import io
import json
import shutil

import numpy as np
import PIL.Image
import pytest

from data_prep.datasets.slake import layout as slake_layout
from data_prep.files import DataError
from paligemma_med.pp import images


def _message(slake, language="en") -> str:
    with pytest.raises(DataError) as e:
        slake_layout.read_folder(slake.root, language)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("validate_name", ["validate.json", "validation.json"])
def test_reads_each_language(slake, validate_name):
    slake.write(validate_name=validate_name)
    en = slake_layout.read_folder(slake.root, "en")
    zh = slake_layout.read_folder(slake.root, "zh")
    assert {s: len(r) for s, r in en.rows.items()} == {"train": 4, "validate": 2, "test": 4}
    assert {r.features["q_lang"] for r in zh.rows["train"]} == {"zh"}
    assert en.report["splits"]["validate"]["file"] == validate_name
    assert en.report["splits"]["train"]["rows_other_language"] == 4
    assert not any(en.report["images_shared"].values())
    first = en.rows["train"][0]
    assert first.image == slake.image(0)
    assert first.features == {
        "question": "What modality is used?",
        "answer": "CT",
        "q_lang": "en",
        "location": "Lung",
        "modality": "CT",
        "answer_type": "OPEN",
        "base_type": "vqa",
        "content_type": "Modality",
        "question_id": "0",
        "image_id": "xmlab0",
    }


def test_key_order_does_not_matter(slake):
    slake.write()
    before = slake_layout.read_folder(slake.root, "en").rows
    for rows in slake.rows.values():
        rows[:] = [dict(sorted(r.items())) for r in rows]
    slake.write_rows()
    assert slake_layout.read_folder(slake.root, "en").rows == before


def test_all_reports_the_leak_that_each_language_does_not_have(slake):
    slake.write()
    report = slake_layout.read_folder(slake.root, "all").report
    # test: en 3, 4 and zh 0, 1; train: en 0, 1 and zh 3, 4
    assert report["images_shared"]["train+test"] == 4
    assert report["splits"]["test"]["images"] == 4
    assert any("4 of 4 test images" in line for line in slake_layout.describe(report))


def test_splits_sharing_an_image_are_refused(slake):
    slake.write()
    slake.rows["test"].append(slake.row(900, 1))
    slake.write_rows()
    message = _message(slake)
    assert "train and test" in message and "xmlab1" in message


def test_a_renamed_copy_is_a_shared_image(slake):
    slake.write()
    shutil.copy(slake.image(0), slake.image(3))
    message = _message(slake)
    assert "1 image(s) in both train and test" in message and "xmlab3" in message


def test_empty_answers_are_dropped_and_reported_and_duplicates_kept(slake):
    slake.rows["train"] += [
        dict(slake.row(901, 0), answer=""),
        dict(slake.row(902, 0), answer=" \n"),
        slake.row(903, 0),
    ]
    slake.write()
    folder = slake_layout.read_folder(slake.root, "en")
    report = folder.report["splits"]["train"]
    assert report["dropped"] == {"empty answer": ["901", "902"]}
    assert report["rows_read"] == 7 and report["rows_kept"] == len(folder.rows["train"]) == 5
    assert report["duplicate_questions_kept"] == 1
    text = "\n".join(slake_layout.describe(folder.report))
    assert "901, 902" in text and "asked twice" in text
    json.dumps(folder.report)


def test_boxes(slake):
    slake.write()
    boxes = slake_layout.read_folder(slake.root, "en").boxes
    assert boxes[slake.image(0)] == [
        {"label": "Liver", "bbox": [1.0, 2.0, 3.5, 4.0]},
        {"label": "Lung", "bbox": [5.0, 6.0, 7.0, 8.0]},
    ]
    assert boxes[slake.image(2)] == []


def test_missing_boxes_file_is_reported(slake):
    slake.write()
    (slake.image(0).parent / "detection.json").unlink()
    folder = slake_layout.read_folder(slake.root, "en")
    assert folder.boxes[slake.image(0)] == []
    assert folder.report["images_without_boxes_file"] == ["xmlab0"]


@pytest.mark.parametrize(
    "content",
    [
        '{"Liver": [1, 2, 3, 4]}',
        '[{"Liver": [1, 2, 3]}]',
        '[{"Liver": [1, 2, 3, "4"]}]',
        '[{"Liver": [1, 2, 3, NaN]}]',
        '[["Liver", 1, 2, 3, 4]]',
        '[{"Liver": [1, 2, 3, true]}]',
    ],
)
def test_malformed_boxes(slake, content):
    slake.write()
    path = slake.image(1).parent / "detection.json"
    path.write_text(content)
    message = _message(slake)
    assert str(path) in message and "[x, y, width, height]" in message


def test_unused_images_are_counted_without_the_mac_files(slake):
    slake.write()
    (slake.root / "imgs" / "xmlab77").mkdir()
    assert slake_layout.read_folder(slake.root, "en").report["images_on_disk_not_used"] == 1


# -- the wrong folder


@pytest.mark.parametrize("where", ["above", "imgs"])
def test_wrong_folder_near_the_right_one(slake, where):
    slake.write()
    folder = {"above": slake.root.parent, "imgs": slake.root / "imgs"}[where]
    with pytest.raises(DataError) as e:
        slake_layout.check_folder(folder)
    message = str(e.value)
    assert message.startswith(f"{folder}:")
    assert f"did you mean {slake.root}?" in message
    assert "expected train.json, validate.json (or validation.json), test.json" in message


def test_folder_without_one_split(slake):
    slake.write()
    (slake.root / "validate.json").unlink()
    with pytest.raises(DataError, match="validate.json or validation.json not found"):
        slake_layout.check_folder(slake.root)


def test_folder_with_images_still_packed(slake):
    slake.write()
    shutil.rmtree(slake.root / "imgs")
    (slake.root / "imgs.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="imgs/ not found in it.*unpack imgs.zip"):
        slake_layout.check_folder(slake.root)


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        slake_layout.check_folder(tmp_path / "no")


# -- bad rows: the error names the file, the row and its qid


@pytest.mark.parametrize("key", ["answer", "img_name", "qid", "triple", "content_type"])
def test_row_with_a_missing_key(slake, key):
    qid = slake.rows["validate"][1]["qid"]
    del slake.rows["validate"][1][key]
    slake.write()
    message = _message(slake)
    assert "validate.json row 1" in message and f"key '{key}' missing" in message
    assert key == "qid" or f"qid {qid}" in message


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"answer": None}, "answer is None; expected text"),
        ({"answer": 3}, "answer is 3; expected text"),
        ({"question": " "}, "question is empty"),
        ({"q_lang": "fr"}, "expected 'en' or 'zh'"),
        ({"answer_type": "HALF"}, "expected 'OPEN' or 'CLOSED'"),
        ({"qid": 1.5}, "expected a whole number"),
        ({"img_name": "../../etc/passwd"}, "would leave"),
        ({"img_name": "..\\..\\secret.jpg"}, "would leave"),
        ({"img_name": "/etc/passwd"}, "would leave"),
        ({"img_name": "C:\\secret.jpg"}, "would leave"),
        ({"img_name": ""}, "expected a relative path"),
    ],
)
def test_row_with_a_bad_value(slake, change, expected):
    slake.rows["test"][2].update(change)
    slake.write()
    message = _message(slake)
    assert "test.json row 2 (qid " in message and expected in message


@pytest.mark.parametrize("rows", [{"data": []}, [], "text", 3])
def test_json_that_is_not_a_list_of_rows(slake, rows):
    slake.write()
    (slake.root / "train.json").write_text(json.dumps(rows))
    assert "train.json: found" in _message(slake)


def test_row_that_is_not_an_object(slake):
    slake.rows["train"][1] = ["What?"]
    slake.write()
    assert "train.json row 1: expected an object" in _message(slake)


def test_unparsable_json(slake):
    slake.write()
    text = (slake.root / "train.json").read_text()
    (slake.root / "train.json").write_text(text[:-40])
    assert "train.json: not valid JSON at line 1" in _message(slake)


def test_a_question_id_used_twice(slake):
    slake.rows["test"][0]["qid"] = slake.rows["train"][0]["qid"]
    slake.write()
    assert "qid 0 used by more than one row" in _message(slake)


def test_language_without_rows(slake):
    for split, rows in slake.rows.items():
        slake.rows[split] = [r for r in rows if r["q_lang"] == "en"]
    slake.write()
    assert "no row in language 'zh'" in _message(slake, "zh")


# -- bad images: the error names the file and the first row that uses it


@pytest.mark.parametrize("fault", ["missing", "truncated", "text", "lfs"])
def test_bad_image(slake, fault):
    slake.write()
    path = slake.image(3)
    content = path.read_bytes()
    path.unlink()
    if fault == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif fault == "text":
        path.write_bytes(b"404 not found")
    elif fault == "lfs":
        path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    message = _message(slake)
    expected = {"missing": "is missing", "lfs": "git-LFS pointer"}.get(fault, "not a readable")
    qid = next(r["qid"] for r in slake.rows["test"] if r["img_id"] == 3 and r["q_lang"] == "en")
    assert str(path) in message and expected in message
    assert f"first used by test qid {qid}" in message


# -- the real release


@pytest.mark.real_data
@pytest.mark.parametrize(
    "language, read, dropped, duplicates, images",
    [
        ("en", (4919, 1053, 1061), 1, None, (450, 96, 96)),
        ("zh", (4916, 1046, 1033), 0, None, (450, 96, 96)),
        ("all", (9835, 2099, 2094), 1, 14, None),
    ],
)
def test_real_counts(real_data, language, read, dropped, duplicates, images):
    folder = slake_layout.read_folder(real_data / "slake", language)
    splits = folder.report["splits"]
    assert tuple(s["rows_read"] for s in splits.values()) == read
    kept = (read[0] - dropped, *read[1:])
    assert tuple(len(rows) for rows in folder.rows.values()) == kept
    assert splits["train"]["dropped"] == ({"empty answer": ["1622"]} if dropped else {})
    if duplicates is not None:
        assert splits["train"]["duplicate_questions_kept"] == duplicates
    if images:
        assert tuple(s["images"] for s in splits.values()) == images
        assert not any(folder.report["images_shared"].values())
    else:
        assert folder.report["images_shared"]["train+test"] == 142
        assert splits["test"]["images"] == 180
    if language == "en":
        types = [s["answer_types"] for s in splits.values()]
        assert [t["CLOSED"] for t in types] == [1943, 422, 416]
        assert [t["OPEN"] for t in types] == [2975, 631, 645]


def test_missing_and_broken_images_are_left_out_and_counted(slake):
    slake.write()
    slake.image(0).unlink()
    slake.image(4).write_bytes(b"no image")
    message = _message(slake)
    assert "first used by train qid 0" in message and "--allow_missing_images" in message
    found = slake_layout.read_folder(slake.root, "en", allow_missing_images=True)
    splits = found.report["splits"]
    assert splits["train"]["dropped"] == {"image missing": ["0", "1"]} and splits["train"]["rows_kept"] == 2
    assert splits["test"]["dropped"] == {"image broken": ["14", "15"]} and splits["test"]["images"] == 1
    assert {s: len(r) for s, r in found.rows.items()} == {"train": 2, "validate": 2, "test": 2}
    assert [len(list(slake_layout.examples(found, s))) for s in found.rows] == [2, 2, 2]
    assert any("dropped, image broken: 2" in line for line in slake_layout.describe(found.report))
    slake.image(1).unlink()
    with pytest.raises(DataError, match="train: no row is left"):
        slake_layout.read_folder(slake.root, "en", allow_missing_images=True)


def test_odd_images_are_told_and_stored_as_every_reader_shows_them(slake):
    slake.write()
    PIL.Image.fromarray(np.full((9, 5), 4000, np.uint16)).save(slake.image(0), "PNG")
    found = slake_layout.read_folder(slake.root, "en")
    assert found.report["images_noted"] == {images.UNSTRETCHED: ["xmlab0"]}
    assert any("images noted, its 16-bit" in line for line in slake_layout.describe(found.report))
    stored = dict(slake_layout.examples(found, "train"))
    assert stored["2"]["image"] == slake.image(1).read_bytes()  # as released
    with PIL.Image.open(io.BytesIO(stored["0"]["image"])) as image:
        assert image.mode == "L" and image.size == (5, 9) and image.getextrema() == (16, 16)
