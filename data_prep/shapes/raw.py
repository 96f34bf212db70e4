"""Writes pictures of shapes as a folder in SLAKE's layout, so that they go through its reader."""

import io
import pathlib
import shutil
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from data_prep import files
from data_prep.phantom.questions import Balancer
from data_prep.shapes import questions
from data_prep.shapes.draw import draw, random_scene

NUM_IMAGES = (8000, 200, 300)
SPLITS = ("train", "validate", "test")
SETTINGS_NAME = "shapes.json"
# Part of the settings: raise it when drawings or questions change, so that old ones are redone.
DRAWING = 3


def _write_split(
    folder: pathlib.Path, split: str, n: int, rng: np.random.Generator, first: int, first_qid: int
) -> int:
    rows: list[dict[str, Any]] = []
    balancer = Balancer()
    for i in tqdm.trange(
        first, first + n, desc=f"drawing {split}", unit="", leave=False, disable=None
    ):
        asked: list[questions.Question] = []
        while not asked:  # rarely, all wordings that fit wait for another answer
            scene = random_scene(rng)
            asked = questions.ask(rng, balancer, scene)
        image, boxes = draw(rng, scene)
        image_folder = folder / "imgs" / f"shapes{i}"
        image_folder.mkdir(parents=True)
        jpeg = io.BytesIO()
        PIL.Image.fromarray(image).save(jpeg, "JPEG", quality=92)
        (image_folder / "source.jpg").write_bytes(jpeg.getvalue())
        files.write_json(image_folder / "detection.json", boxes)
        for q in asked:
            rows.append(
                {
                    "img_id": i,
                    "img_name": f"shapes{i}/source.jpg",
                    "question": q.text,
                    "answer": q.answer,
                    "q_lang": "en",
                    "location": "None",
                    "modality": "Drawing",
                    "answer_type": q.answer_type,
                    "base_type": "vqa",
                    "content_type": q.content_type,
                    "triple": ["vhead", "_", "_"],
                    "qid": first_qid + len(rows),
                }
            )
    files.write_json(folder / f"{split}.json", rows)
    return len(rows)


def make_raw(
    folder: pathlib.Path | str,
    *,
    num_images: tuple[int, ...] | list[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """Draws all splits into `folder`, or leaves it if it holds just these drawings.

    Args:
      folder: made by this function and replaced by it; appears only when whole.
      num_images: images in train, validate, test; None: NUM_IMAGES.
      seed: of all randomness; None: 0. The same settings give the same files.

    Returns:
      `folder`.

    Raises:
      DataError: a split without images, or `folder` holds something else.
    """
    folder = pathlib.Path(folder)
    settings = {
        "num_images": [int(n) for n in (NUM_IMAGES if num_images is None else num_images)],
        "seed": int(seed or 0),
        "drawing": DRAWING,
    }
    if len(settings["num_images"]) != len(SPLITS) or min(settings["num_images"]) < 1:
        raise files.DataError(
            f"num_images is {settings['num_images']}; expected at least one image for each of "
            f"{', '.join(SPLITS)}"
        )
    if settings["seed"] < 0:
        raise files.DataError(f"seed is {seed}; expected 0 or more")
    if folder.exists():
        if not (folder / SETTINGS_NAME).is_file():
            raise files.DataError(
                f"{folder}: exists and was not drawn by this program (no {SETTINGS_NAME}); "
                "move it away, or give it as --manual_dir to use it"
            )
        if files.read_json(folder / SETTINGS_NAME) == settings:
            return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    first = first_qid = 0
    for i, (split, n) in enumerate(zip(SPLITS, settings["num_images"], strict=True)):
        rng = np.random.default_rng([settings["seed"], i])
        first_qid += _write_split(part, split, n, rng, first, first_qid)
        first += n
    files.write_json(part / SETTINGS_NAME, settings)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder
