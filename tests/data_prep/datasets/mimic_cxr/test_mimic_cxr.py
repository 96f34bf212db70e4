"""MIMIC-CXR's documented layout, with made-up numbers, texts and images: nothing here is of the data."""

import gzip

import pytest

from data_prep.datasets.mimic_cxr import layout
from data_prep.datasets.mimic_cxr import mimic_cxr_dataset_builder as builder
from data_prep.files import DataError
from tests.data_prep import made

OPTIONS = {k: o.default for k, o in builder.Builder.OPTIONS.items()}
SPLITS = ("train", "train", "validate", "test")
SPLIT = "mimic-cxr-2.0.0-split.csv.gz"


def dicom(i, k):
    return f"{i:08x}-{k:08x}-0-0-0"


def gz(path, lines):
    made.write(path, gzip.compress("\n".join(lines).encode()))


def release(root):
    """Four studies, one a patient, with a frontal and a lateral view; the second has no findings."""
    split, views = ["dicom_id,study_id,subject_id,split"], ["dicom_id,subject_id,study_id,Procedure,ViewPosition"]
    sections = ["study,impression,findings,last_paragraph,comparison"]
    for i, name in enumerate(SPLITS):
        for k, view in enumerate(("PA", "LATERAL")):
            split.append(f"{dicom(i, k)},{5000 + i},{1000 + i},{name}")
            views.append(f"{dicom(i, k)},{1000 + i},{5000 + i},X,{view}")
            image = f"p{1000 + i}"[:3] + f"/p{1000 + i}/s{5000 + i}/{dicom(i, k)}.jpg"
            made.write(root / "files" / image, made.image(2 * i + k, mode="L"))
        sections.append(f's{5000 + i},"I  {i}, ___.",{"" if i == 1 else "Lungs  normal."},,')
    gz(root / SPLIT, split)
    gz(root / "mimic-cxr-2.0.0-metadata.csv.gz", views)
    made.write(root / layout.SECTIONS, "\n".join(sections))
    return root


@pytest.fixture
def folder(tmp_path):
    return release(tmp_path / "raw")


def checked(folder, tmp_path, **options):
    return made.checked(builder.read_questions(folder, OPTIONS | options), folder, tmp_path / "work")


def test_records(folder, tmp_path):
    report, splits = made.built("mimic_cxr", folder, tmp_path / "d")
    assert {s: len(x) for s, x in splits.items()} == {"train": 2, "validate": 2, "test": 2}
    assert splits["test"][dicom(3, 1)] == dict(
        image=made.image(7, mode="L"),
        question_id=dicom(3, 1),
        image_id=f"p10/p1003/s5003/{dicom(3, 1)}",
        question="Describe the findings.",
        answer="Lungs normal.",
        answer_type="OPEN",
        content_type="Findings",
        study_id="s5003",
        patient_id="p1003",
        view="LATERAL",
        findings="Lungs normal.",
        impression="I 3, ___.",
        comparison="",
        last_paragraph="",
    )
    assert report["splits"]["train"]["dropped"] == {"no findings": {"count": 2, "first": [dicom(1, 0), dicom(1, 1)]}}
    assert {k: v["train+test"]["count"] for k, v in report["shared"].items()} == dict(
        image=0, patient=0, study=0, report=1
    )


def test_targets_and_views(folder, tmp_path):
    report, rows = checked(folder, tmp_path, target="report", frontal_only=True)
    assert {x["view"] for x in rows.values()} == {"PA"} and len(rows) == 4
    assert rows[dicom(0, 0)]["answer"] == "Lungs normal. I 0, ___."
    train = report["splits"]["train"]
    assert train["dropped"]["not a frontal view"]["count"] == 2
    assert train["flags"]["words removed from the report, ___"]["count"] == 2


def test_a_study_without_a_report_and_a_patient_in_two_splits(folder, tmp_path):
    text = (folder / layout.SECTIONS).read_text().replace("s5001", "s5999")
    made.write(folder / layout.SECTIONS, text)
    lines = gzip.decompress((folder / SPLIT).read_bytes()).decode().replace(",1003,", ",1000,").split("\n")
    gz(folder / SPLIT, lines)
    for k in range(2):
        made.write(folder / "files" / "p10" / "p1000" / "s5003" / f"{dicom(3, k)}.jpg", made.image(6 + k, mode="L"))
    report, _ = checked(folder, tmp_path)
    assert report["splits"]["train"]["dropped"]["no report of the study"]["count"] == 2
    assert report["shared"]["patient"]["train+test"] == {"count": 1, "first": ["p1000"]}


@pytest.mark.parametrize(
    "old, new, message",
    [
        (",1001,", ",../1,", "line 4: subject_id is '../1'; expected a number"),
        (",5001,", ",,", "line 4: study_id is ''; expected a number"),
        (",validate", ",valid", "line 6: split is 'valid'; expected one of train, validate, test"),
        (dicom(0, 0), "../x", "line 2: dicom_id is '../x'; expected letters, digits and hyphens"),
        ("subject_id", "patient", "column subject_id missing"),
    ],
)
def test_tables_refused(folder, tmp_path, old, new, message):
    text = gzip.decompress((folder / SPLIT).read_bytes()).decode().replace(old, new)
    gz(folder / SPLIT, text.split("\n"))
    with pytest.raises(DataError, match=message):
        checked(folder, tmp_path)


def test_damaged_files_and_folders_refused(folder, tmp_path):
    whole = (folder / SPLIT).read_bytes()
    for content in (whole[:30], b"no gzip", whole[:20] + b"\0\0\0" + whole[23:]):
        made.write(folder / SPLIT, content)
        with pytest.raises(DataError, match="split.csv.gz: can't be read"):
            checked(folder, tmp_path)
    (folder / layout.SECTIONS).unlink()
    with pytest.raises(DataError, match="mimic_cxr_sectioned.csv not found"):
        layout.check_folder(folder)
