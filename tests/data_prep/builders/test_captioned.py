"""rocov2, roco_v1 and medpix2 as data sets: captions, pairs, what is missing and what is told."""

import functools
import io
import json
import pickle
import shutil

import PIL.Image
import pytest
import tensorflow_datasets as tfds

from data_prep import qa_files
from data_prep.build import build
from data_prep.builders import captioned as captioned_builder
from data_prep.datasets.medpix2 import fake as medpix_fake
from data_prep.datasets.roco import fake as roco_fake
from data_prep.files import DataError
from data_prep.images import store as image_store

MAKE = {
    "rocov2": (roco_fake.write_v2, roco_fake.write_qa, (8, 4, 5)),
    "roco_v1": (roco_fake.write_v1, lambda p: roco_fake.write_qa(p, v2=False), (8, 4, 5)),
    "medpix2": (medpix_fake.write, medpix_fake.write_qa, (8, 4, 4)),
}
SPLITS = ("train", "validate", "test")
TEXTS = ("question", "answer", "answer_type", "question_id", "image_id", "content_type", "qa_rule")


def _read(data_dir, name, split):
    source = tfds.data_source(name, split=split, data_dir=data_dir, decoders={"image": tfds.decode.SkipDecoding()})
    rows = [{k: v if k == "image" else v.decode() for k, v in row.items()} for row in source]
    return {row["question_id"]: row for row in rows}


def _report(data_dir, name):
    (path,) = (data_dir / name).glob("1.*/build_report.json")
    return json.loads(path.read_text())


def _build(tmp_path, name, config="caption", **options):
    return build(
        name,
        manual_dir=tmp_path / "raw",
        data_dir=tmp_path / "d",
        config=config,
        options=options or None,
    )


