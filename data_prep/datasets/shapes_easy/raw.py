"""Draws single shapes on a plain ground and only asks for descriptions; see README.md."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.datasets.drawn import raw as drawn
from data_prep.datasets.drawn.raw import SPLITS
from data_prep.datasets.shapes import questions
from data_prep.datasets.shapes.draw import draw, easy_scene
from data_prep.datasets.shapes.raw import DRAWING

__all__ = ["NUM_IMAGES", "SETTINGS_NAME", "SPLITS", "make_raw"]

NUM_IMAGES = (10000, 50, 50)
SETTINGS_NAME = "shapes_easy.json"


def _pictures(rng: np.random.Generator) -> Iterator[drawn.Picture]:
    while True:
        scene = easy_scene(rng)
        image, boxes = draw(rng, scene)
        asked = list(questions.descriptions(scene))
        yield drawn.Picture(image, boxes, asked, "None", "Drawing", quality=92)


def make_raw(
    folder: pathlib.Path | str,
    *,
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """`drawn.make_raw` of the easy shapes; num_images None: NUM_IMAGES."""
    return drawn.make_raw(
        folder,
        _pictures,
        name="shapes_easy",
        drawing=DRAWING,
        default_num_images=NUM_IMAGES,
        num_images=num_images,
        seed=seed,
    )
