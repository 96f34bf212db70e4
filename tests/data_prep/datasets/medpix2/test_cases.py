"""MedPix 2.0's files with all their quirks, and what the reader refuses."""

import json

import pytest

from data_prep.datasets.medpix2 import cases, fake
from data_prep.files import DataError


@pytest.fixture
def content():
    return fake.release()


def _read(tmp_path, content):
    return cases.read_folder(fake.write(tmp_path / "medpix2", content))


def _message(tmp_path, content) -> str:
    with pytest.raises(DataError) as e:
        _read(tmp_path, content)
    assert "\n" not in str(e.value)
    return str(e.value)


def _figure(release, image_id):
    return next(f[image_id] for f in release.figures.values() if image_id in f)


def test_joins_descriptions_with_cases_by_the_official_split(tmp_path, content):
    release = _read(tmp_path, content)
    assert {s: len(f) for s, f in release.figures.items()} == {"train": 8, "validate": 4, "test": 4}
    assert release.notes["cases_by_split"] == {"train": 4, "validate": 2, "test": 2}
    assert release.images["test"] == tmp_path / "medpix2" / "images"
    figure = release.figures["validate"]["MPX1004_synpic10041"]
    # Names have no suffix in the files.
    assert figure.names == ("MPX1004_synpic10041.png", "MPX1004_synpic10041.jpg")
    assert figure.groups == (("case", "MPX1004"),)
    assert figure.features == {
        "case_id": "MPX1004",
        "modality": "CT",
        "modality_detail": "CT - noncontrast",
        "plane": "Coronal",
        "figure_part": "",
        "age": "0",
        "sex": "male",
        "acr_codes": "8.-1",
        "location": "Genitourinary",
        "location_category": "Abdomen",
        "caption": "Shadow 4 in\nimage 1.",
        "title": "Finding 4",
        "history": "54-year-old",
        "exam": "",
        "findings": "A shadow.\n\n\u2022 number  4",
        "differential": "This 4\nThat 4",
        "diagnosis": "Disease 4",
        "diagnosis_by": "",
        "treatment": "",
        "discussion": "",
        "topic": "Topic 4",
        "topic_category": "Neoplasm, benign",
        "topic_discussion": "About disease 4.",
        "topic_keywords": "",
    }
    assert set(figure.features) == set(cases.FEATURES)


@pytest.mark.parametrize("value", ["absent", None, "N/A", " n/a ", "NA", ""])
@pytest.mark.parametrize("key", ["Findings", "Discussion"])
def test_optional_keys_absent_null_or_not_applicable_are_alike(tmp_path, content, key, value):
    case = content["cases"][0]["Case"]
    case.pop(key)
    if value != "absent":
        case[key] = value
    figure = _figure(_read(tmp_path, content), "MPX1000_synpic10000")
    assert figure.features[key.lower()] == ""


def test_null_planes_and_odd_spaces(tmp_path, content):
    content["descriptions"][0]["Description"] |= {"Plane": None, "Modality": " MR - T2 weighted"}
    figure = _figure(_read(tmp_path, content), "MPX1000_synpic10000")
    assert figure.features["plane"] == ""
    assert figure.features["modality_detail"] == "MR - T2 weighted"


def test_the_split_is_the_same_from_the_jsonl_files(tmp_path, content):
    folder = fake.write(tmp_path / "medpix2", content)
    before = cases.read_folder(folder)
    (folder / "splitted_dataset" / "uid_list.json").unlink()
    assert cases.read_folder(folder).figures == before.figures
    train = folder / "splitted_dataset" / "descriptions_train.jsonl"
    lines = train.read_text().splitlines(keepends=True)
    train.unlink()
    for i, part in enumerate((lines[:4], lines[4:]), 1):
        train.with_name(f"descriptions_train_{i}.jsonl").write_text("".join(part))
    assert cases.read_folder(folder).figures == before.figures
    train.write_text("{\n")
    with pytest.raises(DataError, match="descriptions_train.jsonl line 1"):
        cases.read_folder(folder)


def test_other_copies_names(tmp_path, content):
    folder = fake.write(tmp_path / "medpix2", content)
    (folder / "Descriptions.json").rename(folder / "Description.json")
    assert len(cases.read_folder(folder).figures["train"]) == 8


@pytest.mark.parametrize(
    "caption, reason",
    [
        ("Replace this - DESCRIPTION OF THE IMAGE OR FINDINGS.", "placeholder"),
        ("IN PROGRESS.", "placeholder"),
        ("CT Image", "says only"),
        ("MRI Images", "says only"),
        ("CT image 7", "says only"),
        ("Figure 1", "says only"),
        ("", "no caption"),
        ("...", "no caption"),
        (None, "no caption"),
        ("N/A", "no caption"),
    ],
)
def test_what_is_no_caption(tmp_path, content, caption, reason):
    content["descriptions"][0]["Description"]["Caption"] = caption
    figure = _figure(_read(tmp_path, content), "MPX1000_synpic10000")
    assert reason in figure.no_caption and figure.features["caption"] == ""


@pytest.mark.parametrize("caption", ["pelvis", "Axial FLAIR", "Image of a mass", "Right Knee"])
def test_short_captions_that_say_something_stay(tmp_path, content, caption):
    content["descriptions"][0]["Description"]["Caption"] = caption
    figure = _figure(_read(tmp_path, content), "MPX1000_synpic10000")
    assert figure.features["caption"] == caption and not figure.no_caption


