"""ROCOv2's and ROCO v1's files with all their quirks, and what the readers refuse."""

import shutil
from collections import Counter

import pytest

from data_prep.datasets.roco import fake as roco_fake
from data_prep.datasets.roco import layout as roco_layout
from data_prep.files import DataError


@pytest.fixture
def v2(tmp_path):
    return roco_fake.write_v2(tmp_path / "rocov2")


@pytest.fixture
def v1(tmp_path):
    return roco_fake.write_v1(tmp_path / "roco")


def _rewrite(path, old, new):
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8", newline="")


def _message(read, folder) -> str:
    with pytest.raises(DataError) as e:
        read(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_v2_reads_captions_and_concepts(v2):
    release = roco_layout.read_v2(v2)
    assert {s: len(f) for s, f in release.figures.items()} == {"train": 8, "validate": 4, "test": 5}
    figures = list(release.figures["test"].values())
    assert figures[0].image_id == "ROCOv2_2023_test_000001"
    assert figures[0].names[0] == "ROCOv2_2023_test_000001.jpg"
    assert figures[1].features == {
        "caption": 'plain film of a hand, test finding 1 of 3\u2009mm "as is"',
        "concepts": "C1306645;C1140618;C1999039;C0856747",
        "modality": "X-ray",
        "location": "Upper extremity",
        "plane": "AP",
    }
    assert figures[1].flags == ("spaces around the caption",)
    assert figures[2].features["caption"].endswith("(arrow)") and figures[2].flags
    assert not figures[0].flags
    # The fifth has no manual concept, only others.
    assert figures[4].features["concepts"] == "C0856747" and not figures[4].features["modality"]
    assert release.notes["test"]["concepts_manual"]["empty"] == 1
    assert release.notes["test"]["concepts"]["empty"] == 0
    assert release.images["test"] == v2 / "test"


def test_v2_counts_gaps_in_the_ids_and_takes_them(v2):
    notes = roco_layout.read_v2(v2).notes["test"]
    assert (notes["first_number"], notes["last_number"], notes["numbers_left_out"]) == (1, 6, 1)


@pytest.mark.parametrize("blank", ["\u202f", " ", '""', "\u200b\ufeff", " . "])
def test_v2_a_blank_caption_is_none(v2, blank):
    path = v2 / "valid_captions.csv"
    _rewrite(path, '"CT of the chest, valid finding 0"', blank)
    figure = next(iter(roco_layout.read_v2(v2).figures["validate"].values()))
    assert figure.no_caption == "blank caption"
    assert figure.features["caption"] == "" and not figure.flags


def test_captions_used_again_are_flagged_after_the_first(v2):
    _rewrite(v2 / "test_captions.csv", "MRI of the brain, test", "CT of the chest, test")
    _rewrite(v2 / "test_captions.csv", "finding 2 (arrow)\xa0", "finding 0")
    _rewrite(v2 / "valid_captions.csv", "CT of the chest, valid", "CT of the chest, train")
    figures = roco_layout.read_v2(v2).figures
    again = [i for f in figures.values() for i, g in f.items() if roco_layout.CAPTION_AGAIN in g.flags]
    assert again == ["ROCOv2_2023_valid_000001", "ROCOv2_2023_test_000003"]


@pytest.mark.parametrize("odd", ["\u2028", "\x85", "\x0b", "\x1c"])
def test_v2_only_line_feeds_end_a_row(v2, odd):
    _rewrite(v2 / "test_captions.csv", "MRI of the brain,", f"MRI of{odd}the brain,")
    figures = roco_layout.read_v2(v2).figures["test"]
    assert len(figures) == 5
    assert any(odd in f.features["caption"] for f in figures.values())


def test_v2_quoted_line_breaks_and_crlf(v2):
    path = v2 / "test_captions.csv"
    _rewrite(path, "MRI of the brain,", "MRI of\nthe brain,")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (v2 / "test_concepts.csv").write_bytes((v2 / "test_concepts.csv").read_bytes().replace(b"\n", b"\r\n"))
    figures = list(roco_layout.read_v2(v2).figures["test"].values())
    assert figures[2].features["caption"].startswith("MRI of\nthe brain")
    assert figures[2].features["concepts"] == "C0024485;C0856747"


def test_v2_captions_of_any_length_and_many_concepts(v2):
    """From one character to 5,330, and 28 concepts of one image, as in the release."""
    long = "A, " * 1776 + "B."
    table = v2 / "test_captions.csv"
    _rewrite(table, '"CT of the chest, test finding 0"', f'"{long}"')
    _rewrite(table, '"CT of the chest, test finding 4"', "x")
    cuis = ";".join(f"C{i:07d}" for i in range(28))
    _rewrite(v2 / "test_concepts.csv", "C0040405;C0856747", cuis)
    figures = list(roco_layout.read_v2(v2).figures["test"].values())
    assert len(long) == 5330 and figures[0].features["caption"] == long
    assert figures[4].features["caption"] == "x"
    assert figures[0].features["concepts"] == f"{cuis};C0040405"  # the manual one too


def test_files_beside_the_captions_are_left_alone(v1, v2):
    """Licences and overviews of a release say nothing about its rows."""
    before = [roco_layout.read_v1(v1).figures, roco_layout.read_v2(v2).figures]
    (v1 / "licences.txt").write_text("ROCO_ID,PMC_ID,CC\nROCO_00001,PMC1,NO-CC CODE\n")
    (v2 / "license_information.csv").write_text("ID,licence\n")
    after = [roco_layout.read_v1(v1).figures, roco_layout.read_v2(v2).figures]
    assert [{s: list(f) for s, f in x.items()} for x in before] == [{s: list(f) for s, f in x.items()} for x in after]


def test_v2_without_concept_files(v2):
    for path in v2.glob("*_concepts*.csv"):
        path.unlink()
    release = roco_layout.read_v2(v2)
    assert {f.features["concepts"] for f in release.figures["train"].values()} == {""}
    assert "concepts" not in release.notes["train"]


def test_v2_with_manual_concepts_alone(v2):
    for split in roco_fake.SIZES:
        (v2 / f"{split}_concepts.csv").unlink()
    figures = list(roco_layout.read_v2(v2).figures["train"].values())
    assert figures[0].features["concepts"] == "C0040405"
    assert figures[0].features["modality"] == "CT"


def test_v2_concepts_of_other_images_are_counted(v2):
    path = v2 / "test_concepts.csv"
    _rewrite(path, "ROCOv2_2023_test_000001,", "ROCOv2_2023_test_009999,")
    note = roco_layout.read_v2(v2).notes["test"]["concepts"]
    assert (note["ids_without_caption"], note["captions_without_id"]) == (1, 1)


def test_v2_several_modalities_are_all_told(v2):
    _rewrite(v2 / "test_concepts_manual.csv", "C0040405", "C0040405;C0032743")
    figure = next(iter(roco_layout.read_v2(v2).figures["test"].values()))
    assert figure.features["modality"] == "CT, PET"


@pytest.mark.parametrize(
    "names, expected",
    [
        (["test_images.zip"], "test_images.zip"),
        (["test.zip", "images.zip"], "test.zip"),
        (["images.zip"], "images.zip"),
        (["images/test/x.jpg", "images.zip"], "images/test"),
        (["images/x.jpg"], "images"),
        ([], None),
    ],
)
def test_where_images_are_looked_for(v2, names, expected):
    shutil.rmtree(v2 / "test")
    for name in names:
        (v2 / name).parent.mkdir(parents=True, exist_ok=True)
        (v2 / name).touch()
    found = roco_layout.read_v2(v2).images["test"]
    assert found == (v2 / expected if expected else None)


@pytest.mark.parametrize(
    "old, new, words",
    [
        ("ID,Caption", "id;text", ["header", "ID,Caption"]),
        ("test_000002,", "test_000001,", ["'ROCOv2_2023_test_000001' comes twice", "line 3"]),
        ("test_000003,", "test_000003,x,", ["line 4", "another number of cells"]),
        ("\nROCOv2_2023_test_000003", "\n", ["line 4", "no ID"]),
    ],
)
def test_v2_refuses_broken_tables(v2, old, new, words):
    _rewrite(v2 / "test_captions.csv", old, new)
    message = _message(roco_layout.read_v2, v2)
    assert "test_captions.csv" in message
    for word in words:
        assert word in message


def test_v2_refuses_an_id_in_two_splits(v2):
    _rewrite(v2 / "test_captions.csv", "ROCOv2_2023_test_000001", "ROCOv2_2023_train_000001")
    message = _message(roco_layout.read_v2, v2)
    assert "train and test" in message and "ROCOv2_2023_train_000001" in message


def test_tables_that_are_no_tables_are_named(v2):
    (v2 / "test_captions.csv").write_bytes(b"ID,Caption\nROCOv2_2023_test_000001,caf\xe9\n")
    assert "not UTF-8" in _message(roco_layout.read_v2, v2)
    (v2 / "test_captions.csv").write_text("version https://git-lfs.github.com/spec/v1\noid s\n")
    assert "git-LFS pointer" in _message(roco_layout.read_v2, v2)


def test_v1_as_its_repository_has_it(v1):
    release = roco_layout.read_v1(v1)
    assert {s: len(f) for s, f in release.figures.items()} == {"train": 8, "validate": 4, "test": 5}
    figure = next(iter(release.figures["test"].values()))
    # The leading space of the format is no space of the caption, and named after its article.
    assert figure.features["caption"] == "CT of the chest, test finding 0" and not figure.flags
    assert figure.features["concepts"] == "C0040405;C0817096"
    assert (figure.features["modality"], figure.features["location"]) == ("CT", "Chest")
    assert figure.names == ("ROCO_00012.jpg", "ROCO_00012.png", "ROCO_00012.jpeg", "PMC4002_fig-ROCO_00012.jpg")
    assert figure.groups == (("paper", "PMC4002"),)
    assert release.images["validate"] == v1 / "data" / "validation" / "radiology" / "images"
    flagged = [f.flags for f in release.figures["train"].values()]
    assert flagged[1] and flagged[2] and not flagged[3]


def test_v1_as_medm_has_it(tmp_path):
    folder = roco_fake.write_v1(tmp_path / "medm", medm=True)
    release = roco_layout.read_v1(folder)
    assert {s: len(f) for s, f in release.figures.items()} == {"train": 8, "validate": 4, "test": 5}
    assert set(release.images.values()) == {folder / "images"}


def test_where_v1_images_are_looked_for(v1):
    at = v1 / "data" / "test" / "radiology"
    shutil.rmtree(at / "images")
    assert roco_layout.read_v1(v1).images["test"] is None
    (v1 / "test_images.zip").touch()
    assert roco_layout.read_v1(v1).images["test"] == v1 / "test_images.zip"
    (at / "images.zip").touch()
    assert roco_layout.read_v1(v1).images["test"] == at / "images.zip"


def test_v1_quotes_mean_nothing_and_lines_without_tab_are_counted(v1):
    path = v1 / "data" / "test" / "radiology" / "captions.txt"
    path.write_text('ROCO_00001\t "a" b "c\n\nand more\nROCO_00002\t d\te"\r\n', newline="")
    release = roco_layout.read_v1(v1)
    captions = [f.features["caption"] for f in release.figures["test"].values()]
    assert captions == ['"a" b "c', 'd\te"']
    assert release.notes["test"]["lines_without_tab"] == {"count": 1, "first": ["3"]}


def test_v1_refuses_an_id_twice(v1):
    path = v1 / "data" / "test" / "radiology" / "captions.txt"
    path.write_text("ROCO_00001\t a\nROCO_00001\t b\n")
    assert "'ROCO_00001' comes twice" in _message(roco_layout.read_v1, v1)


def test_each_version_names_the_other_and_near_folders(v1, v2, tmp_path):
    assert "this is ROCOv2: build rocov2" in _message(roco_layout.check_v1, v2)
    assert "this is ROCO v1: build roco_v1" in _message(roco_layout.check_v2, v1)
    assert f"did you mean {v2}?" in _message(roco_layout.check_v2, tmp_path)
    assert "no such folder" in _message(roco_layout.check_v2, tmp_path / "nowhere")
    assert roco_layout.check_v1(v1 / "data") == v1 / "data"


@pytest.mark.real_data
def test_the_released_captions(real_data):
    release = roco_layout.read_v2(real_data / "rocov2")
    assert {s: len(f) for s, f in release.figures.items()} == {"validate": 9904, "test": 9927}
    blank = {s: [i for i, g in f.items() if g.no_caption] for s, f in release.figures.items()}
    assert blank == {"validate": ["ROCOv2_2023_valid_003902"], "test": []}
    flags = {s: Counter(x for g in f.values() for x in g.flags) for s, f in release.figures.items()}
    # The blank one is told as blank.
    spaces = {s: n["spaces around the caption"] for s, n in flags.items()}
    assert spaces == {"validate": 482, "test": 471}
    again = {s: n["caption of another image too"] for s, n in flags.items()}
    assert again == {"validate": 11, "test": 35}
    assert release.notes["test"]["numbers_left_out"] == 45
    assert release.notes["test"]["last_number"] == 9972
    assert release.images == {"validate": None, "test": real_data / "rocov2" / "test"}
