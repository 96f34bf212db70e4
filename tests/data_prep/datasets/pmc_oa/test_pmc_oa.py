"""PMC-OA's lines: split by article, odd names told, read as they come; all rows made up."""

import json
import types
import zipfile

import pytest

from data_prep.builders.questioned import drawn_split
from data_prep.datasets.pmc_oa import layout
from data_prep.datasets.pmc_oa import pmc_oa_dataset_builder as builder
from data_prep.files import DataError
from tests.data_prep import made

OPTIONS = {k: o.default for k, o in builder.Builder.OPTIONS.items()} | dict(validate_fraction=0.2, test_fraction=0.3)


@pytest.fixture
def release(tmp_path):
    """Twelve articles of three subfigures each, two of which share a caption."""
    root = tmp_path / "raw"
    rows = [
        dict(image=f"PMC{100 + a}_Fig1_{k}.jpg", caption=f"Shadow {min(k, 1)}\n of  {a}.")
        for a in range(12)
        for k in range(3)
    ]
    for i, row in enumerate(rows):
        made.write(root / "images" / row["image"], made.image(i))
    return types.SimpleNamespace(root=root, rows=rows, write=lambda: _write(root, rows))


def _write(root, rows):
    made.write(root / "pmc_oa_beta.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return root


def checked(release, tmp_path, **kw):
    found = builder.read_questions(release.write(), "whole_captions", OPTIONS)
    return made.checked(found, release.root, tmp_path / "work", **kw)


def test_records_by_article(release, tmp_path):
    root = release.write()
    options = dict(validate_fraction=0.2, test_fraction=0.3)
    report, splits = made.built("pmc_oa", root, tmp_path / "d", "whole_captions", **options)
    rows = {k: (s, v) for s, x in splits.items() for k, v in x.items()}
    assert len(rows) == 36 and len(splits) == 3
    for split, row in rows.values():
        assert split == drawn_split(row["paper_id"], 0.2, 0.3, 0)
    assert rows["pmc_oa_2"][1] == dict(
        image=made.image(1),
        question_id="pmc_oa_2",
        image_id="PMC100_Fig1_1.jpg",
        question="Describe this image.",
        answer="Shadow 1 of 0.",
        answer_type="OPEN",
        content_type="",
        caption="Shadow 1 of 0.",
        paper_id="PMC100",
    )
    assert set(report["shared"]) == {"image", "article"}
    assert report["shared"]["article"]["train+test"]["count"] == 0


def test_images_in_a_folder_of_the_zip_file(release, tmp_path):
    root = release.write()
    with zipfile.ZipFile(root / "images.zip", "w") as z:
        for path in sorted((root / "images").iterdir()):
            z.write(path, f"some_folder/{path.name}")
            path.unlink()
    (root / "images").rmdir()
    _, rows = checked(release, tmp_path)
    assert len(rows) == 36


def test_odd_lines(release, tmp_path):
    release.rows[0]["image"] = str({"bytes": None, "path": "PMC100_Fig1_0.jpg"})
    made.write(release.root / "images" / "figure.jpg", made.image(99))
    release.rows[1]["image"] = "figure.jpg"
    release.rows[2]["caption"] = "\u202f "
    report, rows = checked(release, tmp_path)
    flags = {k: v["first"] for part in report["splits"].values() for k, v in part["flags"].items()}
    assert flags == {
        "image is a Python dict as text, its path is taken": ["pmc_oa_1"],
        "no PMC number in the image's name, which stands for the article": ["pmc_oa_2"],
    }
    assert rows["pmc_oa_1"]["image_id"] == "PMC100_Fig1_0.jpg" and rows["pmc_oa_2"]["paper_id"] == "figure.jpg"
    dropped = {k: v["first"] for part in report["splits"].values() for k, v in part["dropped"].items()}
    assert dropped == {"blank caption": ["pmc_oa_3"]}


def test_one_picture_in_two_articles_is_told(release, tmp_path):
    papers = {s: [a for a in range(12) if drawn_split(f"PMC{100 + a}", 0.2, 0.3, 0) == s] for s in ("train", "test")}
    a, b = papers["train"][0], papers["test"][0]
    made.write(release.root / "images" / f"PMC{100 + b}_Fig1_0.jpg", made.image(3 * a))
    report, _ = checked(release, tmp_path)
    assert report["shared"]["image"]["train+test"] == {"count": 1, "first": [f"PMC{100 + b}_Fig1_0.jpg"]}


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(image="../x.jpg"), "beta.jsonl line 6: image: .*expected a relative path inside"),
        (dict(image=None), "line 6: image is None"),
        (dict(caption=3), "line 6: image is 'PMC101_Fig1_2.jpg' and caption 3; expected two texts"),
    ],
)
def test_lines_refused(release, tmp_path, change, message):
    release.rows[5].update(change)
    with pytest.raises(DataError, match=message):
        checked(release, tmp_path)


def test_folders_refused_and_images_missing(release, tmp_path):
    with pytest.raises(DataError, match="no file of captions found"):
        layout.check_folder(release.root)
    release.write()
    with pytest.raises(DataError, match="pmc_oa.jsonl: missing; expected it for config split_captions"):
        made.built("pmc_oa", release.root, tmp_path / "d", "split_captions")
    (release.root / "images" / "PMC105_Fig1_1.jpg").unlink()
    with pytest.raises(DataError, match="1 of 36 images are missing, e.g. PMC105_Fig1_1.jpg"):
        checked(release, tmp_path)
    report, rows = checked(release, tmp_path, allow_missing=True)
    assert len(rows) == 35
    (release.root / "pmc_oa_beta.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(DataError, match="git-LFS pointer"):
        builder.read_questions(release.root, "whole_captions", OPTIONS).asked.read().__next__()
