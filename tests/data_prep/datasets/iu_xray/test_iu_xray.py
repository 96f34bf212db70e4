"""IU X-Ray in its three layouts; all reports made up."""

import csv
import io
import json

import pytest

from data_prep.datasets.iu_xray import iu_xray_dataset_builder as builder
from data_prep.datasets.iu_xray import layouts
from data_prep.files import DataError
from tests.data_prep import made

OPTIONS = {k: o.default for k, o in builder.Builder.OPTIONS.items()}
NORMAL = "Heart  and lungs are normal."
STUDIES = 12


def findings(i):
    return "" if i == 3 else NORMAL if i % 2 else f"Finding {i}."


def xml(i, extra=""):
    parts = {"COMPARISON": "None.", "INDICATION": "Pain &amp; XXXX", "FINDINGS": findings(i), "IMPRESSION": f"I {i}."}
    abstract = "".join(f'<AbstractText Label="{k}">{v}</AbstractText>' for k, v in parts.items())
    images = "".join(f'<parentImage id="CXR{i}_1_IM-0001-{k}"><caption>x</caption></parentImage>' for k in (3001, 4001))
    return f'<?xml version="1.0" encoding="utf-8"?>{extra}<e><uId id="CXR{i}"/><A>{abstract}</A>{images}</e>'


def openi(root):
    for i in range(1, STUDIES + 1):
        made.write(root / "NLMCXR_reports" / "ecgen-radiology" / f"{i}.xml", xml(i))
        for k in (3001, 4001):
            made.write(root / "NLMCXR_png" / f"CXR{i}_1_IM-0001-{k}.png", made.image(i + k, "PNG", "L"))
    return root


def table(path, rows):
    out = io.StringIO()
    csv.writer(out).writerows(rows)
    made.write(path, out.getvalue())


def kaggle(root):
    reports = [["uid", "MeSH", "Problems", "image", "indication", "comparison", "findings", "impression"]]
    images = [["uid", "filename", "projection"]]
    for i in range(1, STUDIES + 1):
        reports.append([i, "normal", "normal", "Xray", "Pain, \nXXXX", "None.", findings(i), f"I {i} XXXX."])
        for k, view in ((4001, "Frontal"), (3001, "Lateral")):
            images.append([i, f"{i}_IM-0001-{k}.dcm.png", view])
            made.write(root / "images" / "images_normalized" / images[-1][1], made.image(i + k, "PNG", "L"))
    reports.append([99, "", "", "", "", "", "No image.", "None."])
    images.append([98, "98.png", "Frontal"])
    made.write(root / "images" / "images_normalized" / "98.png", made.image(98, "PNG", "L"))
    table(root / "indiana_reports.csv", reports)
    table(root / "indiana_projections.csv", images)
    return root


def r2gen(root):
    content = {"train": [], "val": [], "    ": []}
    for i in range(1, STUDIES + 1):
        split = ("train", "val", "test")[i % 3]
        paths = [f"CXR{i}_IM-0001/{k}.png" for k in range(2)]
        row = dict(id=f"CXR{i}_IM-0001", report=findings(i) or "None.", image_path=paths, split=split)
        content["    " if split == "test" else split].append(row)
        for k, path in enumerate(paths):
            made.write(root / "images" / path, made.image(10 * i + k, "PNG", "L"))
    made.write(root / "annotation.json", json.dumps(content))
    return root


def checked(root, config, tmp_path, **options):
    found = builder.read_questions(root, config, OPTIONS | options)
    return made.checked(found, root, tmp_path / "work")


def test_two_views_are_two_rows_of_one_study(tmp_path):
    root = kaggle(tmp_path / "raw")
    report, splits = made.built("iu_xray", root, tmp_path / "d", "kaggle", test_fraction=0.4)
    rows = {k: (s, v) for s, x in splits.items() for k, v in x.items()}
    split, row = rows["CXR2_1"]
    assert row == dict(
        image=made.image(2 + 3001, "PNG", "L"),
        question_id="CXR2_1",
        image_id="2_IM-0001-3001.dcm.png",
        question="Describe the findings.",
        answer="Finding 2.",
        answer_type="OPEN",
        content_type="Findings",
        study_id="CXR2",
        view="Lateral",
        findings="Finding 2.",
        impression="I 2 XXXX.",
        indication="Pain, XXXX",
        comparison="None.",
    )
    assert all(rows[f"CXR{i}_0"][0] == rows[f"CXR{i}_1"][0] for i in range(1, STUDIES + 1) if i != 3)
    dropped = {}
    for part in report["splits"].values():
        for reason, note in part["dropped"].items():
            dropped.setdefault(reason, []).extend(note["first"])
    assert dropped == {"no findings": dropped["no findings"], "no image named": ["CXR99_0"]}
    assert sorted(dropped["no findings"]) == ["CXR3_0", "CXR3_1", "CXR98_0"]  # 98 has no report at all
    assert report["shared"]["study"]["train+test"]["count"] == 0
    assert report["shared"]["report"]["train+test"]["count"] == 1  # the normal one


