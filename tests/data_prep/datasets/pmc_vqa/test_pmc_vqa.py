"""PMC-VQA through the build command: zip or folder, both versions, splits, options, leakage."""

import csv
import io
import json
import shutil
import zipfile

import PIL.Image
import pytest
import tensorflow_datasets as tfds

from data_prep import files
from data_prep.build import build
from data_prep.datasets.pmc_vqa import fake, release
from data_prep.files import DataError


def read(data_dir, name, split):
    source = tfds.builder(name, data_dir=data_dir).as_data_source(
        split=split, decoders={"image": tfds.decode.SkipDecoding()}
    )
    decoded = ({k: v if k == "image" else v.decode() for k, v in example.items()} for example in source)
    return {example["question_id"]: example for example in decoded}


def edit(path, change):
    """Rewrites a table; `change` gets its lines, without the header."""
    with open(path, newline="") as f:
        header, *lines = csv.reader(f)
    change(lines)
    with open(path, "w", newline="") as f:
        csv.writer(f).writerows([header, *lines])


def make(folder, tmp_path, config="v1", name="d", **options):
    made = build("pmc_vqa", manual_dir=folder, data_dir=tmp_path / name, config=config, options=options)
    report = json.loads((made[f"pmc_vqa/{config}"] / "build_report.json").read_text())
    splits = [s for s in release.SPLITS if report["splits"][s]["rows_kept"]]
    return report, {s: read(tmp_path / name, f"pmc_vqa/{config}", s) for s in splits}


@pytest.fixture
def folder(tmp_path):
    return fake.write(tmp_path / "raw")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("zipped", [True, False])
def test_records_are_what_the_files_hold(tmp_path, version, zipped):
    folder = fake.write(tmp_path / "raw", version, zipped=zipped)
    report, splits = make(folder, tmp_path, version)
    suffix = "" if version == "v1" else "_2"
    store = release.open_images(folder, version, None)
    made_from = {"train": ("train", "validate"), "test": ("test",)}
    for table, names in made_from.items():
        found = {k: v for name in names for k, v in splits[name].items()}
        with open(folder / f"{table}{suffix}.csv", newline="") as f:
            rows = list(csv.DictReader(f))
        assert found.keys() == {f"{version}_{table}{suffix}_{i}" for i in range(len(rows))}
        for i, row in enumerate(rows):
            example = found[f"{version}_{table}{suffix}_{i}"]
            letter = row["Answer_label"] if version == "v1" else row["Answer"]
            option = row[f"Choice {letter}"].split(":", 1)[1].strip()
            assert example["answer"] == example[f"choice_{letter.lower()}"] == option
            assert example["answer_letter"] == letter and example["answer_type"] == "CLOSED"
            assert example["question"] == row["Question"].strip()
            assert example["caption"] == row.get("Caption", "")
            assert example["image"] == store.read(row["Figure_path"])
            assert row["Figure_path"].startswith(example["paper_id"] + "_")
    assert report["made_with"]["validate_fraction"] == 0.02


