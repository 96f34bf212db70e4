"""Facts asked anew about an image of another split, and captions of one article, are counted; others aren't."""

import json

import pytest

from data_prep import ledger
from data_prep.build import build
from data_prep.builders import leaks
from data_prep.datasets.roco import fake as roco_fake


def book(*rows):
    """{kind: pair → names} of rows (split, image, question, answer)."""
    books = ledger.Ledger(("train", "validate", "test"))
    named = [
        (split, image.encode().ljust(16), dict(question_id=f"{split}_{i}", question=q, answer=a))
        for i, (split, image, q, a) in enumerate(rows)
    ]
    leaks.book_questions(books, lambda: iter(named))
    shared = books.to_report()["shared"]
    return {k: {p: n["first"] for p, n in pairs.items() if n["count"]} for k, pairs in shared.items()}


def test_a_question_in_other_words_has_its_image_and_answer():
    found = book(
        ("train", "x", "Where is the mass?", "Left lung"),
        ("test", "x", "The mass is located where?", "left  LUNG"),
        ("test", "y", "Where is the mass?", "Left lung"),
        ("validate", "x", "where is the MASS?", "Right lung"),
    )
    assert found == {
        leaks.QUESTION: {"train+validate": ["validate_3"]},
        leaks.ANSWER: {"train+test": ["test_1"]},
    }


def test_yes_and_no_say_nothing_and_what_is_looked_for_is_told_as_nothing():
    assert book(("train", "x", "a?", "Yes"), ("test", "x", "b?", "yes")) == {leaks.QUESTION: {}, leaks.ANSWER: {}}
    assert book(("train", "x", "a?", "one"), ("train", "x", "a?", "one")) == {leaks.QUESTION: {}, leaks.ANSWER: {}}


@pytest.mark.parametrize(
    "a, b, same",
    [
        (
            "Brain MRI, coronal, showing hyperintensity of the temporal lobe",
            "Brain MRI axial showing hyperintensity of the temporal lobe (red arrow)",
            True,
        ),
        ("Chest X-ray of patient 1 with a large effusion", "Chest X-ray of patient 3 with a large effusion.", True),
        ("CT of the left kidney showing a large stone", "CT of the right kidney showing a large stone", True),
        ("CT of the kidney showing a large stone", "CT of the kidney showing a large cyst", False),
    ],
)
def test_captions_but_for_what_varies_within_an_article(a, b, same):
    assert (leaks.near_caption(a) == leaks.near_caption(b)) == same and leaks.near_caption(a)


@pytest.mark.parametrize("caption", ["Chest X-ray", "Axial CT image of the left lung", "Figure 1, 2 (arrows)", ""])
def test_captions_that_say_too_little_are_not_compared(caption):
    assert leaks.near_caption(caption) == ""


def test_the_builders_of_captions_tell_both(tmp_path):
    """One picture in train and test, asked about in either, and two captions that differ in their side."""
    raw = roco_fake.write_v2(tmp_path / "raw")
    train, test = (roco_fake.ids(s, 1)[0] for s in ("train", "test"))
    picture = (raw / "train" / f"{train}.jpg").read_bytes()
    (raw / "test" / f"{test}.jpg").write_bytes(picture)
    for split, image, side in (("train", train, "left"), ("test", test, "right")):
        path = raw / f"{split}_captions.csv"
        lines = path.read_text(encoding="utf-8").split("\n")
        place = next(i for i, line in enumerate(lines) if line.startswith(image))
        lines[place] = f"{image},A mass in the {side} lobe with several smaller nodules nearby"
        path.write_text("\n".join(lines), encoding="utf-8")
    pairs = [(train, "What is there?", "A mass in a lobe"), (test, "What does one see?", "a mass in a lobe")]
    pairs.append((roco_fake.ids("valid", 1)[0], "What?", "Nothing"))
    qa = [dict(image_id=i, question=q, answer=a) for i, q, a in pairs]
    (tmp_path / "qa.jsonl").write_text("".join(json.dumps(x) + "\n" for x in qa))
    for config, options in (("caption", None), ("qa", {"qa": str(tmp_path / "qa.jsonl")})):
        made = build("rocov2", manual_dir=raw, data_dir=tmp_path / "d", config=config, options=options)
        (folder,) = made.values()
        shared = json.loads((folder / "build_report.json").read_text())["shared"]
        assert shared[leaks.NEAR_CAPTION]["train+test"] == {"count": 1, "first": [test]}
        assert shared["caption"]["train+test"]["count"] == 0
        assert (leaks.ANSWER in shared) == (config == "qa")
    assert shared[leaks.ANSWER]["train+test"]["count"] == 1 and shared[leaks.QUESTION]["train+test"]["count"] == 0
