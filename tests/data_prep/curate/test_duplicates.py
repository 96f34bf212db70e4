"""Near duplicates against all pairs compared, in bounded memory."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.curate.duplicates import NearDuplicates, jaccard, shingles


def row(question, answer="Yes", image="i", **kw):
    return {"question": question, "answer": answer, "image_id": image, **kw}


def kept(near, rows):
    """Numbers of the rows that stay."""
    stay = []
    for i, r in enumerate(rows):
        like, _ = near.find(r)
        if like is None:
            near.add(r, str(i))
            stay.append(i)
    return stay


@given(st.sets(st.integers(0, 50), min_size=1), st.sets(st.integers(0, 50), min_size=1))
def test_jaccard(a, b):
    found = jaccard(*(np.array(sorted(x), np.uint32) for x in (a, b)))
    assert found == pytest.approx(len(a & b) / len(a | b))


def test_shingles():
    assert len(shingles("a b c d", 2)) == 3
    assert len(shingles("a b a b a", 2)) == 2
    assert shingles("Is it BIG?", 2).tolist() == shingles("is it big", 2).tolist()
    assert len(shingles("", 2)) == len(shingles("one", 2)) == 1


def test_question_and_answer_are_not_mixed_up():
    near = NearDuplicates(threshold=0.9)
    near.add(row("Left lung", "Right lung"), "0")
    assert near.find(row("Right lung", "Left lung"))[1] == 0
    assert near.find(row("left lung!", "right lung"))[0] == "0"


@pytest.mark.parametrize(
    "within, found",
    [
        ("image", (True, False, False)),
        ("case", (True, True, False)),
        ("all", (True, True, True)),
    ],
)
def test_where_they_are_looked_for(within, found):
    near = NearDuplicates(within=within)
    near.add(row("Where is the mass seen?", "In the liver", "i1", case_id="c1"), "first")
    others = [("i1", "c1"), ("i2", "c1"), ("i3", "c2")]
    for (image, case), is_found in zip(others, found, strict=True):
        like, similarity = near.find(row("Where is the mass seen?", "in the liver.", image, case_id=case))
        assert (like == "first") == is_found and (similarity == 1) == is_found


def test_the_first_of_those_equally_like():
    near = NearDuplicates(threshold=0.3)
    for name in ("first", "second"):
        near.add(row("Where is the mass seen?", "In the liver"), name)
    assert near.find(row("Where is the mass seen?", "In the liver")) == ("first", 1.0)


def test_case_without_a_case_is_the_image():
    near = NearDuplicates(within="case")
    near.add(row("Where is the mass?", image="i1"), "0")
    assert near.find(row("Where is the mass?", image="i1"))[0] == "0"
    assert near.find(row("Where is the mass?", image="i2"))[0] is None


def corpus(n, seed=0):
    """Sentences of which many are others with a word changed."""
    rng = random.Random(seed)
    vocabulary = [f"w{i}" for i in range(300)]
    texts = []
    for _ in range(n):
        if texts and rng.random() < 0.5:
            text = list(rng.choice(texts))
            for _ in range(rng.randrange(4)):
                text[rng.randrange(len(text))] = rng.choice(vocabulary)
        else:
            text = rng.choices(vocabulary, k=rng.randrange(12, 30))
        texts.append(text)
    return [row(" ".join(t[:8]), " ".join(t[8:]), f"i{i % 7}") for i, t in enumerate(texts)]


def brute(rows, threshold, same_image):
    """Row by row, everything kept so far is compared."""

    def runs(r):
        out = set()
        for field in ("question", "answer"):
            w = r[field].split()
            out |= {(field, *w[i : i + 2]) for i in range(max(1, len(w) - 1))}
        return out

    stay, seen = [], []
    for i, r in enumerate(rows):
        mine = runs(r)
        near = [
            s
            for image, s in seen
            if (not same_image or image == r["image_id"]) and len(s & mine) / len(s | mine) >= threshold
        ]
        if not near:
            stay.append(i)
            seen.append((r["image_id"], mine))
    return stay


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_within_images_it_is_all_pairs(threshold):
    rows = corpus(400)
    stay = kept(NearDuplicates(within="image", threshold=threshold), rows)
    assert stay == brute(rows, threshold, same_image=True) and len(stay) < 400


def test_over_all_rows_it_never_errs_and_finds_nearly_all():
    rows = corpus(600)
    near = NearDuplicates(within="all", threshold=0.8)
    stay, wanted = kept(near, rows), brute(rows, 0.8, same_image=False)
    assert len(wanted) < 500
    # What goes is really near something kept; what should go goes in nearly all cases.
    assert len(set(stay) - set(wanted)) <= 0.05 * (600 - len(wanted))
    assert len(set(wanted) - set(stay)) <= 0.02 * 600  # a kept row that was missed took its place


def test_same_rows_same_result():
    rows = corpus(200)
    assert kept(NearDuplicates(within="all"), rows) == kept(NearDuplicates(within="all"), rows)


@pytest.mark.parametrize("within", ["image", "all"])
def test_memory_is_bounded_and_the_oldest_is_forgotten(within):
    near = NearDuplicates(within=within, max_rows=10)
    for i in range(100):
        near.add(row(f"unique{i} word{i} text{i}"), str(i))
        assert len(near) == min(i + 1, 10)
    assert sum(map(len, near._buckets.values())) <= 80
    assert near.find(row("unique95 word95 text95"))[0] == "95"
    assert near.find(row("unique5 word5 text5"))[0] is None


@pytest.mark.parametrize(
    "settings",
    [
        dict(within="patient"),
        dict(threshold=0),
        dict(threshold=1.1),
        dict(shingle=0),
        dict(max_rows=0),
        dict(fields=[]),
    ],
)
def test_wrong_settings(settings):
    with pytest.raises(ValueError, match="expected"):
        NearDuplicates(**settings)