def _message(*args, **kwargs) -> str:
    with pytest.raises(DataError) as e:
        _build(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


@pytest.mark.parametrize("name", MAKE)
def test_captions(tmp_path, name, capsys):
    write, _, sizes = MAKE[name]
    write(tmp_path / "raw")
    build(name, manual_dir=tmp_path / "raw", data_dir=tmp_path / "d")
    for split, size in zip(SPLITS, sizes, strict=True):
        rows = _read(tmp_path / "d", f"{name}/caption", split)
        assert len(rows) == size
        for key, row in rows.items():
            assert key == row["image_id"]
            assert row["question"] == captioned_builder.CAPTION_QUESTION
            assert row["answer"] == row["caption"] and row["answer"].strip() == row["answer"] != ""
            assert row["answer_type"] == "OPEN"
            # Not of the image of another row, and the released bytes.
            write = medpix_fake if name == "medpix2" else roco_fake
            assert row["image"] == write.image(key)
    said = capsys.readouterr().out
    assert "no image is in two splits" in said
    assert "has no files for config qa" in said


@pytest.mark.parametrize("name", MAKE)
def test_pairs(tmp_path, name, capsys):
    write, write_qa, sizes = MAKE[name]
    write(tmp_path / "raw")
    qa = write_qa(tmp_path / "pairs.jsonl")
    _build(tmp_path, name, "qa", qa=str(qa))
    for split, size in zip(SPLITS, sizes, strict=True):
        rows = _read(tmp_path / "d", f"{name}/qa", split)
        assert len(rows) == 2 * size and len({r["image_id"] for r in rows.values()}) == size
        assert {r["answer_type"] for r in rows.values()} == {"OPEN", "CLOSED"}
        first = next(iter(rows.values()))
        assert first["question_id"][:-2] == first["image_id"] and first["caption"]
        assert set(TEXTS) | {"image", "modality", "location", "plane"} < set(first)
    report = _report(tmp_path / "d", f"{name}/qa")
    assert report["made_with"]["qa"] == str(qa) == report["qa"]["files"][0]
    assert report["qa"]["splits"]["pairs"]["rows_kept"] == 2 * sum(sizes)
    assert "by rule" in capsys.readouterr().out


def test_a_file_of_pairs_in_the_folder_is_found(tmp_path):
    medpix_fake.write(tmp_path / "raw")
    medpix_fake.write_qa(tmp_path / "raw" / "qa_pairs_generated_all.json")
    made = build("medpix2", manual_dir=tmp_path / "raw", data_dir=tmp_path / "d")
    assert list(made) == ["medpix2/caption", "medpix2/qa"]
    rows = _read(tmp_path / "d", "medpix2/qa", "test")
    assert {r["qa_rule"] for r in rows.values()} == {"Q:", "Q1:"}
    assert {r["case_id"] for r in rows.values()} == {"MPX1006", "MPX1007"}
    row = rows["MPX1006_synpic10060_1"]
    assert row["findings"].startswith("A shadow.") and row["diagnosis"] == "Disease 6"


def test_images_stay_in_their_zip_files(tmp_path):
    roco_fake.write_v2(tmp_path / "raw", zipped=True)
    _build(tmp_path, "rocov2")
    rows = _read(tmp_path / "d", "rocov2/caption", "test")
    assert all(row["image"] == roco_fake.image(key) for key, row in rows.items())


@pytest.mark.parametrize("form", ["missing", "lfs", "cut", "text"])
def test_a_missing_or_broken_image(tmp_path, form, capsys):
    roco_fake.write_v2(tmp_path / "raw")
    image = tmp_path / "raw" / "train" / "ROCOv2_2023_train_000002.jpg"
    content = image.read_bytes()
    image.unlink()
    if form != "missing":
        image.write_bytes(
            {
                "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                "cut": content[: len(content) // 2],
                "text": b"<html>",
            }[form]
        )
    message = _message(tmp_path, "rocov2")
    assert "ROCOv2_2023_train_000002" in message and "--allow_missing_images" in message
    assert ("git-LFS" in message) == (form == "lfs")
    assert not (tmp_path / "d" / "rocov2").exists()
    _build(tmp_path, "rocov2", allow_missing_images=True)
    assert len(_read(tmp_path / "d", "rocov2/caption", "train")) == 7
    reason = "image missing" if form == "missing" else "image broken"
    report = _report(tmp_path / "d", "rocov2/caption")
    assert report["splits"]["train"]["dropped"] == {reason: {"count": 1, "first": ["ROCOv2_2023_train_000002"]}}
    assert f"dropped, {reason}: 1" in capsys.readouterr().out


def test_what_is_there_is_built_and_the_rest_reported(tmp_path, capsys):
    roco_fake.write_v2(tmp_path / "raw")
    (tmp_path / "raw" / "train_captions.csv").unlink()
    shutil.rmtree(tmp_path / "raw" / "valid")
    assert "nothing found of split train" in _message(tmp_path, "rocov2")
    _build(tmp_path, "rocov2", allow_missing_images=True)
    assert len(_read(tmp_path / "d", "rocov2/caption", "test")) == 5
    report = _report(tmp_path / "d", "rocov2/caption")
    assert report["splits_left_out"] == ["train", "validate"]
    assert report["splits"]["validate"]["rows_read"] == 4
    assert "without train, validate" in capsys.readouterr().out


def test_nothing_at_all_is_an_error_in_any_case(tmp_path):
    roco_fake.write_v2(tmp_path / "raw")
    for split in roco_fake.SIZES:
        shutil.rmtree(tmp_path / "raw" / split)
    message = _message(tmp_path, "rocov2", allow_missing_images=True)
    assert "no row is left for train, validate, test" in message and "image missing" in message


def test_images_without_a_caption_needn_t_be_there(tmp_path):
    content = medpix_fake.release()
    content["descriptions"][0]["Description"]["Caption"] = "Replace this - DESCRIPTION"
    medpix_fake.write(tmp_path / "raw", content)
    (tmp_path / "raw" / "images" / "MPX1000_synpic10000.png").unlink()
    _build(tmp_path, "medpix2")
    report = _report(tmp_path / "d", "medpix2/caption")["splits"]["train"]
    assert report["rows_read"] == 8 and report["rows_kept"] == 7
    assert report["dropped"]["placeholder in place of a caption"]["count"] == 1
    # As a question about its case it is asked for.
    qa = str(medpix_fake.write_qa(tmp_path / "qa.json"))
    assert "1 of 16 images are missing" in _message(tmp_path, "medpix2", "qa", qa=qa)
    (tmp_path / "raw" / "images" / "MPX1000_synpic10000.png").write_bytes(medpix_fake.image("x"))
    _build(tmp_path, "medpix2", "qa", qa=qa)
    flags = _report(tmp_path / "d", "medpix2/qa")["splits"]["train"]["flags"]
    assert flags["placeholder in place of a caption"]["count"] == 2


def test_the_same_image_or_caption_in_two_splits_is_told(tmp_path, capsys):
    content = medpix_fake.release()
    for i in (0, 15):
        content["descriptions"][i]["Description"]["Caption"] = "The same."
    raw = medpix_fake.write(tmp_path / "raw", content)
    shutil.copy(raw / "images/MPX1000_synpic10000.png", raw / "images/MPX1005_synpic10050.png")
    _build(tmp_path, "medpix2")
    shared = _report(tmp_path / "d", "medpix2/caption")["shared"]
    assert shared["image"]["train+validate"] == {"count": 1, "first": ["MPX1005_synpic10050"]}
    assert shared["caption"]["train+test"] == {"count": 1, "first": ["MPX1007_synpic10071"]}
    assert shared["case"]["train+test"]["count"] == 0
    said = capsys.readouterr().out
    assert "1 image in both train and validate" in said and "no case is in two splits" in said


def test_articles_in_two_splits_are_told(tmp_path):
    raw = roco_fake.write_v1(tmp_path / "raw")
    for split in ("train", "test"):
        folder = raw / "data" / split / "radiology"
        text = (folder / "dlinks.txt").read_text()
        old = "PMC4000" if split == "train" else "PMC4002"
        (folder / "dlinks.txt").write_text(text.replace(old, "PMC7"))
        image = next((folder / "images").glob(f"{old}_*"))
        image.rename(image.with_name(image.name.replace(old, "PMC7")))
    _build(tmp_path, "roco_v1")
    shared = _report(tmp_path / "d", "roco_v1/caption")["shared"]["paper"]
    assert shared["train+test"] == {"count": 1, "first": ["PMC7"]}


def test_pairs_go_where_the_release_puts_their_image(tmp_path):
    medpix_fake.write(tmp_path / "raw")
    qa = tmp_path / "dataset_sa.csv"
    qa.write_text(
        "image_id,case_id,question,answer,ans_len,mode,split,new_lines\n"
        'sample/MPX1000_synpic10000.png,MPX1000, What?,"One\nTwo",2,alignment,Test,1\n'
        "sample/MPX1004_synpic10040.png,MPX1004,What?,That.,1,pre_training,Valid,0\n"
        "sample/MPX1004_synpic10040.png,MPX1004,Why?,So.,1,pre_training,validate,0\n"
        "sample/MPX1006_synpic10060.png,MPX1006,What?,That.,1,pre_training,Test,0\n"
        "sample/MPX9_synpic9.png,MPX9,What?,That.,1,pre_training,Test,0\n"
    )
    _build(tmp_path, "medpix2", "qa", qa=str(qa))
    (row,) = _read(tmp_path / "d", "medpix2/qa", "train").values()
    assert (row["question"], row["answer"]) == ("What?", "One\nTwo")
    assert (row["content_type"], row["qa_mode"], row["qa_rule"]) == ("What", "alignment", "columns")
    report = _report(tmp_path / "d", "medpix2/qa")
    assert list(report["splits"]["train"]["flags"]) == ["in split test of the file of pairs"]
    assert not report["splits"]["validate"]["flags"] and not report["splits"]["test"]["flags"]
    left_out = report["qa"]["splits"]["pairs"]["flags"]["no such image in the release, left out"]
    assert left_out == {"count": 1, "first": ["MPX9_synpic9_1"]}
    assert report["splits"]["train"]["tables"]["content_type"] == {"What": 1}


def test_pairs_of_several_files(tmp_path):
    raw = roco_fake.write_v1(tmp_path / "raw")
    texts = roco_fake.write_qa(tmp_path / "qa.jsonl", v2=False).read_text().splitlines()
    valid = [json.loads(t) for t in texts[16:24]]
    rows = [{"image_id": r["image_id"], "original caption": r["answer"], "qa_pair": r["question"]} for r in valid]
    (tmp_path / "valid.json").write_text(json.dumps(rows))
    (tmp_path / "rest.jsonl").write_text("\n".join(texts[:16] + texts[24:]))
    _build(tmp_path, "roco_v1", "qa", qa=f"{tmp_path}/valid.json,{tmp_path}/rest.jsonl")
    assert raw.is_dir() and len(_read(tmp_path / "d", "roco_v1/qa", "train")) == 16
    rules = {r["qa_rule"] for r in _read(tmp_path / "d", "roco_v1/qa", "validate").values()}
    assert rules == {"caption"}


def test_pairs_of_another_release_are_refused(tmp_path):
    roco_fake.write_v2(tmp_path / "raw")
    qa = roco_fake.write_qa(tmp_path / "qa.jsonl", v2=False)
    message = _message(tmp_path, "rocov2", "qa", qa=str(qa))
    assert "ROCO_00010" in message and "ROCOv2_2023_train_000001" in message


def test_qa_needs_pairs_and_captions_take_none(tmp_path):
    roco_fake.write_v2(tmp_path / "raw")
    assert "--qa=FILE" in _message(tmp_path, "rocov2", "qa")
    assert "--config=qa" in _message(tmp_path, "rocov2", "caption", qa="x.jsonl")
    assert "x.jsonl" in _message(tmp_path, "rocov2", "qa", qa="x.jsonl")


GOOD = dict(choice_a="CT", choice_b="**MR** ", choice_c="A film", choice_d="Ultrasound")


@pytest.mark.parametrize("name", MAKE)
def test_multiple_choice_goes_through(tmp_path, name):
    write, write_qa, _ = MAKE[name]
    write(tmp_path / "raw")
    plain = next(qa_files.read_qa(write_qa(tmp_path / "plain.jsonl")))
    row = dict(image_id=plain.image_id, question="Modality?", answer="MR", **GOOD)
    wrong = {
        "none": dict.fromkeys(GOOD, "") | {"answer_letter": ""},
        "a letter without choices": dict.fromkeys(GOOD, ""),
        "fewer than four": {"choice_d": " "},
        "two alike": {"choice_d": "ct"},
        "no letter A to D": {"answer_letter": "E"},
        "the letter's isn't the answer": {"answer_letter": "A"},
    }
    rows = [dict(row, question_id="good", answer_letter="b")]
    rows += [
        dict(row, **{"question": f"{k}?", "question_id": k, "answer_letter": "B", **change})
        for k, change in wrong.items()
    ]
    qa = tmp_path / "qa.jsonl"
    qa.write_text("\n".join(map(json.dumps, rows)) + "\n" + (tmp_path / "plain.jsonl").read_text())
    _build(tmp_path, name, "qa", qa=str(qa))
    keys = captioned_builder.CHOICES
    made = _read(tmp_path / "d", f"{name}/qa", "train")
    assert {k: made["good"][k] for k in keys} == {**GOOD, "choice_b": "MR", "answer_letter": "B"}
    assert made["good"]["question"] == "Modality?" and made["good"]["answer"] == "MR"
    assert len(made) > len(rows)  # the plain ones are there, too
    for key, found in made.items():
        if key != "good":
            assert [found[k] for k in keys] == [""] * 5, key
    flags = _report(tmp_path / "d", f"{name}/qa")["qa"]["splits"]["pairs"]["flags"]
    told = {k.partition("choices left out, ")[2]: v["first"] for k, v in flags.items()}
    assert {k: told[k] for k in wrong if k != "none"} == {k: [k] for k in wrong if k != "none"}
    assert "none" not in str(told)
    _build(tmp_path, name)
    assert not set(keys) & set(next(iter(_read(tmp_path / "d", name, "train").values())))


@pytest.mark.parametrize("bad", ["../../secret", "/etc/passwd", "..\\..\\secret", "C:\\secret"])
def test_ids_can_t_leave_the_folder(tmp_path, bad):
    raw = roco_fake.write_v2(tmp_path / "raw")
    path = raw / "test_captions.csv"
    path.write_text(path.read_text().replace("ROCOv2_2023_test_000001", bad))
    message = _message(tmp_path, "rocov2", allow_missing_images=True)
    assert "would leave" in message and repr(bad) in message


@pytest.mark.parametrize("mode", ["CMYK", "I;16", "RGBA"])
def test_images_that_readers_differ_on_become_plain(tmp_path, mode):
    raw = roco_fake.write_v1(tmp_path / "raw", medm=True)
    names = {"CMYK": "ROCO_00002.jpg", "I;16": "ROCO_00002.png", "RGBA": "ROCO_00002.png"}
    next((raw / "images").glob("ROCO_00012.jpg")).unlink()
    text = (raw / "test_captions.txt").read_text()
    (raw / "test_captions.txt").write_text(text.replace("ROCO_00012\t", "ROCO_00002\t"))
    color = {"CMYK": (0, 99, 0, 0), "I;16": 40000, "RGBA": (10, 20, 30, 128)}[mode]
    PIL.Image.new(mode, (9, 7), color).save(raw / "images" / names[mode])
    for path in (raw / "images").glob("ROCO_00002.*"):
        assert path.name == names[mode]
    _build(tmp_path, "roco_v1")
    row = _read(tmp_path / "d", "roco_v1/caption", "test")["ROCO_00002"]
    with PIL.Image.open(io.BytesIO(row["image"])) as image:
        assert image.format == "PNG" and image.mode in ("L", "RGB") and image.size == (9, 7)


def test_what_beam_is_given_can_be_sent(tmp_path):
    store = image_store.open_store(roco_fake.write_v2(tmp_path / "raw") / "test", by_name=True)
    example = pickle.loads(pickle.dumps(functools.partial(captioned_builder.example, store)))
    row = {"question_id": "q", "file": "ROCOv2_2023_test_000001.jpg", "caption": "c"}
    key, made = example(row)
    assert key == "q" and set(made) == {"question_id", "caption", "image"}
    assert row["file"]  # left as it was


@pytest.mark.slow
def test_same_records_with_beam(tmp_path):
    pytest.importorskip("apache_beam")
    roco_fake.write_v2(tmp_path / "raw", zipped=True)
    roco_fake.write_qa(tmp_path / "raw" / "qa.jsonl")
    build("rocov2", manual_dir=tmp_path / "raw", data_dir=tmp_path / "plain")
    build("rocov2", manual_dir=tmp_path / "raw", data_dir=tmp_path / "beam", beam_options=[])
    for name in ("rocov2/caption", "rocov2/qa"):
        assert _report(tmp_path / "plain", name) == _report(tmp_path / "beam", name)
        for split in SPLITS:
            plain, beam = (_read(tmp_path / d, name, split) for d in ("plain", "beam"))
            assert list(plain.items()) == list(beam.items())


@pytest.mark.real_data
def test_the_released_folders_as_far_as_they_are_there(tmp_path, real_data):
    data_dir = tmp_path / "d"
    options = {"allow_missing_images": True}
    build("rocov2", manual_dir=real_data / "rocov2", data_dir=data_dir, options=options)
    report = _report(data_dir, "rocov2/caption")
    assert report["splits"]["test"]["rows_read"] == 9927
    assert report["splits"]["test"]["rows_kept"] == 4
    assert report["splits"]["validate"]["rows_read"] == 9904
    assert report["splits"]["validate"]["dropped"]["blank caption"]["count"] == 1

    medpix = real_data / "medpix2"
    with pytest.raises(DataError, match="1,974 of 2,011 images are missing"):
        build("medpix2", manual_dir=medpix, data_dir=data_dir)
    build("medpix2", manual_dir=medpix, data_dir=data_dir, options=options)
    report = _report(data_dir, "medpix2/caption")
    assert [report["splits"][s]["rows_read"] for s in SPLITS] == [1653, 197, 200]
    assert [report["splits"][s]["rows_kept"] for s in SPLITS] == [15, 12, 10]
    options["qa"] = str(real_data / "medm" / "qa_pairs_generated_all.json")
    build("medpix2", manual_dir=medpix, data_dir=data_dir, config="qa", options=options)
    report = _report(data_dir, "medpix2/qa")
    assert [report["splits"][s]["rows_read"] for s in SPLITS] == [8270, 990, 1000]
    assert [report["splits"][s]["rows_kept"] for s in SPLITS] == [80, 100, 50]
    assert all(not n["count"] for pairs in report["shared"].values() for n in pairs.values())
