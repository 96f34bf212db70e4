"""Leakage between built sets: copies, look-alikes, numbers of MedPix, articles and questions are found."""

import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import pytest

from data_prep import files
from data_prep.build import build
from data_prep.files import DataError
from data_prep.leakage import __main__ as program
from data_prep.leakage import compare, looks, records
from paligemma_med.pp import image_digests
from tests import chromium
from tests.data_prep import made


def smooth(seed, size=(96, 80)):
    """A picture of soft shapes, as radiographs are."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 7, 3), np.uint8)
    return PIL.Image.fromarray(cells).resize(size, PIL.Image.Resampling.BICUBIC)


def encoded(image, kind="PNG", **kw):
    out = io.BytesIO()
    image.save(out, kind, **kw)
    return out.getvalue()


def vqa_med(root, images, question="what is it?"):
    """A folder of VQA-Med 2019's layout: {image id: bytes}, one question each, the first two of validate and test."""
    ids = list(images)
    parts = {"Validation": ("val", ids[:1]), "Training": ("train", ids[2:])}
    for long, (short, some) in parts.items():
        folder = root / f"ImageClef-2019-VQA-Med-{long}"
        made.write(folder / f"All_QA_Pairs_{short}.txt", "\n".join(f"{i}|{question}|a {i}" for i in some))
        for i in some:
            made.write(folder / f"{short.capitalize()}_images" / f"{i}.jpg", images[i])
    made.write(root / "VQAMed2019Test" / "VQAMed2019_Test_Questions_w_Ref_Answers.txt", f"{ids[1]}|organ|{question}|x")
    made.write(root / "VQAMed2019Test" / "VQAMed2019_Test_Images" / f"{ids[1]}.jpg", images[ids[1]])
    return root


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Two built sets in two data_dirs: the second has a copy, a re-encoded copy and a number of the first's."""
    root = tmp_path_factory.mktemp("two")
    first = {f"synpic{i}": encoded(smooth(i)) for i in range(6)}
    second = {
        "synpic90": encoded(smooth(90)),
        "<b>synpic91": first["synpic4"],  # in test, of an image in the other's train
        "other1": encoded(smooth(1).resize((160, 130)), "JPEG", quality=70),  # of the other's test
        "synpic5": encoded(smooth(95)),
    }
    folders = {}
    for name, images in (("a", first), ("b", second)):
        made_ = build("vqa_med_2019", manual_dir=vqa_med(root / name, images), data_dir=root / f"{name}_tfds")
        folders[name] = made_["vqa_med_2019"]
    return root, folders


def test_each_way_finds_what_it_should(two, tmp_path):
    root, folders = two
    lines = []
    found = program.leakage(folders, tmp_path, note=lines.append)
    pairs = {(s["a"], s["b"]): [(p["image_id_a"], p["image_id_b"], p["ways"]) for p in s["pairs"]] for s in found}
    assert pairs == {
        ("a train", "b train"): [("synpic5", "synpic5", ["synpic"])],
        ("a train", "b test"): [("synpic4", "<b>synpic91", ["content", "look"])],
        ("a test", "b train"): [("synpic1", "other1", ["look"])],
    }
    (copy,) = [s for s in found if s["b"] == "b test"]
    assert copy["counts"]["questions"] == 1 and copy["counts"]["answers"] == 0
    assert copy["pairs"][0]["questions"] == [dict(question="what is it?", answer_a="a synpic4", answer_b="x")]
    assert any("a test and b train" in line and "1 by look" in line for line in lines)
    written = json.loads((tmp_path / "leakage.json").read_text())
    assert written["compared"] == found and written["sets"]["a"]["splits"]["train"] == {"images": 4, "rows": 4}
    page = (tmp_path / "leakage.html").read_text()
    assert "&lt;b&gt;synpic91" in page and "<b>synpic91" not in page


def test_one_set_is_compared_with_itself_and_nothing_is_said_to_be_nothing(two, tmp_path):
    lines = []
    assert program.leakage({"a": two[1]["a"]}, tmp_path, note=lines.append) == []
    assert lines == ["nothing was found in common"]
    assert "Nothing was found in common." in (tmp_path / "leakage.html").read_text()


@chromium.needed
def test_the_page_is_shown_without_complaints(two, tmp_path):
    program.leakage(two[1], tmp_path, note=lambda line: None)
    with chromium.browser(tmp_path) as page:
        page.open(tmp_path / "leakage.html")
        assert page.problems == [] and page.outside == []
        assert page.js("[...document.images].every(i => i.naturalWidth > 0) && document.images.length") == 6
        assert page.js("document.querySelectorAll('.pair b').length") == 0  # an id is text
        page.resize(360, 800)
        assert page.js("document.documentElement.scrollWidth") <= 360


