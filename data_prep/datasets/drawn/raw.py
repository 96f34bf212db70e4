"""Drawn data sets (phantom, shapes): a stream of pictures with questions → SLAKE's layout.

Each data set draws and asks for itself; this file writes the result so that SLAKE's reader can read it.
"""

import dataclasses
import io
import itertools
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image
import tqdm

from data_prep import files

SPLITS = ("train", "validate", "test")


@dataclasses.dataclass(frozen=True)
class Picture:
    """One image and its questions.

    image: uint8[H, W] or [H, W, 3]. boxes: as in SLAKE's detection.json. questions: objects with
    text, answer, answer_type, content_type. quality: of the JPEG.
    """

    image: np.ndarray
    boxes: list[dict[str, list[float]]]
    questions: list[Any]
    location: str
    modality: str
    quality: int


def make_raw(
    folder: pathlib.Path | str,
    pictures: Callable[[np.random.Generator], Iterator[Picture]],
    *,
    name: str,
    drawing: int,
    default_num_images: Sequence[int],
    num_images: Sequence[int] | None = None,
    seed: int | None = None,
) -> pathlib.Path:
    """Draws all splits into `folder`, unless it holds these drawings already.

    Args:
      folder: written, and replaced, by this function; appears only when complete.
      pictures: random numbers of a split → its pictures, without end.
      name: of the data set; its images are NAME0, NAME1, …, its settings NAME.json.
      drawing: number of the current drawings; another number in `folder` draws anew.
      default_num_images, num_images: images in train, validate, test.
      seed: of all randomness; None: 0. The same settings give the same files.

    Returns:
      `folder`.

    Raises:
      DataError: a split without images, or `folder` holds something else.
    """
    folder = pathlib.Path(folder)
    settings_name = f"{name}.json"
    settings = {
        "num_images": [int(n) for n in (default_num_images if num_images is None else num_images)],
        "seed": int(seed or 0),
        "drawing": drawing,
    }
    if len(settings["num_images"]) != len(SPLITS) or min(settings["num_images"]) < 1:
        raise files.DataError(
            f"num_images is {settings['num_images']}; expected at least one image for each of {', '.join(SPLITS)}"
        )
    if settings["seed"] < 0:
        raise files.DataError(f"seed is {seed}; expected 0 or more")
    if folder.exists():
        if not (folder / settings_name).is_file():
            raise files.DataError(
                f"{folder}: exists and was not drawn by this program (no {settings_name}); "
                "move it away, or give it as --manual_dir to use it"
            )
        if files.read_json(folder / settings_name) == settings:
            return folder
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    first = first_qid = 0
    for i, (split, n) in enumerate(zip(SPLITS, settings["num_images"], strict=True)):
        rng = np.random.default_rng([settings["seed"], i])
        first_qid += _write_split(part, split, n, pictures(rng), name, first, first_qid)
        first += n
    files.write_json(part / settings_name, settings)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    return folder


def _write_split(
    folder: pathlib.Path,
    split: str,
    n: int,
    pictures: Iterator[Picture],
    name: str,
    first: int,
    first_qid: int,
) -> int:
    """Writes n images, numbered from `first`, and their questions; returns the number of questions."""
    rows: list[dict[str, Any]] = []
    progress = tqdm.tqdm(itertools.islice(pictures, n), desc=f"drawing {split}", total=n, leave=False, disable=None)
    for i, picture in enumerate(progress, start=first):
        image_folder = folder / "imgs" / f"{name}{i}"
        image_folder.mkdir(parents=True)
        jpeg = io.BytesIO()
        PIL.Image.fromarray(picture.image).save(jpeg, "JPEG", quality=picture.quality)
        (image_folder / "source.jpg").write_bytes(jpeg.getvalue())
        files.write_json(image_folder / "detection.json", picture.boxes)
        for q in picture.questions:
            rows.append(
                {
                    "img_id": i,
                    "img_name": f"{name}{i}/source.jpg",
                    "question": q.text,
                    "answer": q.answer,
                    "q_lang": "en",
                    "location": picture.location,
                    "modality": picture.modality,
                    "answer_type": q.answer_type,
                    "base_type": "vqa",
                    "content_type": q.content_type,
                    "triple": ["vhead", "_", "_"],
                    "qid": first_qid + len(rows),
                }
            )
    files.write_json(folder / f"{split}.json", rows)
    return len(rows)
