"""The phantoms: findings where they say, questions that need the image, and a whole build."""

import json
from collections import Counter, defaultdict

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from data_prep.build import build
from data_prep.datasets.drawn import questions as drawn_questions
from data_prep.datasets.phantom import questions, raw
from data_prep.datasets.phantom.draw import FINDINGS, MIN_RADIUS, MODALITIES, SIZE, Finding, draw
from data_prep.datasets.slake import layout as slake_layout
from data_prep.files import DataError

CASES = [(r, m, k) for r in FINDINGS for m in MODALITIES[r] for k in FINDINGS[r]]
# Effusions are low.
HEIGHTS = [(*c, x) for c in CASES for x in drawn_questions.LEVELS if (c[2], x) != ("Effusion", "Upper")]


@pytest.mark.parametrize("region, modality, kind, level", HEIGHTS)
@pytest.mark.parametrize("side", drawn_questions.SIDES)
def test_finding_is_on_its_side_large_and_visible(region, modality, kind, side, level):
    for seed in range(5):
        image, boxes = draw(np.random.default_rng(seed), region, modality, Finding(kind, side, level))
        assert image.shape == (SIZE, SIZE) and image.dtype == np.uint8
        ((label, (x, y, w, h)),) = boxes[-1].items()
        assert label == kind
        cx, cy = x + w / 2, y + h / 2
        assert (cx < SIZE / 2) == (side == "Left")
        assert (cy < SIZE / 2) == (level == "Upper")
        assert min(w, h) >= MIN_RADIUS * SIZE - 1 or kind == "Effusion"  # 1: rounding
        # The mirrored place holds the same tissue without the finding (roughly: organs differ).
        inner = image[int(cy) - 5 : int(cy) + 6, int(cx) - 5 : int(cx) + 6].astype(float)
        normal, _ = draw(np.random.default_rng(seed), region, modality, None)
        before = normal[int(cy) - 5 : int(cy) + 6, int(cx) - 5 : int(cx) + 6].astype(float)
        assert abs(inner.mean() - before.mean()) > 8 or inner.std() - before.std() > 15


def test_draw_depends_on_the_generator_alone():
    finding = Finding("Mass", "Left", "Upper")
    first, again, other = (draw(np.random.default_rng(s), "Head", "MRI", finding)[0] for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert (first != other).mean() > 0.5


def test_draw_refuses_what_a_region_does_not_have():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="Chest has no 'CT'"):
        draw(rng, "Chest", "CT", None)
    with pytest.raises(ValueError, match="Head has no 'Cyst'"):
        draw(rng, "Head", "CT", Finding("Cyst", "Left", "Upper"))


def _states():
    for region, modality, kind in CASES:
        yield region, modality, None
        for side in drawn_questions.SIDES:
            for level in drawn_questions.LEVELS:
                yield region, modality, Finding(kind, side, level)


def test_a_wording_has_one_set_of_answers_and_the_answer_is_in_it():
    answers = {}
    for state in _states():
        for group in questions.candidates(*state):
            for q in group:
                assert q.answer in q.answers and len(set(q.answers)) == len(q.answers) >= 2
                assert answers.setdefault(q.text, q.answers) == q.answers
                assert q.text.endswith("?") and "  " not in q.text
    assert len(answers) > 60


def test_sides_are_sides_of_the_image():
    for state in _states():
        for group in questions.candidates(*state):
            for q in group:
                if "left" in q.text.lower() or "right" in q.text.lower() or "side" in q.text:
                    assert "side of th" in q.text and "image" in q.text


def test_answers_agree_with_the_picture():
    finding = Finding("Nodule", "Right", "Upper")
    asked = {q.text: q.answer for g in questions.candidates("Chest", "X-Ray", finding) for q in g}
    assert asked["Is there a nodule on the right side of this chest image?"] == "Yes"
    assert asked["Is there a nodule on the left side of this chest image?"] == "No"
    assert asked["Is there an effusion in the chest?"] == "No"
    assert asked["Is the scan normal?"] == "No"
    assert asked["Is this an X-Ray?"] == "Yes"
    assert asked["Where in the image is the abnormality?"] == "Upper Right"
    normal = {q.text: q.answer for g in questions.candidates("Head", "CT", None) for q in g}
    assert normal["Is the scan normal?"] == "Yes"
    assert normal["Is there any abnormality in this image?"] == "No"
    assert not any("abnormality on" in q or "abnormality in the upper" in q for q in normal)


@pytest.fixture(scope="module")
def default_rows(tmp_path_factory):
    """Rows of a drawing of default size by split, images included: about eight seconds."""
    folder = raw.make_raw(tmp_path_factory.mktemp("phantom") / "raw")
    return {s: json.loads((folder / f"{s}.json").read_text()) for s in raw.SPLITS}


