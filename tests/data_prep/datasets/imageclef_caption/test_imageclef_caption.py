"""ImageCLEFmedical Caption in the form that readers of the release use; all rows made up."""

import pytest

from data_prep.datasets.imageclef_caption import layout
from data_prep.files import DataError
from tests.data_prep import made

NAME = "ImageCLEFmedical_Caption_2023"


def image_id(split, i):
    return f"{NAME}_{split}_{i:06}"


def release(root):
    for split, numbers in (("train", (1, 2, 4)), ("valid", (1, 2))):
        rows = [f'{image_id(split, i)}\tA "shadow, {i} of {split} ' for i in numbers]
        made.write(root / f"{NAME}_caption_prediction_{split}_labels.csv", "\n".join(["ID\tcaption", *rows]) + "\n")
        rows = [f"{image_id(split, i)}\tC0040405;C0817096" for i in numbers[1:]]
        made.write(root / f"{NAME}_concept_detection_{split}_labels.csv", "\r\n".join(["ID\tcuis", *rows]))
        for i in numbers:
            name = f"{image_id(split, i)}.jpg"
            made.write(root / f"{NAME}_{split}_images" / name, made.image(i + 10 * (split == "valid")))
    made.write(root / f"{NAME}_cui_mapping.csv", "C0040405\tX-Ray Computed Tomography\n")
    return root


@pytest.fixture
def folder(tmp_path):
    return release(tmp_path / "raw")


def test_records_without_a_test_set(folder, tmp_path):
    report, splits = made.built("imageclef_caption", folder, tmp_path / "d", "caption")
    assert {s: len(x) for s, x in splits.items()} == {"train": 3, "validate": 2}
    assert report["splits_left_out"] == ["test"] and report["notes"]["train"]["without_concepts"] == 1
    row = splits["validate"][image_id("valid", 2)]
    assert (
        row
        | dict(
            image=made.image(12),
            answer='A "shadow, 2 of valid',
            concepts="C0040405;C0817096",
            modality="CT",
            location="Chest",
            question="Describe this image.",
        )
        == row
    )
    assert splits["train"][image_id("train", 1)]["modality"] == ""


def test_a_test_set_where_its_captions_are(folder, tmp_path):
    made.write(
        folder / f"{NAME}_caption_prediction_test_labels.csv", f"ID\tcaption\n{image_id('test', 1)}\tA shadow.\n"
    )
    made.write(folder / "test.zip.part", b"")
    with pytest.raises(DataError, match="1 of 6 images are missing"):
        made.built("imageclef_caption", folder, tmp_path / "d", "caption")
    made.write(folder / "test" / f"{image_id('test', 1)}.png", made.image(30, "PNG"))
    _, splits = made.built("imageclef_caption", folder, tmp_path / "d", "caption")
    assert len(splits["test"]) == 1


def test_the_names_of_2022(tmp_path):
    for split, number in (("train", 1), ("valid", 84258)):
        row = f"ImageCLEFmedCaption_2022_{split}_{number:06}\tA shadow {number}."
        made.write(tmp_path / f"caption_prediction_{split}.csv", f"ID\tcaption\n{row}\n")
        (tmp_path / f"{split}_images").mkdir()
    release = layout.read_folder(tmp_path)
    assert list(release.figures) == ["train", "validate"]
    assert "ImageCLEFmedCaption_2022_valid_084258" in release.figures["validate"]


@pytest.mark.parametrize(
    "content, message",
    [
        ("ID,caption\nx,y\n", "header 'ID,caption'; expected ID, tab, caption"),
        ("ID\tcaption\nx y\n", "labels.csv line 2: 'x y'; expected an id, a tab and caption"),
        ("ID\tcaption\n\ty\n", "line 2: .*expected an id"),
        ("ID\tcaption\nx\ta\nx\tb\n", "line 3: id 'x' comes twice"),
        (b"ID\tcaption\nx\t\xff\n", "not UTF-8 text at byte 13"),
    ],
)
def test_tables_refused(folder, content, message):
    made.write(folder / f"{NAME}_caption_prediction_train_labels.csv", content)
    with pytest.raises(DataError, match=message):
        layout.read_folder(folder)


def test_folders_refused(tmp_path):
    made.write(tmp_path / "train_captions.csv", "ID,Caption\n")
    with pytest.raises(DataError, match="no table of captions found"):
        layout.check_folder(tmp_path)
