"""VQA-RAD in both layouts, with each oddity that the released files have; all rows made up."""

import io
import json
import zipfile

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from data_prep.build import build
from data_prep.datasets.vqa_rad import layout
from data_prep.files import DataError
from paligemma_med.pp.images import UNSTRETCHED


def public_row(qid, image, question="Is there air?", answer="Yes", **kw):
    row = {
        "qid": qid,
        "phrase_type": "freeform",
        "qid_linked_id": f"link-{qid}",
        "image_case_url": f"https://medpix.nlm.nih.gov/case?id=case-{image // 2}",
        "image_name": f"synpic{image}.jpg",
        "image_organ": "HEAD",
        "evaluation": "not evaluated",
        "question": question,
        "question_rephrase": "NULL",
        "question_relation": "NULL",
        "question_frame": "NULL",
        "question_type": "PRES",
        "answer": answer,
        "answer_type": "CLOSED",
    }
    return {**row, **kw}


def jpeg(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(out, "JPEG")
    return out.getvalue()


class Folder:
    """`rows` as in the public file; a test changes them and writes one layout or the other."""

    def __init__(self, root):
        self.root = root
        root.mkdir()
        self.rows = [public_row("0", 0)]
        self.rows += [public_row(i, i // 2, f"Is finding {i} there?") for i in range(1, 20)]
        self.rows += [
            public_row(20 + i, i, f"Where is {i}?", "Left", phrase_type=f"test_{kind}")
            for i, kind in enumerate(["freeform", "para", "freeform"])
        ]
        self.images = {f"synpic{i}.jpg": jpeg(i) for i in range(10)}

    def write_images(self, name="VQA_RAD Image Folder"):
        if name.endswith(".zip"):
            with zipfile.ZipFile(self.root / name, "w") as z:
                for image, content in self.images.items():
                    z.writestr(f"VQA_RAD Image Folder/{image}", content)
            return
        (self.root / name).mkdir()
        for image, content in self.images.items():
            (self.root / name / image).write_bytes(content)

    def write_rows(self, path, rows):
        text = json.dumps(rows, ensure_ascii=False)
        (self.root / path).write_text(text, encoding="utf-8")

    def public(self, images="VQA_RAD Image Folder"):
        self.write_images(images)
        self.write_rows(layout.PUBLIC, self.rows)
        return self.root

    def trainset(self):
        self.write_images("images")
        rows = {"train": [], "test": []}
        number = 0  # the release counts the rows of both files, frames included; see `own`
        for i, row in enumerate(self.rows):
            number += 1
            keep = {k: row[k] for k in layout.KEYS} | {"qid": number}
            test = row["phrase_type"].startswith("test")
            keep["phrase_type"] = row["phrase_type"].removeprefix("test_")
            rows["test" if test else "train"].append(keep)
            if i % 2 == 0:
                number += 1
                frame = {"qid": number, "phrase_type": "frame", "question": f"Any >1 of {i}? "}
                rows["train"].append(keep | frame)  # of test questions, too
        for split, split_rows in rows.items():
            self.write_rows(f"{split}set.json", split_rows)
        return self.root


def own(i):
    """The qid that row i of `Folder.rows` has in trainset.json or testset.json."""
    return i + 1 + (i + 1) // 2


@pytest.fixture
def rad(tmp_path):
    return Folder(tmp_path / "rad")


def one(rad, layout_name="public", **change):
    """Features and notes of row 5 with these changes."""
    rad.rows[5].update(change)
    return features_of(rad, "5" if layout_name == "public" else f"trainset_{own(5)}", layout_name)


def features_of(rad, qid, layout_name="public"):
    root = rad.public() if layout_name == "public" else rad.trainset()
    folder = layout.read_folder(root, layout_name, validate_fraction=0)
    notes = {
        note
        for split in folder.report["splits"].values()
        for note, told in split["flags"].items()
        if qid in told["first"]
    }
    rows = [r.features for s in folder.rows.values() for r in s]
    return next(r for r in rows if r["question_id"] == qid), notes


def read(data_dir, name, split):
    source = tfds.builder(name, data_dir=data_dir).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    return {x["question_id"].decode(): x for x in source}


@pytest.mark.parametrize("images", ["VQA_RAD Image Folder", "images", "VQA_RAD Image Folder.zip"])
def test_records_of_the_public_file(rad, tmp_path, images, capsys):
    build("vqa_rad", manual_dir=rad.public(images), data_dir=tmp_path / "d")
    out = capsys.readouterr().out
    assert "has no files for config trainset" in out
    assert "3 of 3 test images are in train" in out or "of 3 test images" in out
    splits = {s: read(tmp_path / "d", "vqa_rad/public", s) for s in ("train", "validate", "test")}
    assert sorted(splits["test"]) == ["20", "21", "22"]
    assert len(splits["train"]) == 18 and len(splits["validate"]) == 2  # an image has 2 questions
    found = splits["test"]["21"]
    assert found["image"] == rad.images["synpic1.jpg"]
    wanted = dict(
        question="Where is 1?",
        answer="Left",
        answer_type="CLOSED",
        image_id="synpic1",
        content_type="PRES",
        phrase_type="para",
        location="HEAD",
        case_id="case-0",
        linked_id="link-21",
        question_rephrase="",
    )
    assert {k: found[k].decode() for k in wanted} == wanted


def test_both_layouts_agree_where_they_hold_the_same_rows(rad, tmp_path):
    rad.public()
    rad.trainset()
    made = build("vqa_rad", manual_dir=rad.root, data_dir=tmp_path / "d")
    assert list(made) == ["vqa_rad/public", "vqa_rad/trainset", "vqa_rad/trainset_no_test_frames"]
    for split, frames in (("train", 11), ("validate", 1), ("test", 0)):
        public, trainset = (read(tmp_path / "d", f"vqa_rad/{c}", split) for c in ("public", "trainset"))
        assert len(trainset) == len(public) + frames
        joined = {x["public_id"].decode(): x for x in trainset.values() if x["public_id"]}
        assert joined.keys() == public.keys()
        assert not trainset.keys() & public.keys()  # nobody joins the two files' numbers by mistake
        for qid, found in public.items():
            for key in ("image", "question", "answer", "phrase_type", "image_id", "content_type", "public_id"):
                assert joined[qid][key] == found[key]
        assert {x["phrase_type"] for x in trainset.values() if not x["public_id"]} <= {b"frame"}
    frame = read(tmp_path / "d", "vqa_rad/trainset", "train")[f"trainset_{own(18) + 1}"]
    assert (frame["question"], frame["made_from"]) == (b"Any >1 of 18?", f"trainset_{own(18)}".encode())


def test_frames_of_test_questions_are_told_and_can_be_left_out(rad, tmp_path):
    folder = layout.read_folder(rad.trainset(), "trainset", validate_fraction=0)
    shared = folder.report["shared"]["question and its frame"]
    assert shared["train+test"]["count"] == 2  # of rows 20 and 22
    assert any("2 test questions stand in train" in line for line in layout.describe(folder.report))
    assert any("no row has a public_id" in line for line in layout.describe(folder.report))
    without = layout.read_folder(rad.root, layout.NO_TEST_FRAMES, validate_fraction=0)
    dropped = without.report["splits"]["train"]["dropped"]["frame of a test question"]
    assert dropped["first"] == [f"trainset_{own(20) + 1}", f"trainset_{own(22) + 1}"]
    assert without.report["shared"]["question and its frame"]["train+test"]["count"] == 0
    assert len(without.rows["train"]) == len(folder.rows["train"]) - 2
    assert without.rows["test"] == folder.rows["test"]


def test_a_frame_whose_question_is_another_is_told(rad):
    root = rad.trainset()
    rows = json.loads((root / "trainset.json").read_text())
    frame = next(r for r in rows if r["phrase_type"] == "frame")
    frame["answer"] = "Something else"
    rad.write_rows("trainset.json", rows)
    report = layout.read_folder(root, "trainset").report
    assert report["frames_of_unknown_origin"] == [f"trainset_{frame['qid']}"]


def test_equal_questions_are_joined_in_their_order(rad):
    rad.rows[7] |= dict(question=rad.rows[6]["question"], image_name=rad.rows[6]["image_name"])
    rad.public()
    rows = layout.read_folder(rad.trainset(), "trainset", validate_fraction=0).rows["train"]
    joined = {r.features["question_id"]: r.features["public_id"] for r in rows}
    assert [joined[f"trainset_{own(i)}"] for i in (6, 7)] == ["6", "7"]


@pytest.mark.parametrize("layout_name", ["public", "trainset"])
@pytest.mark.parametrize(
    "change, key, wanted, note",
    [
        (dict(answer=3), "answer", "3", "a number as the answer"),
        (dict(answer=" on the skin "), "answer", "on the skin", None),
        (dict(answer="Heart \tlungs"), "answer", "Heart, lungs", "tab in the answer"),
        (dict(answer="liver\tsplee n \t stomach"), "answer", "liver, splee n, stomach", "tab in the"),
        (dict(question="Is it a male\twhat else?"), "question", "Is it a male, what else?", "tab in"),
        (dict(question="it\ufffds what?"), "question", "it's what?", "apostrophe"),
        (dict(question="\ufffd what?"), "question", "\ufffd what?", "U+FFFD"),
        (dict(answer_type="CLOSED "), "answer_type", "CLOSED", None),
        (dict(question_type="PRSE"), "content_type", "PRES", "PRSE read as PRES"),
        (dict(question_type="ATRIB"), "content_type", "ATTRIB", "ATRIB read as ATTRIB"),
        (dict(question_type="Other"), "content_type", "OTHER", None),
        (dict(question_type="PRES, POS"), "content_type", "PRES, POS", None),
        (dict(question_type="PRES,pos"), "content_type", "PRES, POS", None),
        (dict(question_type="XYZ"), "content_type", "XYZ", "XYZ is unknown"),
    ],
)
def test_repairs(rad, layout_name, change, key, wanted, note):
    features, notes = one(rad, layout_name, **change)
    assert features[key] == wanted
    assert any(note in n for n in notes) if note else not notes


def test_null_and_case_in_the_public_file(rad):
    change = dict(question_rephrase="NULL", question_relation="Subsumes", question_frame="Is\tit?")
    features, _ = one(rad, **change)
    assert features["question_rephrase"] == ""
    assert features["question_relation"] == "subsumes" and features["question_frame"] == "Is, it?"


def test_missing_rephrase_and_first_qid_as_text(rad):
    del rad.rows[5]["question_rephrase"]
    features, notes = features_of(rad, "5")
    assert features["question_rephrase"] == "" and notes == {"key question_rephrase missing"}
    assert rad.rows[0]["qid"] == "0"
    assert "0" in [
        r.features["question_id"] for r in layout.read_folder(rad.root, "public", validate_fraction=0).rows["train"]
    ]


def test_dropped_and_told(rad):
    rad.rows[5]["answer"] = " "
    rad.rows[7]["question"] = rad.rows[6]["question"].upper()
    report = layout.read_folder(rad.public(), "public", validate_fraction=0).report
    train = report["splits"]["train"]
    assert train["rows_read"] == 20 and train["rows_kept"] == 19
    assert train["dropped"] == {"no answer": {"count": 1, "first": ["5"]}}
    assert train["flags"]["asked twice about the same image"]["first"] == ["7"]
    assert report["images_not_used"] == []


def test_leakage_is_counted_by_content(rad):
    rad.images["synpic9.jpg"] = rad.images["synpic2.jpg"]  # a copy under another name
    rad.rows[20:] = [
        public_row(20, 9, "Where?", phrase_type="test_freeform", qid_linked_id="link-3"),
        public_row(21, 11, "IS finding 3  there?", phrase_type="test_para"),
    ]
    rad.rows = [r for r in rad.rows if r["image_name"] not in ("synpic9.jpg",) or r["qid"] == 20]
    rad.images["synpic11.jpg"] = rad.images["synpic1.jpg"]
    rad.images["synpic12.jpg"] = jpeg(12)
    report = layout.read_folder(rad.public(), "public", validate_fraction=0).report
    shared = {kind: pairs["train+test"] for kind, pairs in report["shared"].items()}
    assert shared["image"] == {"count": 2, "first": ["synpic11", "synpic9"]}
    assert shared["question about the same image"] == {"count": 1, "first": ["21"]}
    assert shared["question and its paraphrase"] == {"count": 1, "first": ["20"]}
    assert shared["case"]["count"] == 1  # case-4: images 8 and 9
    assert report["images_not_used"] == ["synpic12"]
    assert "2 of 2 test images are in train" in layout.describe(report)[0]


def test_validate_is_a_share_of_images_and_stays_the_same(rad):
    def split(**kw):
        rows = layout.read_folder(rad.root, "public", **kw).rows
        return {s: {r.features["image_id"] for r in split_rows} for s, split_rows in rows.items()}

    rad.public()
    drawn = split(validate_fraction=0.3)
    assert len(drawn["validate"]) == 3 and not drawn["validate"] & drawn["train"]
    assert drawn == split(validate_fraction=0.3) != split(validate_fraction=0.3, seed=1)
    assert "validate" not in split(validate_fraction=0)
    for wrong in (1, -0.1):
        with pytest.raises(DataError, match="validate_fraction"):
            split(validate_fraction=wrong)


def test_more_images_do_not_reshuffle_validate():
    names = [f"synpic{i}" for i in range(200)]
    small, large = (layout.validation_images(names[:n], 0.1, 0) for n in (150, 200))
    assert len(small) == 15 and len(large) == 20
    assert len((large & set(names[:150])) - small) <= 5  # only for want of more places


def test_missing_image(rad):
    del rad.images["synpic3.jpg"]
    rad.public()
    with pytest.raises(DataError, match="'synpic3.jpg' is missing"):
        layout.read_folder(rad.root, "public")
    report = layout.read_folder(rad.root, "public", allow_missing_images=True, validate_fraction=0).report
    dropped = report["splits"]["train"]["dropped"]
    assert dropped == {"image missing": {"count": 2, "first": ["6", "7"]}}


def test_broken_and_odd_images_are_counted_before_anything_is_written(rad):
    rad.public()
    where = layout.image_path(rad.root)
    PIL.Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(where / "synpic3.jpg", "PNG")
    report = layout.read_folder(rad.root, "public", validate_fraction=0).report
    assert report["splits"]["train"]["flags"][f"image: {UNSTRETCHED}"] == {"count": 2, "first": ["6", "7"]}
    (where / "synpic3.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="synpic3.jpg: not a readable image.*--allow_missing_images"):
        layout.read_folder(rad.root, "public")
    found = layout.read_folder(rad.root, "public", allow_missing_images=True, validate_fraction=0)
    assert found.report["splits"]["train"]["dropped"] == {"image broken": {"count": 2, "first": ["6", "7"]}}
    assert not any(row.image == "synpic3.jpg" for row in found.rows["train"])


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(answer_type="maybe"), r"row 5: answer_type is 'maybe'"),
        (dict(qid="x7"), r"row 5: qid is 'x7'"),
        (dict(qid=True), r"row 5: qid is True"),
        (dict(qid=4), r"question id 4 in train and in train"),
        (dict(answer=None), r"row 5: answer is None"),
        (dict(image_name="../../etc/passwd.jpg"), r"would leave"),
    ],
)
def test_rows_refused(rad, change, message):
    rad.rows[5].update(change)
    with pytest.raises(DataError, match=message):
        layout.read_folder(rad.public(), "public", validate_fraction=0)


def test_row_without_a_key_and_file_that_is_no_list(rad):
    del rad.rows[5]["answer"]
    with pytest.raises(DataError, match="row 5: key answer missing; .*found qid, phrase_type"):
        layout.read_folder(rad.public(), "public")
    rad.write_rows(layout.PUBLIC, {"a": 1})
    with pytest.raises(DataError, match="expected a list of question rows"):
        layout.read_folder(rad.root, "public")


def test_folder_refused(rad, tmp_path):
    with pytest.raises(DataError, match="question files and the images not found"):
        layout.check_folder(rad.root)
    rad.public()
    with pytest.raises(DataError, match=f"did you mean {rad.root}"):
        layout.check_folder(tmp_path)
    with pytest.raises(DataError, match="no trainset.json and testset.json there"):
        layout.read_folder(rad.root, "trainset")
    with pytest.raises(DataError, match="no such folder"):
        layout.check_folder(tmp_path / "none")


def test_grey_and_odd_images_are_stored_as_every_reader_shows_them(rad, tmp_path):
    out = io.BytesIO()
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(out, "JPEG", quality=100)
    rad.images["synpic0.jpg"] = out.getvalue()
    build("vqa_rad", manual_dir=rad.public(), data_dir=tmp_path / "d")
    image = PIL.Image.open(io.BytesIO(read(tmp_path / "d", "vqa_rad/public", "test")["20"]["image"]))
    assert image.format == "PNG" and image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - [255, 0, 0]).max() < 12
