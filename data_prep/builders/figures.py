"""Images with captions and what is known about each, shared by `rocov2`, `roco_v1`, `medpix2`.

The reader of a release gives `Figure`s by split. With config `caption`, each becomes one row whose
answer is its caption; with config `qa`, it is joined by its id with question-answer pairs that somebody
made from the captions (`qa_files.read_qa`).
"""

import dataclasses
import pathlib
from typing import Any

from data_prep.files import DataError

SPLITS = ("train", "validate", "test")
CAPTION_AGAIN = "caption of another image too"  # flags all but the first figure with a caption


@dataclasses.dataclass(frozen=True)
class Figure:
    """One image of a release.

    image_id: unique over all splits.
    names: file names that its image may have, the likeliest first.
    features: texts by name; `caption` is one of them, "" without a usable one.
    no_caption: why there is no caption; "" if there is one.
    flags: what the report should mention about it.
    groups: (kind, key) of groups that must not be in two splits, such as ("case", "MPX1009").
    """

    image_id: str
    names: tuple[str, ...]
    features: dict[str, str]
    no_caption: str = ""
    flags: tuple[str, ...] = ()
    groups: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Release:
    """What a reader found.

    figures: split -> image id -> Figure, in the order of the files; a split may be absent.
    images: split -> folder or zip file with its images, or None if there is none.
    notes: counts for the report, JSON-able.
    optional: splits that may be absent or empty without anybody's leave, such as a test set that isn't released.
    """

    figures: dict[str, dict[str, Figure]]
    images: dict[str, pathlib.Path | None]
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    optional: tuple[str, ...] = ()


def has_text(caption: str) -> bool:
    """False for invisible text: spaces of all kinds, zero-width characters, dots."""
    return any(c.isalnum() for c in caption)


def first_there(folder: pathlib.Path, *names: str) -> pathlib.Path | None:
    """The first of `names` that exists in `folder`."""
    return next((p for n in names if (p := folder / n).exists()), None)


def add_figure(figures: dict[str, Figure], figure: Figure, where: str) -> None:
    """Adds a figure. DataError: its id is taken (`where` names file and row)."""
    if figure.image_id in figures:
        raise DataError(f"{where}: id {figure.image_id!r} comes twice; expected each once")
    figures[figure.image_id] = figure


def check_disjoint(release: Release, folder: pathlib.Path) -> None:
    """DataError if an image id is in two splits."""
    seen: dict[str, str] = {}
    for split, figures in release.figures.items():
        for image_id in figures:
            if image_id in seen:
                raise DataError(
                    f"{folder}: image {image_id!r} is in {seen[image_id]} and {split}; expected it in one split"
                )
            seen[image_id] = split
