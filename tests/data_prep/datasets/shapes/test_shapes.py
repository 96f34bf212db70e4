"""The shapes: each where its scene says, questions that agree with the picture, a whole build."""

import dataclasses
import itertools
import json
from collections import Counter, defaultdict

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from data_prep.build import build
from data_prep.datasets.phantom import questions as phantom_questions
from data_prep.datasets.phantom.draw import FINDINGS, MODALITIES, Finding
from data_prep.datasets.shapes import questions, raw
from data_prep.datasets.shapes.draw import (
    COLOURS,
    SHAPES,
    SIZE,
    SIZES,
    TONES,
    Item,
    Scene,
    draw,
    random_scene,
)
from data_prep.datasets.slake import layout as slake_layout
from data_prep.files import DataError

GREY = list(itertools.product(SHAPES, SIZES, TONES))


@pytest.mark.parametrize("shape, size, tone", GREY)
def test_a_shape_is_where_and_how_its_scene_says(shape, size, tone):
    sides = itertools.product(questions.SIDES, questions.LEVELS, ("Plain", "Checks"))
    for seed, (side, level, background) in enumerate(sides):
        item = Item(shape, side, level, size, tone)
        drawn, ((box,)) = draw(np.random.default_rng(seed), Scene(True, background, (item,)))
        empty, none = draw(np.random.default_rng(seed), Scene(True, background, ()))
        assert drawn.shape == (SIZE, SIZE, 3) and drawn.dtype == np.uint8 and none == []
        assert np.ptp(drawn.astype(int), axis=-1).max() == 0  # grey
        # The same generator gives the same background, but another exposure: compare contrasts.
        changed = drawn[..., 0] / drawn[..., 0].mean() - empty[..., 0] / empty[..., 0].mean()
        changed = scipy.ndimage.uniform_filter(changed - np.median(changed), 3)  # less grain
        ((label, (x, y, w, h)),) = box.items()
        assert label == shape
        rows, columns = np.nonzero(np.abs(changed) > 0.2)
        centre = columns.mean() + 0.5, rows.mean() + 0.5
        assert abs(centre[0] - (x + w / 2)) < 4 and abs(centre[1] - (y + h / 2)) < 4
        assert (centre[0] < SIZE / 2) == (side == "Left")
        assert (centre[1] < SIZE / 2) == (level == "Upper")
        assert (changed[rows, columns].mean() > 0) == (tone == "Brighter")
        assert (w > 0.24 * SIZE) == (size == "Large")


def _unevenness(image):
    """float[SIZE, SIZE / 2]: left half less the mirrored right one, at the best shift of the axis.

    Smoothed; the axis leans, so that even a picture without shapes has some left."""
    smooth = scipy.ndimage.gaussian_filter(image[..., 0].astype(float), 3)
    halves = [(np.roll(smooth, d, axis=1)[:, 4:-4], d) for d in range(-4, 5)]
    flipped = [np.abs(h - h[:, ::-1]) for h, _ in halves]
    return min(flipped, key=np.mean)