def test_nothing_is_unpacked(folder, tmp_path):
    make(folder, tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["images.zip", "test.csv", "train.csv"]
    assert not list((tmp_path / "d").rglob("*.jpg"))
    assert not list((tmp_path / "d").rglob("*checked*"))


def test_all_configs_that_the_folder_has_files_for(folder, tmp_path, capsys):
    made = build("pmc_vqa", manual_dir=folder, data_dir=tmp_path / "d")
    assert list(made) == ["pmc_vqa/v1", "pmc_vqa/v1_open"]
    assert "has no files for config v2, v2_open" in capsys.readouterr().out
    fake.write(folder, "v2")
    assert len(build("pmc_vqa", manual_dir=folder, data_dir=tmp_path / "d")) == 4
    closed, blank = (read(tmp_path / "d", f"pmc_vqa/{c}", "validate") for c in ("v1", "v1_open"))
    assert closed.keys() == blank.keys()
    assert {x["answer_type"] for x in blank.values()} == {"OPEN"}


def test_validate_is_cut_by_article_and_seed(folder, tmp_path):
    report, splits = make(folder, tmp_path, validate_fraction=0.3)
    papers = {s: {x["paper_id"] for x in rows.values()} for s, rows in splits.items()}
    assert papers["train"] and not papers["train"] & papers["validate"]
    assert 18 <= len(splits["validate"]) <= 20  # 0.3 of 60 rows, articles have three
    assert report["shared"]["article"]["train+validate"]["count"] == 0
    same, other = (make(folder, tmp_path, name=f"s{i}", validate_fraction=0.3, seed=i)[1] for i in range(2))
    assert same["validate"].keys() == splits["validate"].keys() != other["validate"].keys()
    _, none = make(folder, tmp_path, name="none", validate_fraction=0.0)
    assert list(none) == ["train", "test"]
    assert len(none["train"]) == 60


def test_articles_that_share_an_image_stay_together(tmp_path):
    folder = fake.write(tmp_path / "raw", zipped=False, train=30)
    # Every article's first figure is one and the same logo, but for two articles.
    logo = (folder / "images" / "PMC1000000_F1.jpg").read_bytes()
    for path in sorted((folder / "images").glob("PMC10000*_F1.jpg"))[:8]:
        path.write_bytes(logo)
    for seed in range(3):
        report, splits = make(folder, tmp_path, name=f"{seed}", validate_fraction=0.05, seed=seed)
        papers = {x["paper_id"] for x in splits["validate"].values()}
        assert len(papers) in (1, 8)
        assert report["shared"]["image"]["train+validate"]["count"] == 0


def test_rows_that_one_config_drops_change_no_split(tmp_path):
    folder = fake.write(tmp_path / "raw", zipped=False)
    # Only a row that `v1` drops (an empty option) ties the second article to the third.
    shutil.copy(folder / "images/PMC1000001_F1.jpg", folder / "images/PMC1000002_F2.jpg")
    edit(
        folder / "train.csv",
        lambda lines: lines[8].__setitem__(6 if lines[8][-1] != "D" else 5, ""),
    )
    for seed in range(4):
        settings = dict(validate_fraction=0.5, seed=seed)
        papers = [
            {x["paper_id"] for x in make(folder, tmp_path, config, f"{seed}", **settings)[1]["train"].values()}
            for config in ("v1", "v1_open")
        ]
        assert papers[0] == papers[1]
        assert ("PMC1000001" in papers[0]) == ("PMC1000002" in papers[0])


def test_a_build_started_again_goes_on_behind_the_images_it_checked(folder, tmp_path, monkeypatch):
    checked = []
    whole = files.check_image_bytes

    def die_after_twenty(content, where):
        checked.append(where)
        if len(checked) == 20:
            raise KeyboardInterrupt
        return whole(content, where)

    monkeypatch.setattr(files, "check_image_bytes", die_after_twenty)
    with pytest.raises(KeyboardInterrupt):
        make(folder, tmp_path)
    assert not (tmp_path / "d" / "pmc_vqa").exists()
    report, _ = make(folder, tmp_path)
    # 48 images: 19 before, the one that was being decoded, and the rest.
    assert len(checked) == 20 + 48 - 19 and len(set(checked)) == 48
    monkeypatch.undo()
    assert make(folder, tmp_path, name="other")[0] == report


def test_leakage_of_the_release_is_told(folder, tmp_path, capsys):
    def reworded(lines):
        """A question of train about its image in other words, with its options."""
        with open(folder / "train.csv", newline="") as f:
            row = next(r for r in csv.reader(f) if r[0] == "PMC1000001_F1.jpg")
        lines[0][:] = [row[0], "What, in other words, is it?", *row[2:]]

    edit(folder / "test.csv", reworded)
    report, _ = make(folder, tmp_path, seed=3)
    pairs = report["shared"]["article"]
    split = "train" if pairs["train+test"]["count"] else "validate"
    assert pairs[f"{split}+test"] == {"count": 1, "first": ["PMC1000001"]}
    assert report["shared"]["image"][f"{split}+test"]["first"] == ["PMC1000001_F1.jpg"]
    assert report["shared"]["answer about the same image"][f"{split}+test"]["first"] == ["v1_test_0"]
    assert report["shared"]["question about the same image"][f"{split}+test"]["count"] == 0
    out = capsys.readouterr().out
    assert f"WARNING: 1 image in both {split} and test (PMC1000001_F1.jpg)" in out


def test_every_dropped_row_has_its_reason(folder, tmp_path, capsys):
    def damage(lines):
        lines[0][1] = " "
        lines[1][-1] = lines[1][2] = "?"
        lines[2].pop()
        lines[4] = list(lines[3])

    edit(folder / "train.csv", damage)
    report, _ = make(folder, tmp_path)
    train, validate = report["splits"]["train"], report["splits"]["validate"]
    dropped = {k: v for s in (train, validate) for k, v in s["dropped"].items()}
    assert dropped == {
        "empty question": {"count": 1, "first": ["v1_train_0"]},
        "no option is named as the answer": {"count": 1, "first": ["v1_train_1"]},
        "another number of columns than the header": {"count": 1, "first": ["v1_train_2"]},
    }
    flags = {k: v for s in (train, validate) for k, v in s["flags"].items()}
    assert flags["asked before about the same image"] == {"count": 1, "first": ["v1_train_4"]}
    assert train["rows_read"] + validate["rows_read"] == 60
    assert train["rows_kept"] + validate["rows_kept"] == 57
    assert "dropped, empty question: 1 (v1_train_0)" in capsys.readouterr().out


def test_missing_and_broken_images(tmp_path):
    folder = fake.write(tmp_path / "raw", zipped=False)
    (folder / "images" / "PMC1000000_F1.jpg").unlink()
    with pytest.raises(DataError, match="1 images of 72 rows are missing, e.g. PMC1000000_F1.jpg"):
        make(folder, tmp_path)
    (folder / "images" / "PMC1000000_F1.jpg").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(DataError, match="git-LFS pointer.*first used by v1_train_0"):
        make(folder, tmp_path)
    (folder / "images" / "PMC1000001_F1.jpg").unlink()
    report, splits = make(folder, tmp_path, allow_missing_images=True)
    dropped = {}
    for split in ("train", "validate"):
        for reason, note in report["splits"][split]["dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + note["count"]
    assert dropped == {"image broken": 2, "image missing": 2}
    assert len(splits["train"]) + len(splits["validate"]) == 56


def test_shuffled_options(folder, tmp_path):
    _, plain = make(folder, tmp_path)
    report, drawn = make(folder, tmp_path, name="s", shuffle_choices=True)
    moved = 0
    for key, example in drawn["train"].items():
        before = plain["train"][key]
        options = [[x[f"choice_{c}"] for c in "abcd"] for x in (before, example)]
        assert sorted(options[0]) == sorted(options[1])
        assert example["answer"] == before["answer"]
        assert example[f"choice_{example['answer_letter'].lower()}"] == example["answer"]
        moved += example["answer_letter"] != before["answer_letter"]
    assert 0.5 < moved / len(drawn["train"]) < 0.95
    _, other = make(folder, tmp_path, name="t", shuffle_choices=True, seed=1)
    assert other["test"] != drawn["test"]


def test_other_options_are_refused_without_overwrite(folder, tmp_path):
    make(folder, tmp_path)
    make(folder, tmp_path, seed=0)
    with pytest.raises(DataError, match="already built with seed=0, asked for seed=1; pass --over"):
        make(folder, tmp_path, seed=1)


def test_the_checked_test_set(folder, tmp_path):
    with pytest.raises(DataError, match="test_clean.csv: can't be read"):
        make(folder, tmp_path, test_clean=True)
    lines = (folder / "test.csv").read_text().splitlines(keepends=True)
    (folder / "test_clean.csv").write_text("".join(lines[:6]))
    _, splits = make(folder, tmp_path, test_clean=True)
    assert splits["test"].keys() == {f"v1_test_clean_{i}" for i in range(5)}
    fake.write(folder, "v2")
    with pytest.raises(DataError, match="v2 has no test_clean.csv"):
        make(folder, tmp_path, "v2", test_clean=True)


def test_images_elsewhere(folder, tmp_path):
    moved = (folder / "images.zip").rename(tmp_path / "other.zip")
    with pytest.raises(DataError, match="found none of images, images.zip"):
        make(folder, tmp_path)
    _, splits = make(folder, tmp_path, images=str(moved))
    assert len(splits["test"]) == 12


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(validate_fraction=1.0), "validate_fraction is 1.0; expected"),
        (dict(validate_fraction=0.999), "no question is left for train of v1"),
        (dict(colour=1), "pmc_vqa: unknown option colour; its options: images, allow_missing"),
    ],
)
def test_options_that_are_refused(folder, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        make(folder, tmp_path, **options)


def test_folders_that_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such folder; expected a folder with train.csv"):
        build("pmc_vqa", manual_dir=tmp_path / "x", data_dir=tmp_path)
    (tmp_path / "train.json").write_text("[]")
    with pytest.raises(DataError, match="found train.json; expected train.csv"):
        build("pmc_vqa", manual_dir=tmp_path, data_dir=tmp_path)


def test_a_path_that_leaves_the_folder(folder, tmp_path):
    edit(folder / "train.csv", lambda lines: lines[3].__setitem__(0, "..\\..\\etc\\passwd"))
    with pytest.raises(DataError, match="train.csv row 3: Figure_path: path .* would leave"):
        make(folder, tmp_path)


def test_windows_separators(folder, tmp_path):
    edit(folder / "train.csv", lambda lines: lines[0].__setitem__(0, f"images\\{lines[0][0]}"))
    _, splits = make(folder, tmp_path)
    found = {**splits["train"], **splits["validate"]}["v1_train_0"]
    assert found["image_id"] == "images/PMC1000000_F1.jpg"
    with zipfile.ZipFile(folder / "images.zip") as z:
        assert found["image"] == z.read("images/PMC1000000_F1.jpg")


def test_images_that_readers_show_differently_become_png(tmp_path):
    folder = fake.write(tmp_path / "raw", zipped=False)
    paths = sorted((folder / "images").iterdir())[:2]
    PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(paths[0], "JPEG")
    PIL.Image.new("L", (8, 8), 7).save(paths[1], "JPEG")
    _, splits = make(folder, tmp_path, validate_fraction=0.0)
    stored = {x["image_id"]: x["image"] for x in splits["train"].values()}
    assert stored[paths[1].name] == paths[1].read_bytes()
    with PIL.Image.open(io.BytesIO(stored[paths[0].name])) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
