"""Readers of data sets on parts of their releases, with counts known from elsewhere, and images where there are any."""

import collections
import json
import pathlib

from data_prep.builders import leaks, questioned, reports
from data_prep.builders.questioned import Questions
from data_prep.datasets.iu_xray import layouts as iu_xray
from data_prep.datasets.medicat import layout as medicat
from data_prep.datasets.medxpertqa import layout as medxpertqa
from data_prep.datasets.omnimedvqa import layout as omnimedvqa
from data_prep.datasets.pathvqa import layout as pathvqa
from data_prep.datasets.pmc_oa import layout as pmc_oa
from data_prep.datasets.roco import layout as roco
from data_prep.datasets.vqa_med_2019 import layout as vqa_med_2019
from data_prep.images import store as image_store
from tests.data_prep import made


def test_vqa_med_2019(real_data, tmp_path):
    folder = real_data / "vqa_med_2019"
    report, rows = made.checked(vqa_med_2019.read_folder(folder), folder, tmp_path / "work")
    assert {s: (p["rows_kept"], p["images"]) for s, p in report["splits"].items()} == {
        "train": (240, 60),
        "validate": (80, 20),
        "test": (20, 20),
    }
    assert not any(p["dropped"] for p in report["splits"].values())
    assert collections.Counter(x["content_type"] for x in rows.values())["Plane"] == 80
    flags = {k: v["count"] for k, v in report["splits"]["test"]["flags"].items()}
    assert flags == {"several right answers": 8, "parts of the answer may be left out": 12}


def test_omnimedvqa(real_data, tmp_path):
    folder = real_data / "omnimedvqa"
    store = omnimedvqa.open_images(folder)
    rows = list(omnimedvqa.read_part(folder, "open_access", False, store))
    found = Questions(rows, {"images": store}, lambda row, digest: "train")
    report, kept = made.checked(found, folder, tmp_path / "work")
    assert len(kept) == 9 and report["splits"]["train"]["images"] == 7
    assert {x["modality"] for x in kept.values()} == {"CT", "MRI", "X-ray"}
    # Two data sets have one picture under one last name.
    assert report["splits"]["train"]["flags"] == {
        "asked before about the same image": {"count": 1, "first": ["OCT & X-Ray 2017_0000"]}
    }


def test_omnimedvqa_all_sets_without_images(real_data, tmp_path):
    part = tmp_path / "QA_information" / "Open-access"
    part.parent.mkdir()
    part.symlink_to(real_data / "omnimedvqa" / "rows_without_images")
    (tmp_path / "Images").mkdir()
    rows = list(omnimedvqa.read_part(tmp_path, "open_access", False, omnimedvqa.open_images(tmp_path)))
    assert len(rows) == 1050 and len({r.features["dataset"] for r in rows}) == 42
    assert not any(r.dropped for r in rows)
    flags = collections.Counter(flag for r in rows for flag in r.flags)
    assert not [flag for flag in flags if "in no table" in flag]
    assert {r.features["modality"] for r in rows} == {
        "CT",
        "Dermoscopy",
        "Fundus photography",
        "Microscopy",
        "OCT",
        "X-ray",
    }


def test_pathvqa_gives_the_hubs_numbers_without_repeats(real_data, tmp_path):
    for name in ("val", "test"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / f"pvqa_{name}.json").symlink_to(real_data / "pathvqa" / "official_lxmert" / f"pvqa_{name}.json")
    asked = list(pathvqa.read_folder(tmp_path, without_repeats=True).asked)
    for rows, wanted in ((asked, pathvqa.OFFICIAL), ([row for row in asked if not row.dropped], pathvqa.HUB)):
        counts = collections.Counter(row.split for row in rows)
        assert (counts["validate"], counts["test"]) == wanted[1:]


def test_iu_xray(real_data):
    folder = real_data / "iu_xray"
    studies = list(iu_xray.read(folder / "r2gen_layout", "r2gen"))
    assert collections.Counter(s.split for s in studies) == {"train": 2069, "validate": 296, "test": 590}
    texts = {s: {leaks.plain(x.parts["findings"]) for x in studies if x.split == s} for s in ("train", "test")}
    assert (len(texts["test"]), len(texts["train"] & texts["test"])) == (398, 85)
    tables = [s for s in iu_xray.read(folder / "kaggle_layout", "kaggle")]
    assert len(tables) == 3851 and sum(len(s.images) for s in tables) == 7466
    empty = {target: sum(not reports.asked(s.parts, target)[1] for s in tables) for target in reports.TARGETS}
    assert empty == {"findings": 514, "impression": 31, "report": 25}
    views = collections.Counter(view for s in tables for _, view in s.images)
    assert views == {"Frontal": 3818, "Lateral": 3648}
    assert len(list(iu_xray.read(folder / "openi_layout", "openi"))) == 30


def test_medicat(real_data):
    release = medicat.read_folder(real_data / "medicat", (0.2, 0.3, 0))
    figures = [f for some in release.figures.values() for f in some.values()]
    assert len(figures) == 10 and all(f.features["caption"] for f in figures)
    store = image_store.open_store(release.images["train"])
    assert all(store.check(f.names[0]).digest for f in figures)
    papers = [{f.features["paper_id"] for f in some.values()} for some in release.figures.values()]
    assert sum(map(len, papers)) == len(set().union(*papers)) == 5


def test_medxpertqa(real_data, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "eval").symlink_to(real_data / "medxpertqa" / "eval")
    rows = list(medxpertqa.read_folder(tmp_path, False).asked)
    assert len(rows) == 2000 and sum(not row.dropped for row in rows) == 1581
    assert sum(int(row.features["images"]) for row in rows) == 2852
    assert not any(row.flags for row in rows)  # each question repeats its choices
    assert collections.Counter(r.features["content_type"] for r in rows) == {"Reasoning": 1446, "Understanding": 554}
    hub = [json.loads(line) for line in (real_data / "medxpertqa" / "MM" / "test.jsonl").read_text().splitlines()]
    assert [r["label"] for r in hub] == [row.features["answer_letter"] for row in rows[: len(hub)]]


def test_pmc_oa(real_data):
    rows = list(pmc_oa.rows(pathlib.Path(real_data / "pmc_oa"), "whole_captions", (0.1, 0.1, 0)))
    assert len(rows) == 800 and not any(row.dropped or row.flags for row in rows)
    for row in rows:
        assert row.split == questioned.drawn_split(row.features["paper_id"], 0.1, 0.1, 0)


def test_rocov2_is_split_by_image(real_data):
    """Captions of test that `valid` has but for side, plane and numbers; train's aren't in the sample."""
    captions = {
        name: [caption for _, _, caption in roco._table(real_data / "rocov2" / f"{name}_captions.csv", "Caption")]
        for name in ("valid", "test")
    }
    near = {leaks.near_caption(c) for c in captions["valid"]} - {""}
    assert sum(leaks.near_caption(c) in near for c in captions["test"]) == 183
