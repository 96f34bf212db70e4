"""Reads MedICaT's lines, a figure each, and splits them by article."""

import pathlib
from collections.abc import Iterator
from typing import Any

from data_prep import files
from data_prep.builders.figures import CAPTION_AGAIN, Figure, Release, add_figure, first_there, has_text
from data_prep.builders.questioned import SPLITS, drawn_split
from data_prep.files import DataError
from paligemma_med.pp import json_text

EXPECTED = "the release's .jsonl (or release/*.jsonl) and figures/ (or figures.zip)"
FEATURES = ("caption", "paper_id", "radiology", "scope", "predicted_type", "references", "licence")
NEEDED = ("pdf_hash", "fig_uri", "s2_caption")


def table(folder: pathlib.Path) -> pathlib.Path | None:
    """The file with figures: the release has others beside it, whose lines have other keys."""
    for path in sorted((*folder.glob("*.jsonl"), *folder.glob("release/*.jsonl"))):
        with open(path, "rb") as f:
            first = f.readline(1 << 20)
        if all(f'"{key}"'.encode() in first for key in NEEDED):
            return path
    return None


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it holds MedICaT. DataError: what is missing."""
    folder = files.given_folder(folder, EXPECTED)
    if table(folder) is None:
        raise DataError(f"{folder}: no .jsonl with {', '.join(NEEDED)} found; expected {EXPECTED}")
    return folder


def read_folder(folder: pathlib.Path | str, shares: tuple[float, float, int], radiology_only: bool = False) -> Release:
    """All figures, their splits drawn by article.

    Args:
      folder: see `check_folder`.
      shares: validate, test, and the seed of the draw.
      radiology_only: leave out figures that the release's classifier doesn't take for radiology.

    Raises:
      DataError: as `check_folder`; a line of another form; a figure that comes twice.
    """
    folder = check_folder(folder)
    path = table(folder)
    figures: dict[str, dict[str, Figure]] = {split: {} for split in SPLITS}
    captions: set[str] = set()
    left_out = 0
    for where, row in _rows(path):
        if radiology_only and row.get("radiology") is not True:
            left_out += 1
            continue
        figure = _figure(row, where, captions)
        add_figure(figures[drawn_split(figure.features["paper_id"], *shares)], figure, where)
    notes: dict[str, Any] = {"captions_file": path.relative_to(folder).as_posix()}
    if radiology_only:
        notes["figures that aren't radiology, left out"] = left_out
    images = first_there(folder, "figures", "figures.zip")
    found = {split: some for split, some in figures.items() if some}
    return Release(found, dict.fromkeys(found, images), notes, optional=SPLITS)


def _rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                where = f"{path} line {number}"
                row = json_text.parse(line, where, "a figure as a JSON object", root=dict, error=DataError)
                for key in NEEDED[:2]:
                    if not isinstance(row.get(key), str) or not row[key].strip():
                        raise DataError(f"{where}: {key} is {row.get(key)!r:.60}; expected text")
                yield where, row


def _figure(row: dict[str, Any], where: str, captions: set[str]) -> Figure:
    """A figure; its caption is added to `captions`, those of the figures so far."""
    name = f"{row['pdf_hash'].strip()}_{row['fig_uri'].strip()}"
    try:
        files.path_inside("figures", name)
    except DataError as e:
        raise DataError(f"{where}: pdf_hash and fig_uri: {e}") from None
    text = _text(row.get("s2_caption"), where, "s2_caption") or _text(row.get("s2orc_caption"), where, "s2orc_caption")
    caption = text if has_text(text) else ""
    flags = (CAPTION_AGAIN,) if caption in captions else ()
    captions.add(caption or "-")
    references = row.get("s2orc_references") or []
    if not isinstance(references, list):
        raise DataError(f"{where}: s2orc_references is {references!r:.60}; expected a list of texts")
    return Figure(
        name.rsplit(".", 1)[0],
        (name,),
        {
            "caption": caption,
            "paper_id": row["pdf_hash"].strip(),
            "radiology": _yes_no(row.get("radiology")),
            "scope": _yes_no(row.get("scope")),
            "predicted_type": _text(row.get("predicted_type"), where, "predicted_type"),
            "references": "\n".join(_text(x, where, "s2orc_references") for x in references),
            "licence": _licence(row.get("oa_info")),
        },
        no_caption="" if caption else "blank caption",
        flags=flags,
        groups=(("article", row["pdf_hash"].strip()),),
    )


def _licence(info: Any) -> str:
    inside = info.get("oa") if isinstance(info, dict) else None
    found = inside.get("license") if isinstance(inside, dict) else None
    return found if isinstance(found, str) else ""


def _yes_no(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, "") if isinstance(value, bool) else ""


def _text(value: Any, where: str, key: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key} is {value!r:.60}; expected text or null")
    return " ".join(value.split())
