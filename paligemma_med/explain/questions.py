"""Reads what to ask about which images: a folder, a table of questions, a mask."""

import os
import pathlib

import numpy as np

from paligemma_med.pp import image_cells, images, tables


def read_mask(path) -> np.ndarray:
    """bool[H, W], True where an image file is lighter than mid-grey."""
    return images.read_file(path, "--mask").max(-1) > 127


def read_questions(path, folder) -> list[tuple[str, ...]]:
    """[(image's path below `folder`, question)] from a table with columns image and question, see `pp.tables`.

    If it has a column answer, too: [(image's path, question, answer)].

    Raises:
      ValueError: a column is missing, a field is empty, or an image's path leaves the folder; names
        the file and line.
    """
    try:
        table = tables.read_file(path, ("image", "question"))
    except OSError as e:
        raise ValueError(f"--questions {path}: {e.strerror}.") from None
    out = []
    for line, row in table:
        image, question = row["image"].strip(), row["question"].strip()
        if not image or not question:
            raise ValueError(f"{path} line {line}: image or question is empty.")
        if not all(_inside(folder, part) for part in _names(image, f"{path} line {line}", folder)):
            raise ValueError(f"{path} line {line}: {image!r} is not below {folder}.")
        given = [cell.strip() for column, cell in row.items() if column.lower() == "answer"]
        out.append((image, question, *given))
    if not out:
        raise ValueError(f"{path}: no rows below its header.")
    return out


def _names(cell, where, folder):
    if os.path.isfile(os.path.join(folder, cell)):
        return [cell]
    try:
        return image_cells.sources(cell, folder)
    except image_cells.OutsideError:
        return [os.pardir]
    except ValueError as e:
        raise ValueError(f"{where}: image {e}") from None


def _inside(folder, name):
    if "\0" in name or os.path.isabs(name):
        return False
    root = os.path.realpath(folder)
    return os.path.realpath(os.path.join(root, name)).startswith(os.path.join(root, ""))


def images_in(folder) -> list[str]:
    """Names of the image files below a folder, sorted; DICOM files need no suffix."""
    root = pathlib.Path(folder)
    found = sorted(p for p in root.rglob("*") if images.is_image_file(p))
    if not found:
        raise ValueError(f"--image_dir {folder}: no image files ({', '.join(images.SUFFIXES)}, or DICOM by content).")
    return [str(p.relative_to(root)) for p in found]
