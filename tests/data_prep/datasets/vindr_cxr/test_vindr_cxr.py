"""VinDr-CXR in its three layouts, on made files: several readers' boxes, what becomes of them, and what is refused."""

import csv
import io
import json

import numpy as np
import pytest

from data_prep.build import build
from data_prep.datasets.vindr_cxr import fusion, layout
from data_prep.datasets.vindr_cxr import vindr_cxr_dataset_builder as builder
from data_prep.files import DataError
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import images
from paligemma_med.pp.tfds_files import open_built
from tests.data_prep import made
from tests.pp.dicom_files import make as dicom

OPTIONS = {k: o.default for k, o in builder.Builder.OPTIONS.items()}
HEAD = ("image_id", "rad_id", "class_name", "x_min", "y_min", "x_max", "y_max")
NONE = ("", "", "", "")
TRAIN = [
    ("a", "R8", "Cardiomegaly", 2, 4, 12, 14),
    ("a", "R9", "Cardiomegaly", 4, 4, 14, 14),
    ("a", "R10", "Nodule/Mass", 15, 1, 18, 5),
    ("a", "R9", "Nodule/Mass", 2, 2, 4, 4),
    ("b", "R8", "No finding", *NONE),
    ("b", "R9", "No finding", *NONE),
    ("c", "R8", "No finding", *NONE),
    ("c", "R9", "Pleural effusion", -2, 10, 6, 30),
    ("c", "R9", "Rib fracture", *NONE),
    ("c", "R10", "Calcification", 50, 50, 60, 60),
]
TEST = [("d", "Cardiomegaly", 2, 4, 12, 14), ("d", "Cardiomegaly", 4, 4, 14, 14), ("e", "No finding", *NONE)]


def table(path, rows, head=HEAD):
    out = io.StringIO()
    csv.writer(out).writerows([head, *rows])
    made.write(path, out.getvalue())


def pixels(seed):
    return np.random.default_rng(seed).integers(0, 4000, (20, 24), np.uint16)


@pytest.fixture
def physionet(tmp_path):
    root = tmp_path / "raw"
    table(root / "annotations" / "annotations_train.csv", TRAIN)
    table(root / "annotations" / "annotations_test.csv", TEST, HEAD[:1] + HEAD[2:])
    for i, name in enumerate("abcde"):
        made.write(root / ("train" if name < "d" else "test") / f"{name}.dicom", dicom(pixels(i), bits=12))
    return root


def checked(root, tmp_path, config="physionet", **options):
    found = builder.read_questions(root, config, OPTIONS | dict(validate_fraction=0.0, test_fraction=0.0) | options)
    allow = options.get("allow_missing_images", False)
    return made.checked(found, root, tmp_path / "work", tables=builder.Builder.TABLES, allow_missing=allow)


def test_built_rows_hold_the_boxes_that_they_say(physionet, tmp_path, capsys):
    build("vindr_cxr", manual_dir=physionet, data_dir=tmp_path, options=dict(validate_fraction=0.0))
    said = capsys.readouterr().out
    assert "images without a box, which nothing is asked about: 2" in said and "no image is in two splits" in said
    assert "images where readers disagree whether there is anything: 1" in said
    source = open_built(tmp_path / "vindr_cxr" / "physionet" / "1.0.0").as_data_source("train")
    rows = {row["question_id"].decode(): row for row in source}
    assert set(rows) == {"a_cardiomegaly", "a_nodule_mass", "c_pleural_effusion"}
    for row in rows.values():
        said = boxes_lib.read(row["answer"].decode())
        shares, _ = boxes_lib.from_pixels(row["boxes"]["bbox"], *row["image"].shape[:2])
        np.testing.assert_allclose(shares, said.boxes, atol=1 / 2046)
        assert row["question"].decode() == f"detect {said.labels[0]}" and not said.malformed
        assert set(row["boxes"]["label"]) == {x.encode() for x in said.labels}
    heart = rows["a_cardiomegaly"]
    assert np.array_equal(heart["boxes"]["bbox"], [[3, 4, 10, 10]]) and heart["readers"] == b"2"
    np.testing.assert_array_equal(heart["image"], images.to_rgb(dicom(pixels(0), bits=12)))
    assert np.array_equal(rows["a_nodule_mass"]["boxes"]["bbox"], [[15, 1, 3, 4], [2, 2, 2, 2]])