@pytest.mark.parametrize(
    "key, value, flag",
    [
        ("Plane", "Photograph", "not a radiological image"),
        ("Plane", "Gross Pathology", "not a radiological image"),
        ("Plane", "Drawing", "not a radiological image"),
        ("Modality", "Drawing", "not a radiological image"),
        ("Plane", "Multiple or Montage", "montage or reconstruction"),
        ("Plane", "3D Reconstruction", "montage or reconstruction"),
        ("Modality", " MR - Montage of Images", "montage or reconstruction"),
    ],
)
def test_images_that_are_no_plain_slice_are_flagged(tmp_path, content, key, value, flag):
    content["descriptions"][0]["Description"][key] = value
    release = _read(tmp_path, content)
    assert _figure(release, "MPX1000_synpic10000").flags == (flag,)
    assert not _figure(release, "MPX1000_synpic10001").flags


def test_captions_used_again_are_flagged_after_the_first(tmp_path, content):
    for i in (0, 1, 5):
        content["descriptions"][i]["Description"]["Caption"] = "The same."
    release = _read(tmp_path, content)
    flagged = [i for f in release.figures.values() for i, g in f.items() if g.flags]
    assert flagged == ["MPX1000_synpic10001", "MPX1002_synpic10021"]
    assert release.notes["captions_used_again"] == 2


def test_images_of_cases_in_no_split_are_told(tmp_path, content):
    content["uid_list"]["test"].remove("MPX1006")
    release = _read(tmp_path, content)
    assert release.notes["images_of_cases_in_no_split"]["first"] == fake.images_of("MPX1006")
    assert len(release.figures["test"]) == 2 and release.notes["descriptions"] == 16


def test_images_that_only_cases_or_only_descriptions_have_are_told(tmp_path, content):
    content["cases"][0]["TAC"].append("MPX1000_synpic7")
    content["cases"][1]["MRI"] = None
    release = _read(tmp_path, content)
    strays = ["MPX1000_synpic7", *fake.images_of("MPX1001")]
    note = release.notes["images_in_only_one_of_the_two_files"]
    assert note == {"count": 3, "first": strays}
    assert "images_in_only_one_of_the_two_files" not in _read(tmp_path, None).notes


def _two_splits(content):
    content["uid_list"]["test"].append("MPX1000")


def _twice(content):
    content["descriptions"].append(content["descriptions"][0])


def _case_twice(content):
    content["cases"].append(content["cases"][0])


def _no_case(content):
    content["cases"].pop(0)


def _no_description(content):
    content["descriptions"][3]["Description"] = "text"


def _no_image(content):
    content["descriptions"][3]["image"] = ""


def _no_test(content):
    content["uid_list"]["test"] = []


def _no_list(content):
    content["uid_list"]["dev"] = "MPX1004"


@pytest.mark.parametrize(
    "change, words",
    [
        (_two_splits, ["case MPX1000 is in train and test", "uid_list.json"]),
        (_twice, ["'MPX1000_synpic10000' comes twice", "Descriptions.json entry 16"]),
        (_case_twice, ["'MPX1000' comes twice", "Case_topic.json entry 8"]),
        (_no_case, ["case 'MPX1000' is not in Case_topic.json", "entry 0"]),
        (_no_description, ["Description is 'text'", "entry 3"]),
        (_no_test, ["no case in test"]),
        (_no_list, ["dev isn't a list"]),
    ],
)
def test_what_is_refused(tmp_path, content, change, words):
    change(content)
    message = _message(tmp_path, content)
    for word in words:
        assert word in message


def test_an_entry_without_image_is_refused(tmp_path, content):
    folder = fake.write(tmp_path / "medpix2", content)
    _no_image(content)
    (folder / "Descriptions.json").write_text(json.dumps(content["descriptions"]))
    with pytest.raises(DataError, match="entry 3: image is ''"):
        cases.read_folder(folder)


def test_other_folders_are_refused_and_near_ones_named(tmp_path, content):
    folder = fake.write(tmp_path / "medpix2", content)
    with pytest.raises(DataError, match=f"did you mean {folder}"):
        cases.check_folder(tmp_path)
    with pytest.raises(DataError, match=f"did you mean {folder}"):
        cases.check_folder(folder / "images")
    with pytest.raises(DataError, match="no such folder"):
        cases.check_folder(tmp_path / "nowhere")
    (folder / "Case_topic.json").write_text("version https://git-lfs.github.com/spec/v1\noid x\n")
    with pytest.raises(DataError, match="Case_topic.json.*git-LFS pointer"):
        cases.read_folder(folder)


@pytest.mark.real_data
def test_the_released_cases(real_data):
    release = cases.read_folder(real_data / "medpix2")
    assert release.notes["cases"] == 671 and release.notes["descriptions"] == 2050
    assert release.notes["cases_by_split"] == {"train": 535, "validate": 67, "test": 69}
    assert release.notes["images_by_split"] == {"train": 1653, "validate": 197, "test": 200}
    assert "images_in_only_one_of_the_two_files" not in release.notes
    figures = [g for f in release.figures.values() for g in f.values()]
    reasons = [g.no_caption for g in figures if g.no_caption]
    assert reasons.count("placeholder in place of a caption") == 23  # 21, and 2 in progress
    assert reasons.count("the caption says only that it is an image") == 16
    assert sum("caption of another image too" in g.flags for g in figures) == 662
    assert sum("not a radiological image" in g.flags for g in figures) == 15
    assert sum("montage or reconstruction" in g.flags for g in figures) == 64
    assert all(g.features["case_id"] == g.image_id.split("_")[0] for g in figures)
    assert all(g.features["diagnosis"] and g.features["topic_discussion"] for g in figures)
