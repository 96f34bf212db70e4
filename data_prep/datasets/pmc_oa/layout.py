"""Reads PMC-OA's lines {"image", "caption"}; nothing of its 1.6 million is held in memory but what tells copies."""

import pathlib
import re
from collections.abc import Iterator

from data_prep import files
from data_prep.builders.captioned import CAPTION_QUESTION
from data_prep.builders.figures import first_there, has_text
from data_prep.builders.questioned import Asked, drawn_split
from data_prep.files import DataError
from paligemma_med.pp import json_text

# Config -> its file.
TABLES = {"split_captions": "pmc_oa.jsonl", "whole_captions": "pmc_oa_beta.jsonl"}
IMAGES = ("images", "images.zip")
EXPECTED = "pmc_oa.jsonl (or pmc_oa_beta.jsonl) and images.zip (or images/)"
FEATURES = ("content_type", "caption", "paper_id")


def configs_in(folder: pathlib.Path) -> list[str]:
    """The configs whose file is in `folder`."""
    return [config for config, name in TABLES.items() if (folder / name).is_file()]


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds PMC-OA's lines. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    if not configs_in(folder):
        raise DataError(f"{folder}: no file of captions found; expected {EXPECTED}")
    return folder


def image_path(folder: pathlib.Path) -> pathlib.Path:
    """Folder or zip file of the images. DataError: neither is there."""
    if found := first_there(folder, *IMAGES):
        return found
    raise DataError(f"{folder}: found none of {', '.join(IMAGES)}; expected the images there")


def rows(folder: pathlib.Path, config: str, shares: tuple[float, float, int]) -> Iterator[Asked]:
    """All lines as rows, split by article.

    Args:
      folder: see `check_folder`.
      config: a key of TABLES.
      shares: validate, test, and the seed of the draw.

    Raises:
      DataError: no such file; a line that isn't one image with its caption; a path that leaves the folder.
    """
    path = folder / TABLES[config]
    if not path.is_file():
        raise DataError(f"{path}: missing; expected it for config {config}")
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if number == 1 and files.is_lfs_pointer(line):
                raise DataError(f"{path}: {files.lfs_message('lines of captions')}")
            if line.strip():
                yield _row(line, number, f"{path} line {number}", shares)


def _row(line: bytes, number: int, where: str, shares: tuple[float, float, int]) -> Asked:
    row = json_text.parse(line, where, "an object with image and caption", root=dict, error=DataError)
    image, caption = row.get("image"), row.get("caption")
    if not isinstance(image, str) or not isinstance(caption, str):
        raise DataError(f"{where}: image is {image!r:.40} and caption {caption!r:.40}; expected two texts")
    flags = []
    if inside := re.fullmatch(r"\{.*'path':\s*'([^']+)'.*\}", image.strip()):
        image = inside[1]  # as the Hub's viewer writes it: a Python dict as text
        flags.append("image is a Python dict as text, its path is taken")
    image = image.strip().replace("\\", "/")
    if image:
        try:
            files.path_inside("images", image)
        except DataError as e:
            raise DataError(f"{where}: image: {e}") from None
    article = re.search(r"PMC\d+", image)
    if image and not article:
        flags.append("no PMC number in the image's name, which stands for the article")
    paper = article[0] if article else image
    caption = " ".join(caption.split())
    features = {
        "question_id": f"pmc_oa_{number}",
        "image_id": image,
        "question": CAPTION_QUESTION,
        "answer": caption,
        "answer_type": "OPEN",
        "content_type": "",
        "caption": caption,
        "paper_id": paper,
    }
    dropped = "" if has_text(caption) else "blank caption"
    return Asked(drawn_split(paper, *shares), "images", image, features, dropped, tuple(flags), (("article", paper),))