def test_ledger_and_a_consensus(physionet, tmp_path):
    report, rows = checked(physionet, tmp_path)
    train = report["splits"]["train"]
    assert {k: v["first"] for k, v in train["dropped"].items()} == {
        "no box": ["c_rib_fracture"],
        "no box inside of the image": ["c_calcification"],
    }
    assert train["flags"]["a box reaches outside of the image, and is cut"]["first"] == ["c_pleural_effusion"]
    assert train["tables"]["readers"] == {"2": 2, "1": 1}
    # a consensus is left as it is, though its boxes lie on each other
    assert rows["d_cardiomegaly"]["answer"].count("<loc") == 8 and rows["d_cardiomegaly"]["readers"] == ""
    assert report["shared"]["image"]["train+test"]["count"] == 0


def test_a_row_for_each_reader_or_boxes_of_two(physionet, tmp_path):
    _, each = checked(physionet, tmp_path / "each", readers="each")
    names = {"a_cardiomegaly_R8", "a_cardiomegaly_R9", "a_nodule_mass_R10", "a_nodule_mass_R9"}
    assert names | {"c_pleural_effusion_R9", "d_cardiomegaly"} == set(each)
    report, two = checked(physionet, tmp_path / "two", min_readers=2)
    assert set(two) == {"a_cardiomegaly", "d_cardiomegaly"}
    assert report["splits"]["train"]["dropped"]["no box of 2 readers"]["count"] == 3
    _, apart = checked(physionet, tmp_path / "apart", merge_iou=0.9)
    assert apart["a_cardiomegaly"]["answer"].count("cardiomegaly") == 2


def test_boxes_of_resized_images_and_drawn_splits(tmp_path):
    root, rows = tmp_path / "raw", []
    for i in range(20):
        rows.append((f"k{i}", "R8", "ILD", 100, 50, 200, 100, 240, 200))
        made.write(root / "train" / f"k{i}.png", made.image(i, "PNG", "L"))
    table(root / "train.csv", rows, (*HEAD, "width", "height"))
    report, found = checked(root, tmp_path, "kaggle", validate_fraction=0.2, test_fraction=0.3)
    assert found["k3_ild"]["boxes"] == [dict(label="ild", bbox=pytest.approx([10, 5, 10, 5]))]
    kept = {split: book["rows_kept"] for split, book in report["splits"].items()}
    assert min(kept.values()) > 0 and sum(kept.values()) == 20
    assert sum(b["flags"]["boxes scaled to the size of the image"]["count"] for b in report["splits"].values()) == 20


def coco(root, name="train.json", **changes):
    content = dict(
        images=[dict(id=7, file_name="x/one.jpg", width=24, height=20), dict(id=8, file_name="two.jpg")],
        categories=[dict(id=1, name="Pleural  effusion"), dict(id=2, name="Mass")],
        annotations=[
            dict(image_id=7, category_id=1, bbox=[2, 4, 10, 10], rad_id=1),
            dict(image_id=7, category_id=1, bbox=[4, 4, 10, 10], rad_id=2),
            dict(image_id=8, category_id=2, bbox=[1, 1.5, 3, 3]),
            dict(image_id=8, category_id=1, bbox=[0, 0, 24, 20], iscrowd=1),
        ],
    )
    made.write(root / name, json.dumps(content | changes))
    for i, image in enumerate(("x/one.jpg", "two.jpg")):
        made.write(root / "images" / image, made.image(i))
    return root


@pytest.mark.parametrize("name", ["train.json", "annotations/instances_train.json"])
def test_coco_files(tmp_path, name):
    report, rows = checked(coco(tmp_path / "raw", name), tmp_path, "coco")
    assert set(rows) == {"x/one.jpg_pleural_effusion", "two.jpg_mass"}
    assert rows["x/one.jpg_pleural_effusion"]["boxes"][0]["bbox"] == [3, 4, 10, 10]
    assert rows["two.jpg_mass"]["boxes"][0]["bbox"] == [1, 1.5, 3, 3]
    assert report["splits"]["train"]["dropped"]["no box"]["first"] == ["two.jpg_pleural_effusion"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(images=None), "expected an object with lists images, annotations, categories"),
        (dict(images=[dict(id=7, file_name="../x.jpg")]), r"images\[0\]: file_name"),
        (dict(images=[dict(id=[], file_name="x.jpg")]), r"images\[0\]: id is \[\]"),
        (dict(images=[dict(id=7, file_name="x.jpg", width=0, height=3)]), "width and height are"),
        (dict(categories=[dict(id=1, name="a;b")]), "the name of a box is 'a;b'"),
        (dict(annotations=[dict(image_id=9, category_id=1)]), r"annotations\[0\]: image_id is 9"),
        (dict(annotations=[dict(image_id=7, category_id=1, bbox=[1, 2, -3, 4])]), r"bbox is \[1, 2, -3, 4\]"),
        (dict(annotations=[3]), r"annotations\[0\]: found 3"),
    ],
)
def test_coco_files_that_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        layout.read(coco(tmp_path, **changes), "coco")


