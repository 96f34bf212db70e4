"""Rows with boxes: which questions get them, and that the boxes in a row are those that its text says."""

import json

import numpy as np
import pytest

from data_prep.build import build
from data_prep.datasets.slake import grounding, layout
from data_prep.files import DataError
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import images
from paligemma_med.pp.tfds_files import open_built

LABELS = ["Liver", "Liver Cancer", "Left Lung", "Right Lung", "Spleen"]


@pytest.mark.parametrize(
    "question, answer, labels",
    [
        ("Where is the liver?", "Right", ["liver"]),
        ("Where is the kidney?", "Right", []),
        ("Where is/are the abnormality located?", "Liver, Left", ["liver cancer"]),
        ("Where are the lungs?", "Both sides", ["left lung", "right lung"]),
        ("Does the picture contain spleen?", "Yes", ["spleen"]),
        ("Does the picture contain spleen?", "No", []),
        ("Does the picture contain livers in sleeves?", "Yes", ["liver"]),
        ("Is this a deliverable?", "Yes", []),
        ("Is the liver healthy?", "No", []),
        ("What is on the left of the liver?", "Spleen", ["spleen"]),
        ("Which organs are there?", "Liver and Lungs", ["left lung", "liver", "right lung"]),
        ("Which organs are there?", "Liver, Kidney", []),
    ],
)
def test_which_boxes_show_what_a_question_is_about(question, answer, labels):
    assert grounding.shown(question, answer, LABELS) == labels


@pytest.fixture
def folder(slake):
    """English rows about a liver, which train's images have once and twice, and of which one is partly outside."""
    for split, image in (("train", 1), ("validate", 2), ("test", 3)):
        slake.rows[split].append(dict(slake.row(900 + image, image), question="Where is the liver?", answer=" Left "))
    slake.write()
    found = [{"Lung": [6, 6, 3, 3]}, {"Liver": [4, 2, 60, 4]}, {"liver": [1, 1, 2, 2]}, {"Spleen": [90, 90, 5, 5]}]
    for i in (1, 2, 3):
        (slake.image(i).parent / "detection.json").write_text(json.dumps(found))
    return slake


def test_built_rows_hold_the_boxes_that_they_say(folder, tmp_path, capsys):
    for config in ("en_detect", "en_ground"):
        build("slake", config=config, manual_dir=folder.root, data_dir=tmp_path)
    said = capsys.readouterr().out
    assert "train: 4 rows of 5 boxes in 2 images, 0 of them without" in said
    assert "train: 3 of 5 questions are about something with a box" in said
    rows = {}
    for config in ("en_detect", "en_ground"):
        builder = open_built(tmp_path / "slake" / config / "1.0.0")
        rows |= {row["question_id"].decode(): row for row in builder.as_data_source("train")}
    assert set(rows) == {"xmlab0_liver", "xmlab0_lung", "xmlab1_liver", "xmlab1_lung", "1", "3", "901"}
    height, width = images.size(folder.image(1).read_bytes())
    two = np.array([[1, 1, 3, 3], [2, 4, 6, width]]) / [height, width, height, width]  # y0, x0, y1, x1
    detect, ground = rows["xmlab1_liver"], rows["901"]
    assert detect["question"] == b"detect liver" and detect["content_type"] == b"Detect organ"
    assert ground["question"] == b"ground Where is the liver?" and ground["content_type"] == b"Modality"
    for row, answer, labels in ((detect, "", ("liver", "liver")), (ground, "Left", ("", ""))):
        read = boxes_lib.read(row["answer"].decode())
        assert read.answer == answer and read.labels == labels and not read.malformed
        np.testing.assert_allclose(read.boxes, two, atol=0.5 / 1023)
        np.testing.assert_array_equal(row["boxes"]["bbox"], [[1, 1, 2, 2], [4, 2, 60, 4]])


def test_questions_are_built_as_before(folder):
    read = layout.read_folder(folder.root, "en")
    assert all(row.boxes is None for rows in read.rows.values() for row in rows)
    assert len(dict(layout.examples(read, "train"))["901"]["boxes"]) == 4


def test_a_box_too_thin_for_text_names_its_file(folder):
    path = folder.image(1).parent / "detection.json"
    path.write_text('[{"Liver": [1, 1, 0.001, 2]}]')
    with pytest.raises(DataError, match=r"xmlab1/detection.json: box .* thinner"):
        grounding.detect(layout.read_folder(folder.root, "en"))


def test_a_folder_without_boxes_is_refused(slake):
    slake.write()
    for path in slake.root.glob("imgs/*/detection.json"):
        path.write_text("[]")
    for make in (grounding.detect, grounding.ground):
        with pytest.raises(DataError, match="train: no row has a box"):
            make(layout.read_folder(slake.root, "en"))
