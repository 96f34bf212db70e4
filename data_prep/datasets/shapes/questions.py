"""Asks questions about pictures of shapes, in the frames that questions about radiographs have.

What, is there, where, on which side, in which half, how many: the answers are the same words that
radiology needs (Yes, No, Left, Upper Right, …), the things asked for are not. As with the phantoms,
the answers of each wording are used equally often, so that the question alone says little.
"""

import itertools
from collections.abc import Iterator

import numpy as np

from data_prep.datasets.drawn.questions import LEVELS, QUADRANTS, SIDES, YES_NO, Balancer, Question
from data_prep.datasets.shapes.draw import (
    BACKGROUNDS,
    COLOURS,
    MAX_SHAPES,
    SHAPES,
    SIZES,
    TONES,
    Item,
    Scene,
)

MAX_QUESTIONS = 6  # of a picture, beside its descriptions
COUNTS = tuple(str(n) for n in range(MAX_SHAPES + 1))


def _yes_no(texts: list[tuple[str, bool]], content_type: str) -> list[Question]:
    return [Question(t, "Yes" if yes else "No", YES_NO, content_type) for t, yes in texts]


def _opens(texts: list[str], answer: str, answers: tuple, content_type: str) -> list[Question]:
    return [Question(t, answer, answers, content_type) for t in texts]


def candidates(scene: Scene) -> Iterator[list[Question]]:
    """Yields groups of questions that fit a picture; one of each group is asked if it can be."""
    items = scene.items
    yield [
        *_opens(
            ["What background does this image have?", "Which background was used here?"],
            scene.background,
            BACKGROUNDS,
            "Background",
        ),
        *_yes_no(
            [
                (f"Does the picture contain {b.lower()}?", b == scene.background)
                for b in BACKGROUNDS
                if b not in ("Plain", "Plates")
            ]
            + [("Is the background plain?", scene.background == "Plain"), ("Is this a gray image?", scene.grey)],
            "Background",
        ),
    ]
    yield [
        *_opens(
            ["How many shapes are in this image?", "How many shapes does the picture show?"],
            str(len(items)),
            COUNTS,
            "Quantity",
        ),
        *_yes_no(
            [
                ("Is the picture empty?", not items),
                ("Is there any shape in this image?", bool(items)),
                ("Are there shapes in this picture?", bool(items)),
                ("Is there more than one shape in this image?", len(items) > 1),
            ],
            "Quantity",
        ),
    ]
    if scene.background == "Plates":
        yield _yes_no(
            [("Is this image even?", not items), ("Is anything odd in this picture?", bool(items))], "Evenness"
        )

    presence, placed = [], []
    for shape in SHAPES:
        here = [i for i in items if i.shape == shape]
        noun = f"a {shape.lower()}"
        presence.append((f"Is there {noun} in the image?", bool(here)))
        presence.append((f"Does this image show {noun}?", bool(here)))
        for side in SIDES:
            text = f"Is there {noun} on the {side.lower()} side of this image?"
            placed.append((text, any(i.side == side for i in here)))
        for level in LEVELS:
            text = f"Is there {noun} in the {level.lower()} half of this image?"
            placed.append((text, any(i.level == level for i in here)))
    bright = []
    for tone in TONES if scene.grey else ():
        here = [i for i in items if i.paint == tone]
        noun = f"a {tone.lower()} shape"
        bright.append((f"Does this image show {noun}?", bool(here)))
        for side in SIDES:
            text = f"Is there {noun} on the {side.lower()} side of this image?"
            bright.append((text, any(i.side == side for i in here)))
        for level in LEVELS:
            text = f"Is there {noun} in the {level.lower()} half of this image?"
            bright.append((text, any(i.level == level for i in here)))
    yield _yes_no(presence, "Presence")
    yield _yes_no(placed, "Presence")
    if bright:
        yield _yes_no(bright, "Presence")

    for quadrant in QUADRANTS:
        found = next((i.shape for i in items if f"{i.level} {i.side}" == quadrant), "None")
        yield _opens([f"Which shape is in the {quadrant.lower()} of the image?"], found, (*SHAPES, "None"), "Shape")
    for item in items:
        if [i.shape for i in items].count(item.shape) == 1:
            yield from _about(f"the {item.shape.lower()}", scene, item)
    if len(items) == 1:
        asked = ["What is the main shape in this image?", "What shape is visible?", "Which shape does this image show?"]
        yield _opens(asked, items[0].shape, SHAPES, "Shape")
        yield from _about("the shape", scene, items[0])
        if scene.background == "Plates":
            yield from itertools.islice(_about("the odd thing", scene, items[0]), 1)


def _about(noun, scene, item) -> Iterator[list[Question]]:
    """Groups of questions about one item that `noun` names without doubt."""
    where = [
        *_opens(
            [f"On which side of the image is {noun}?", f"Which side of the image has {noun}, left or right?"],
            item.side,
            SIDES,
            "Position",
        ),
        *_opens(
            [
                f"Is {noun} in the upper or the lower half of the image?",
                f"At which level of the image is {noun}, upper or lower?",
            ],
            item.level,
            LEVELS,
            "Position",
        ),
        *_opens(
            [f"Where in the image is {noun}?", f"In which quadrant is {noun}?"],
            f"{item.level} {item.side}",
            QUADRANTS,
            "Position",
        ),
        *_yes_no(
            [(f"Is {noun} on the {s.lower()} side of the image?", s == item.side) for s in SIDES]
            + [(f"Is {noun} in the {v.lower()} half of the image?", v == item.level) for v in LEVELS],
            "Position",
        ),
    ]
    yield where
    looks = _opens([f"Is {noun} large or small?"], item.size, SIZES, "Size")
    if scene.grey:
        looks += _opens([f"Is {noun} brighter or darker than the background?"], item.paint, TONES, "Brightness")
    else:
        looks += _opens([f"What color is {noun}?"], item.paint, tuple(COLOURS), "Color")
    yield looks


def descriptions(scene: Scene) -> Iterator[Question]:
    """Yields questions whose answer tells the whole picture, from upper left to lower right.

    A yes teaches a model one bit, these a dozen: without them, learning to look takes several times
    as long. Their answers can't be counted out, so they are asked of every picture.
    """

    def question(text: str, parts: list[str]) -> Question:
        return Question(text, ", ".join(parts) or "None", (), "Description")

    def look(item: Item) -> str:
        return f"{item.size} {item.paint} {item.shape}"

    items = sorted(scene.items, key=lambda i: QUADRANTS.index(f"{i.level} {i.side}"))
    places = [f"{i.level} {i.side}" for i in items]
    if len(items) == 1:
        yield question("What does this image show?", [f"{places[0]} {look(items[0])}"])
        yield question("What is where in this image?", [f"{places[0]} {items[0].shape}"])
        yield question("How does the shape look?", [look(items[0])])
    else:
        yield question("Which shapes are where?", [f"{p} {i.shape}" for p, i in zip(places, items)])
        yield question("What shapes are shown?", [i.shape for i in items])
        yield question("Where are the shapes?", places)


def ask(rng: np.random.Generator, balancer: Balancer, scene: Scene) -> list[Question]:
    """About eight different questions about one picture."""
    chosen: dict[str, Question] = {}
    groups = list(candidates(scene))
    for i in rng.permutation(len(groups))[:MAX_QUESTIONS]:
        group = groups[i]
        fresh = [q for q in group if q.text not in chosen]
        if question := balancer.choose(rng, fresh):
            chosen[question.text] = question
    return [*chosen.values(), *descriptions(scene)]