def test_plates_are_even_but_for_their_shape():
    changes, sides = [], []
    for seed in range(40):
        side, tone = ("Left", "Right")[seed % 2], TONES[seed // 2 % 2]
        item = Item("Circle", side, "Upper", "Large", tone)
        drawn, _ = draw(np.random.default_rng(seed), Scene(True, "Plates", (item,)))
        empty, none = draw(np.random.default_rng(seed), Scene(True, "Plates", ()))
        assert none == []
        changes.append((_unevenness(drawn).mean(), _unevenness(empty).mean()))
        delta = drawn[..., 0].astype(float) / drawn.mean() - empty[..., 0] / empty.mean()
        weight = np.abs(scipy.ndimage.uniform_filter(delta, 5))
        x = (weight**3 * np.arange(SIZE)).sum() / (weight**3).sum()
        sides.append((x < SIZE / 2) == (side == "Left"))
    with_shape, without = np.mean(changes, axis=0)
    assert with_shape > 1.5 * without
    assert np.mean(sides) > 0.95


@pytest.mark.parametrize("colour", COLOURS)
def test_colours_are_told_apart(colour):
    item = Item("Circle", "Left", "Upper", "Large", colour)
    for seed in range(10):
        image, ((box,)) = draw(np.random.default_rng(seed), Scene(False, "Plain", (item,)))
        ((x, y, w, h),) = box.values()
        cx, cy = int(x + w / 2), int(y + h / 2)
        found = image[cy - 1 : cy + 2, cx - 1 : cx + 2].mean(axis=(0, 1)) / 255
        distance = {k: np.abs(found - v).sum() for k, v in COLOURS.items()}
        assert min(distance, key=distance.get) == colour


def test_draw_refuses_unknown_words():
    rng = np.random.default_rng(0)
    item = Item("Circle", "Left", "Upper", "Large", "Red")
    with pytest.raises(ValueError, match="grey picture has no 'Red'"):
        draw(rng, Scene(True, "Plain", (item,)))
    with pytest.raises(ValueError, match="unknown colour 'Brighter'"):
        draw(rng, Scene(False, "Plain", (dataclasses.replace(item, paint="Brighter"),)))
    with pytest.raises(ValueError, match="unknown shape 'Heart'"):
        draw(rng, Scene(False, "Plain", (dataclasses.replace(item, shape="Heart"),)))
    with pytest.raises(ValueError, match="unknown background 'Sky'"):
        draw(rng, Scene(False, "Sky", ()))


def _many(n=600):
    rng = np.random.default_rng(0)
    return [random_scene(rng) for _ in range(n)]


def test_shapes_of_a_scene_have_quadrants_of_their_own():
    for scene in _many():
        assert len({(i.side, i.level) for i in scene.items}) == len(scene.items) <= 2
    assert {len(s.items) for s in _many()} == {0, 1, 2}


def test_a_wording_has_one_set_of_answers_and_the_answer_is_in_it():
    answers = {}
    for scene in _many():
        for group in questions.candidates(scene):
            for q in group:
                assert q.answer in q.answers and len(set(q.answers)) == len(q.answers) >= 2
                assert answers.setdefault(q.text, q.answers) == q.answers
    assert 100 < len(answers) < 200


def test_answers_agree_with_the_picture():
    scene = Scene(True, "Dots", (Item("Ring", "Right", "Upper", "Small", "Darker"),))
    asked = {q.text: q.answer for group in questions.candidates(scene) for q in group}
    for text, answer in {
        "Is there a ring on the right side of this image?": "Yes",
        "Is there a ring on the left side of this image?": "No",
        "Is there a star in the image?": "No",
        "Is the picture empty?": "No",
        "How many shapes are in this image?": "1",
        "Where in the image is the ring?": "Upper Right",
        "Which shape is in the upper right of the image?": "Ring",
        "Is the shape in the upper or the lower half of the image?": "Upper",
        "Is the ring brighter or darker than the background?": "Darker",
        "Is the ring large or small?": "Small",
        "What background does this image have?": "Dots",
        "Is this a gray image?": "Yes",
    }.items():
        assert asked[text] == answer, text
    assert "What color is the ring?" not in asked and "Is this image even?" not in asked
    scene = dataclasses.replace(scene, background="Plates")
    asked = {q.text: q.answer for group in questions.candidates(scene) for q in group}
    for text, answer in {
        "Is this image even?": "No",
        "Is anything odd in this picture?": "Yes",
        "Where in the image is the odd thing?": "Upper Right",
        "Does this image show a darker shape?": "Yes",
        "Is there a darker shape on the left side of this image?": "No",
        "Is there a brighter shape in the upper half of this image?": "No",
    }.items():
        assert asked[text] == answer, text
    # Two of a kind: "the ring" would be ambiguous.
    scene = dataclasses.replace(scene, items=(*scene.items, Item("Ring", "Left", "Lower", "Large", "Brighter")))
    asked = {q.text: q.answer for group in questions.candidates(scene) for q in group}
    assert not any("the ring" in text or "the shape" in text for text in asked)


def test_nothing_medical_is_asked():
    """The base is to know the answers that phantoms share with everything, none of their own."""
    states = [
        (r, m, f)
        for r in FINDINGS
        for m in MODALITIES[r]
        for f in (None, *(Finding(k, "Left", "Upper") for k in FINDINGS[r]))
    ]
    medical = {q.answer for s in states for g in phantom_questions.candidates(*s) for q in g}
    everyday = {"Yes", "No", *questions.SIDES, *questions.LEVELS, *questions.QUADRANTS}
    words = {w.lower() for w in medical - everyday} | {"scan", "abnormality", "finding", "normal"}
    for scene in _many(300):
        for group in questions.candidates(scene):
            for q in group:
                assert not words & {w.strip("?,.").lower() for w in q.text.split()}
                assert set(q.answers) & medical <= everyday


def test_descriptions_tell_the_whole_picture():
    one = Scene(True, "Plain", (Item("Ring", "Right", "Upper", "Small", "Darker"),))
    told = {q.text: q.answer for q in questions.descriptions(one)}
    assert told["What does this image show?"] == "Upper Right Small Darker Ring"
    lower = Item("Star", "Left", "Lower", "Large", "Brighter")
    two = dataclasses.replace(one, items=(lower, *one.items))
    told = {q.text: q.answer for q in questions.descriptions(two)}
    assert told["Which shapes are where?"] == "Upper Right Ring, Lower Left Star"
    told = {q.text: q.answer for q in questions.descriptions(Scene(True, "Plain", ()))}
    assert set(told.values()) == {"None"}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("data")
    build("shapes", data_dir=data_dir, num_images=(300, 20, 60), seed=3)
    return data_dir


def test_build_and_balance(small):
    folder = small / "downloads" / "shapes"
    read = slake_layout.read_folder(folder, "en")
    assert [s["images"] for s in read.report["splits"].values()] == [300, 20, 60]
    rows = {s: json.loads((folder / f"{s}.json").read_text()) for s in raw.SPLITS}
    with PIL.Image.open(folder / "imgs" / rows["train"][0]["img_name"]) as image:
        assert image.format == "JPEG" and image.size == (SIZE, SIZE)
    used = defaultdict(Counter)
    for r in rows["train"]:
        if r["content_type"] != "Description":
            used[r["question"]][r["answer"]] += 1
    for text, counts in used.items():
        assert max(counts.values()) - min(counts.values()) <= 1, (text, counts)
    known = [r for r in rows["test"] if r["question"] in used]
    right = [used[r["question"]].most_common(1)[0][0] == r["answer"] for r in known]
    assert np.mean(right) < 0.6  # the question alone says little
    assert 6 < len(rows["train"]) / 300 < 9


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
    with pytest.raises(DataError, match="expected 0 or more"):
        raw.make_raw(tmp_path / "x", num_images=(1, 1, 1), seed=-1)
    assert not (tmp_path / "x").exists()