@pytest.mark.parametrize(
    "row, message",
    [
        (("a", "R8", "ILD", 5, 1, 2, 4), "line 2: x_min, y_min, x_max, y_max are 5, 1, 2, 4; expected four numbers"),
        (("a", "R8", "ILD", 5, "", 7, 8), "expected four numbers"),
        (("a", "R8", "ILD", 1, 1, "inf", 8), "expected four numbers"),
        (("", "R8", "ILD", 1, 1, 2, 8), "line 2: image_id is empty"),
        (("a", "R8", "", 1, 1, 2, 8), "the name of a box is ''"),
        (("../a", "R8", "ILD", 1, 1, 2, 8), "'../a"),
        (("a", "R8"), "line 2: another number of cells"),
    ],
)
def test_tables_that_are_refused(physionet, tmp_path, row, message):
    table(physionet / "annotations" / "annotations_train.csv", [row])
    with pytest.raises(DataError, match=message):
        checked(physionet, tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(readers="all"), "readers is 'all'; expected merged or each"),
        (dict(merge_iou=1.0), "merge_iou is 1.0"),
        (dict(min_readers=2, readers="each"), "min_readers is 2"),
        (dict(validate_fraction=2.0), "validate_fraction is 2.0"),
    ],
)
def test_options_that_are_refused(physionet, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        checked(physionet, tmp_path, **options)


def test_images_that_are_missing_or_broken(physionet, tmp_path):
    (physionet / "test" / "d.dicom").unlink()
    with pytest.raises(DataError, match="1 of 3 images are missing, e.g. d.dicom"):
        checked(physionet, tmp_path)
    made.write(physionet / "train" / "c.dicom", b"no image")
    with pytest.raises(DataError, match="c.dicom: not a readable image.*--allow_missing_images"):
        checked(physionet, tmp_path)
    report, rows = checked(physionet, tmp_path, allow_missing_images=True)
    assert set(rows) == {"a_cardiomegaly", "a_nodule_mass"}
    assert report["splits"]["train"]["dropped"]["image broken"]["count"] == 2


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(DataError, match="no boxes found; expected annotations/annotations_train.csv"):
        builder.Builder.check_manual_dir(tmp_path)
    table(tmp_path / "annotations_test.csv", TEST, HEAD[:1] + HEAD[2:])
    with pytest.raises(DataError, match="no boxes of train found"):
        checked(tmp_path, tmp_path)
    table(tmp_path / "annotations_train.csv", TRAIN)
    with pytest.raises(DataError, match="no images of train found"):
        checked(tmp_path, tmp_path)


def test_a_release_without_its_test_is_refused(physionet, tmp_path):
    (physionet / "annotations" / "annotations_test.csv").unlink()
    with pytest.raises(DataError, match="nothing found of split test"):
        checked(physionet, tmp_path)


def test_fusion():
    def box(x, *readers):
        return fusion.Box((x, 0.0, x + 10.0, 10.0), frozenset(readers))

    assert fusion.iou(box(0).corners, box(5).corners) == pytest.approx(1 / 3)
    assert fusion.iou((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0
    joined = fusion.fuse([box(0, "1"), box(40, "2"), box(2, "2"), box(4, "3")], 0.5)
    assert [(b.corners[0], len(b.readers)) for b in joined] == [(2.0, 3), (40.0, 1)]
    # the order decides what a box between two others joins
    assert [b.corners[0] for b in fusion.fuse([box(0, "1"), box(3, "2"), box(6, "3")], 0.5)] == [4.5, 0.0]
    assert len(fusion.fuse([box(0), box(0)], 0.5)) == 2
