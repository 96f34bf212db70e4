"""Draws pictures of shapes, and asks the questions of `shapes` and for words; see README.md."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.datasets.drawn import raw as drawn
from data_prep.datasets.drawn.questions import Balancer
from data_prep.datasets.drawn.raw import SPLITS
from data_prep.datasets.shapes import questions
from data_prep.datasets.shapes.draw import draw, random_scene
from data_prep.datasets.shapes_words.words import words

__all__ = ["NUM_IMAGES", "SETTINGS_NAME", "SPLITS", "make_raw"]

NUM_IMAGES = (3500, 60, 60)
SETTINGS_NAME = "shapes_words.json"
# Part of the settings: raise it when drawings or questions change, so that old ones are redone.
DRAWING = 1


def _pictures(rng: np.random.Generator) -> Iterator[drawn.Picture]:
    balancer = Balancer()
    while True:
        scene = random_scene(rng)
        asked = [*questions.ask(rng, balancer, scene), *words(rng)]
        image, boxes = draw(rng, scene)
        yield drawn.Picture(image, boxes, asked, "None", "Drawing", quality=92)


def make_raw(
    folder: pathlib.Path | str,
    *,
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """`drawn.make_raw` of the shapes with words; num_images None: NUM_IMAGES."""
    return drawn.make_raw(
        folder,
        _pictures,
        name="shapes_words",
        drawing=DRAWING,
        default_num_images=NUM_IMAGES,
        num_images=num_images,
        seed=seed,
    )