def test_question_alone_gives_little_away(default_rows):
    by_question = defaultdict(Counter)
    for r in default_rows["train"]:
        by_question[r["question"]][r["answer"]] += 1
    right = defaultdict(list)
    for r in default_rows["test"]:
        guess = by_question[r["question"]].most_common(1)[0][0]
        for key in ("all", r["answer_type"], r["content_type"]):
            right[key].append(guess == r["answer"])
    share = {k: np.mean(v) for k, v in right.items()}
    assert all(s <= 0.6 for s in share.values()), share
    assert share["all"] <= 0.5
    assert {"Modality", "Organ", "Abnormality", "Position", "Presence"} <= share.keys()
    assert share["all"] > 0.3  # it would be odd if guessing had become worse than chance


def test_answers_of_a_wording_are_used_equally_often(default_rows):
    for rows in default_rows.values():
        used = defaultdict(Counter)
        for r in rows:
            used[r["question"]][r["answer"]] += 1
        for text, counts in used.items():
            assert max(counts.values()) - min(counts.values()) <= 1, (text, counts)
            assert len(counts) > 1 or sum(counts.values()) == 1, (text, counts)


def test_size_and_mix(default_rows):
    assert [len({r["img_name"] for r in rows}) for rows in default_rows.values()] == [900, 120, 150]
    for rows in default_rows.values():
        per_image = Counter(r["img_name"] for r in rows)
        assert np.quantile(list(per_image.values()), 0.1) >= 4
        assert 5.5 < np.mean(list(per_image.values())) < 8
        closed = np.mean([r["answer_type"] == "CLOSED" for r in rows])
        assert 0.4 < closed < 0.7
        texts = Counter((r["img_name"], r["question"]) for r in rows)
        assert max(texts.values()) == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    build("phantom", data_dir=data_dir, num_images=(30, 6, 9), seed=3)
    return data_dir


def test_raw_folder_has_slakes_layout(small):
    folder = small / "downloads" / "phantom"
    read = slake_layout.read_folder(folder, "en")
    assert [s["images"] for s in read.report["splits"].values()] == [30, 6, 9]
    row = json.loads((folder / "train.json").read_text())[0]
    assert set(row) == set(slake_layout.KEYS)
    with PIL.Image.open(folder / "imgs" / row["img_name"]) as image:
        assert image.format == "JPEG" and image.size == (SIZE, SIZE) and image.mode == "L"
    labels = {b["label"] for boxes in read.boxes.values() for b in boxes}
    assert {"Brain", "Lung", "Heart", "Liver", "Kidney"} <= labels


def test_build_reads_back(small):
    builder = tfds.builder("phantom", data_dir=small)
    source = builder.as_data_source(split="test", decoders={"image": tfds.decode.SkipDecoding()})
    rows = json.loads((small / "downloads" / "phantom" / "test.json").read_text())
    assert {x["question_id"].decode() for x in source} == {str(r["qid"]) for r in rows}
    assert source[0]["image"][:2] == b"\xff\xd8"


def test_same_settings_reuse_and_other_settings_are_named(small, tmp_path, capsys):
    assert build("phantom", data_dir=small)["phantom"].is_dir()
    build("phantom", data_dir=small, num_images=[30, 6, 9])
    assert capsys.readouterr().out.count("already built") == 2
    with pytest.raises(DataError, match=r"already built with .*3.*asked for .*4.*--overwrite"):
        build("phantom", data_dir=small, seed=4)
    build("phantom", data_dir=tmp_path, manual_dir=small / "downloads" / "phantom")
    assert "test: " in capsys.readouterr().out
    assert not (tmp_path / "downloads").exists()


def test_seed_decides_every_byte(tmp_path):
    def content(name, seed):
        folder = raw.make_raw(tmp_path / name, num_images=(4, 2, 2), seed=seed)
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    first = content("a", 1)
    assert first == content("b", 1)
    other = content("a", 2)  # redrawn in place
    assert first.keys() == other.keys() and first != other


def test_make_raw_refuses(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="was not drawn by this program"):
        raw.make_raw(tmp_path / "mine", num_images=(1, 1, 1))
    with pytest.raises(DataError, match="expected at least one image for each"):
        raw.make_raw(tmp_path / "x", num_images=(5, 0, 1))
    with pytest.raises(DataError, match="expected at least one image for each"):
        raw.make_raw(tmp_path / "x", num_images=(5, 1))
    with pytest.raises(DataError, match="expected 0 or more"):
        raw.make_raw(tmp_path / "x", num_images=(1, 1, 1), seed=-1)
    assert not (tmp_path / "x").exists()