@pytest.mark.parametrize(
    "change, found",
    [
        (lambda i: i.resize((300, 250)), True),
        (lambda i: PIL.Image.open(io.BytesIO(encoded(i, "JPEG", quality=30))), True),
        (lambda i: PIL.ImageEnhance.Brightness(i).enhance(0.6), True),
        (lambda i: i.convert("L"), True),
        (lambda i: i.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), False),
        (lambda i: smooth(1000), False),
    ],
    ids=["size", "jpeg", "darker", "grey", "mirrored", "another"],
)
def test_looks(change, found):
    images = [smooth(i) for i in range(8)]
    a = [looks.fingerprint(encoded(i)) for i in images]
    b = [looks.fingerprint(encoded(change(i))) for i in images[::-1]]
    assert {(i, j) for i, j, _ in looks.close_pairs(a, b)} == ({(i, 7 - i) for i in range(8)} if found else set())


def test_plain_and_broken_pictures_have_no_look():
    assert looks.fingerprint(encoded(PIL.Image.new("L", (50, 50)))) is None
    assert looks.fingerprint(b"no image") is None
    assert looks.close_pairs([None], [looks.fingerprint(encoded(smooth(1)))]) == []


def test_pairs_of_hashes_are_those_that_all_comparisons_give():
    rng = np.random.default_rng(0)
    a = list(rng.integers(0, 256, (60, 32), np.uint8))
    b = []
    for i, x in enumerate(a):
        bits = np.unpackbits(x)
        bits[rng.permutation(256)[: i % 20]] ^= 1
        b.append(np.packbits(bits))
    every = {(i, j): int(np.unpackbits(x ^ y).sum()) for i, x in enumerate(a) for j, y in enumerate(b)}
    assert {(i, j): d for i, j, d in looks.close_pairs(a, b)} == {k: d for k, d in every.items() if d <= looks.CLOSE}


def test_figures_of_one_article_are_counted_but_are_no_pairs():
    a = [records.Picture(f"{i}", f"PMC1_F{i}.jpg", i, article="PMC1") for i in range(2)]
    b = [records.Picture("9", "x", 0, article="PMC1"), records.Picture("8", "x", 0, article="")]
    pairs, counts = compare.compare(a, b)
    assert pairs == [] and counts["article"] == {"a": 2, "b": 1}


@pytest.mark.parametrize(
    "ids, wanted",
    [
        (("MPX1009_synpic46283", ""), ("46283", "")),
        (("synpic100.jpg", ""), ("100", "")),
        (("PMC212319_Fig3_4.jpg", ""), ("", "PMC212319")),
        (("figure.jpg", "PMC7"), ("", "PMC7")),
        (("figure.jpg", "pdf-hash"), ("", "pdf-hash")),
        (("xmlab1", ""), ("", "")),
    ],
)
def test_ids(ids, wanted):
    assert records.ids_of(*ids) == wanted


def test_digests_are_written_with_the_build(two):
    found = image_digests.read(two[1]["b"])
    assert {s: sorted(x.values()) for s, x in found.items()} == {
        "train": ["other1", "synpic5"],
        "validate": ["synpic90"],
        "test": ["<b>synpic91"],
    }
    assert set(found["test"]) < set(image_digests.read(two[1]["a"])["train"])


def test_tfrecord_files_are_compared_too(two, tmp_path):
    root, folders = two
    made_ = build("vqa_med_2019", manual_dir=root / "b", data_dir=tmp_path / "d", file_format="tfrecord")
    assert image_digests.read(made_["vqa_med_2019"]) == image_digests.read(folders["b"])
    found = program.leakage({"a": folders["a"], "b": made_["vqa_med_2019"]}, tmp_path / "out", note=lambda line: None)
    assert len(found) == 3


def test_command(two, tmp_path):
    root, _ = two
    run = [sys.executable, "-m", "data_prep.leakage", f"--out={tmp_path}", f"--data_dir={root}/a_tfds"]
    good = subprocess.run([*run, "vqa_med_2019"], capture_output=True, text=True)
    assert good.returncode == 0 and "nothing was found in common\nleakage.html and leakage.json" in good.stdout
    with pytest.raises(DataError, match="not built.*did you mean slake/en"):
        (tmp_path / "slake" / "en" / "1.0.0").mkdir(parents=True)
        (tmp_path / "slake" / "en" / "1.0.0" / "dataset_info.json").write_text("{}")
        files.built_folder("slake", tmp_path)
    for version in ("2.0.0", "10.0.0"):
        (tmp_path / "slake" / "en" / version).mkdir()
        (tmp_path / "slake" / "en" / version / "dataset_info.json").write_text("{}")
    assert files.built_folder("slake/en", tmp_path).name == "10.0.0"