@pytest.mark.parametrize(
    "target, answer, question",
    [
        ("findings", "Finding 2.", "Describe the findings."),
        ("impression", "I 2 XXXX.", "What is the impression?"),
        ("report", "Finding 2. I 2 XXXX.", "Write the report."),
    ],
)
def test_targets(tmp_path, target, answer, question):
    report, rows = checked(kaggle(tmp_path / "raw"), "kaggle", tmp_path, target=target)
    assert (rows["CXR2_0"]["answer"], rows["CXR2_0"]["question"]) == (answer, question)
    removed = "words removed from the report, XXXX"
    assert any(removed in part["flags"] for part in report["splits"].values()) == ("XXXX" in answer)
    assert ("CXR3_0" in rows) == (target != "findings")


def test_frontal_views_only(tmp_path):
    report, rows = checked(kaggle(tmp_path / "raw"), "kaggle", tmp_path, frontal_only=True)
    assert {x["view"] for x in rows.values()} == {"Frontal"} and len(rows) == STUDIES - 1
    dropped = sum(p["dropped"].get("not a frontal view", {}).get("count", 0) for p in report["splits"].values())
    assert dropped == STUDIES - 1


def test_openi(tmp_path):
    report, rows = checked(openi(tmp_path / "raw"), "openi", tmp_path)
    assert len(rows) == 2 * (STUDIES - 1) and report["notes"] == {"studies read": STUDIES}
    row = rows["CXR1_0"]
    assert (row["image_id"], row["view"], row["answer"]) == (
        "CXR1_1_IM-0001-3001.png",
        "",
        "Heart and lungs are normal.",
    )
    assert (row["indication"], row["impression"]) == ("Pain & XXXX", "I 1.")


def test_r2gen_has_its_own_split(tmp_path):
    report, splits = made.built("iu_xray", r2gen(tmp_path / "raw"), tmp_path / "d", "r2gen")
    assert {s: len(x) for s, x in splits.items()} == {"train": 8, "validate": 8, "test": 8}
    row = splits["test"]["CXR2_IM-0001_1"]
    assert row["image"] == made.image(21, "PNG", "L") and row["image_id"] == "CXR2_IM-0001/1.png"
    assert report["shared"]["report"]["train+test"] == {"count": 1, "first": ["CXR5_IM-0001"]}


@pytest.mark.parametrize(
    "content, message",
    [
        (xml(1, '<!DOCTYPE e [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]>'), "1.xml: has a document type"),
        (xml(1).replace("</e>", ""), "1.xml: not XML"),
        (xml(1).replace('<uId id="CXR1"/>', ""), "1.xml: no uId with an id"),
        (xml(1).replace("CXR1_1", "../../x"), "1.xml: image: .*expected a relative path inside"),
        (b"\xff", "1.xml: not UTF-8 text at byte 0"),
    ],
    ids=["entities", "cut", "no id", "path", "bytes"],
)
def test_reports_refused(tmp_path, content, message):
    root = openi(tmp_path / "raw")
    made.write(root / "NLMCXR_reports" / "ecgen-radiology" / "1.xml", content)
    with pytest.raises(DataError, match=message):
        checked(root, "openi", tmp_path)


def test_comments_and_cdata_are_xml_without_entities():
    root = layouts.parse_xml(b"<e><!-- x --><![CDATA[<!ENTITY]]></e>", "x")
    assert root.text == "<!ENTITY"


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(split="dev"), "train row 0: split is 'dev'; expected one of train, val, test"),
        (dict(image_path="x"), "row 0: image_path is 'x'; expected a list of paths"),
        (dict(report=None), "row 0: id, report or split is no text"),
        (dict(image_path=["/etc/passwd"]), "row 0: image: .*expected a relative path inside"),
    ],
)
def test_studies_refused(tmp_path, change, message):
    root = r2gen(tmp_path / "raw")
    content = json.loads((root / "annotation.json").read_text())
    content["train"][0] |= change
    made.write(root / "annotation.json", json.dumps(content))
    with pytest.raises(DataError, match=message):
        checked(root, "r2gen", tmp_path)


@pytest.mark.parametrize(
    "config, options, message",
    [
        ("r2gen", dict(target="report"), "R2Gen's file has findings only"),
        ("r2gen", dict(target="finding"), "target is 'finding'; expected one of findings, impression, report"),
        ("r2gen", dict(frontal_only=True), "r2gen doesn't tell the views; expected config kaggle"),
        ("kaggle", {}, "nothing of this layout found; expected indiana_reports.csv|images not found"),
    ],
)
def test_options_refused(tmp_path, config, options, message):
    with pytest.raises(DataError, match=message):
        made.built("iu_xray", r2gen(tmp_path / "raw"), tmp_path / "d", config, **options)


def test_folders_refused(tmp_path):
    root = r2gen(tmp_path / "raw")
    assert builder.Builder.configs_in(root) == ["r2gen"]
    with pytest.raises(DataError, match=f"did you mean {root}"):
        builder.Builder.check_manual_dir(tmp_path)
    made.write(root / "indiana_reports.csv", "uid,findings\n1,x\n")
    made.write(root / "indiana_projections.csv", "uid,filename,projection\n1,x.png,Frontal\n")
    with pytest.raises(DataError, match="column impression, indication, comparison missing"):
        checked(root, "kaggle", tmp_path)
