"""Reads what to ask about which images: a folder, a table of questions, a mask."""

import functools
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from paligemma_med.pp import images, own_rows, own_table


def read_mask(path) -> np.ndarray:
    """bool[H, W], True where an image file is lighter than mid-grey."""
    return images.read_file(path, "--mask").max(-1) > 127


class Asked(NamedTuple):
    """One question: about which image, what its table gives as the answer ("" for none), and how to read the image.

    content: the image as encoded bytes; ValueError or OSError says why there is none. choices: {"choice_a": text, …}.
    """

    name: str
    question: str
    given: str
    content: Callable[[], bytes]
    choices: Mapping[str, str] = {}


def read_questions(path, folder, *, columns=None, choose=None) -> list[Asked]:
    """The questions of one's own table, see `pp.own_table.open_table`, whose images are below `folder`.

    Rows that can't be asked are told on stderr, with their lines. One whose image isn't there stays: its line of the
    index says so.

    Raises:
      ValueError: no such table, a column that it lacks, not a row that can be used.
    """
    try:
        table = own_table.open_table(path, images=folder, columns=columns, choose=choose, missing_images=True)
    except OSError as e:
        raise ValueError(f"--questions {path}: {e.strerror}.") from None
    for sentence in table.summary():
        if not sentence.startswith(f"{table.name}: made up"):  # which nobody sees here
            print(sentence, file=sys.stderr)
    out = []
    for i in range(len(table)):
        row = table[i]
        read = functools.partial(table.image_bytes, i)
        choices = {key: text for key, text in row.items() if own_rows.CHOICE.fullmatch(key)}
        out.append(Asked(row["image"] or row["image_id"], row["question"], row["answer"], read, choices))
    return out


def about_images(folder, questions, choices=None) -> list[Asked]:
    """Each question about each image file below a folder."""
    return [
        Asked(name, question, "", functools.partial(pathlib.Path(folder, name).read_bytes), choices or {})
        for name in images_in(folder)
        for question in questions
    ]


def images_in(folder) -> list[str]:
    """Names of the image files below a folder, sorted; DICOM files need no suffix."""
    root = pathlib.Path(folder)
    found = sorted(p for p in root.rglob("*") if images.is_image_file(p))
    if not found:
        raise ValueError(f"--image_dir {folder}: no image files ({', '.join(images.SUFFIXES)}, or DICOM by content).")
    return [str(p.relative_to(root)) for p in found]
