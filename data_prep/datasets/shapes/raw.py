"""Draws pictures of shapes with their questions; `data_prep.datasets.drawn.raw` writes them as SLAKE is."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.datasets.drawn import raw as drawn
from data_prep.datasets.drawn.questions import Balancer
from data_prep.datasets.drawn.raw import SPLITS
from data_prep.datasets.shapes import questions
from data_prep.datasets.shapes.draw import draw, random_scene

__all__ = ["NUM_IMAGES", "SETTINGS_NAME", "SPLITS", "make_raw"]

NUM_IMAGES = (30000, 200, 300)
SETTINGS_NAME = "shapes.json"
# Part of the settings: raise it when drawings or questions change, so that old ones are redone.
DRAWING = 5


def _pictures(rng: np.random.Generator) -> Iterator[drawn.Picture]:
    balancer = Balancer()
    while True:
        asked: list[questions.Question] = []
        while not asked:  # rarely, all wordings that fit wait for another answer
            scene = random_scene(rng)
            asked = questions.ask(rng, balancer, scene)
        image, boxes = draw(rng, scene)
        yield drawn.Picture(image, boxes, asked, "None", "Drawing", quality=92)


def make_raw(
    folder: pathlib.Path | str,
    *,
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """`drawn.make_raw` of the shapes; num_images None: NUM_IMAGES."""
    return drawn.make_raw(
        folder,
        _pictures,
        name="shapes",
        drawing=DRAWING,
        default_num_images=NUM_IMAGES,
        num_images=num_images,
        seed=seed,
    )
