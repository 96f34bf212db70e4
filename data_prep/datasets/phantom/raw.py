"""Draws phantoms with their questions; `data_prep.datasets.drawn.raw` writes them in SLAKE's layout."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from data_prep.datasets.drawn import questions as drawn_questions
from data_prep.datasets.drawn import raw as drawn
from data_prep.datasets.drawn.raw import SPLITS
from data_prep.datasets.phantom import questions
from data_prep.datasets.phantom.draw import FINDINGS, MODALITIES, Finding, draw

__all__ = ["NUM_IMAGES", "SETTINGS_NAME", "SPLITS", "make_raw"]

NUM_IMAGES = (900, 120, 150)
SETTINGS_NAME = "phantom.json"
# Part of the settings: raise it when the drawings or questions change, so that old ones are redone.
DRAWING = 1


def _states() -> list[tuple[str, Finding | None]]:
    """Each region with every finding at every place four times in twelve, and five normal images.

    An effusion is always low and counts double, so that kinds are equally frequent.
    """
    states: list[tuple[str, Finding | None]] = []
    for region, kinds in FINDINGS.items():
        for kind, side, level in itertools.product(kinds, drawn_questions.SIDES, drawn_questions.LEVELS):
            level = "Lower" if kind == "Effusion" else level
            states.append((region, Finding(kind, side, level)))
        states += [(region, None)] * 5
    return states


def _plan(rng: np.random.Generator) -> Iterator[tuple[str, Finding | None]]:
    """An endless stream of states in random order, all equally often (within one)."""
    states = _states()
    while True:
        for i in rng.permutation(len(states)):
            yield states[i]


def _pictures(rng: np.random.Generator) -> Iterator[drawn.Picture]:
    balancer = drawn_questions.Balancer()
    plan = _plan(rng)
    while True:
        asked: list[drawn_questions.Question] = []
        while not asked:  # rarely, all wordings that fit need another answer next
            region, finding = next(plan)
            modality = str(rng.choice(MODALITIES[region]))
            asked = questions.ask(rng, balancer, region, modality, finding)
        image, boxes = draw(rng, region, modality, finding)
        quality = int(rng.integers(85, 96))
        yield drawn.Picture(image, boxes, asked, region, modality, quality)


def make_raw(
    folder: pathlib.Path | str,
    *,
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """`drawn.make_raw` of the phantoms; num_images None: NUM_IMAGES."""
    return drawn.make_raw(
        folder,
        _pictures,
        name="phantom",
        drawing=DRAWING,
        default_num_images=NUM_IMAGES,
        num_images=num_images,
        seed=seed,
    )
