"""Reads a folder in SLAKE's layout (`slake` and the drawn sets) into checked rows and a report.

Layout: `train.json`, `validate.json` (or `validation.json`), `test.json`, each a list of rows with
twelve keys, and `imgs/<image>/source.jpg` with `detection.json` next to it. Everything is checked
before the first record is written, so that a bad file costs seconds and not a build.
"""

import dataclasses
import math
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import tqdm

from data_prep import files
from data_prep.files import DataError
from data_prep.images import convert

SPLITS = {
    "train": ("train.json",),
    "validate": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
TEXT_KEYS = "img_name question answer q_lang location modality answer_type base_type content_type".split()
KEYS = (*TEXT_KEYS, "img_id", "triple", "qid")
EXPECTED = "train.json, validate.json (or validation.json), test.json and imgs/"


@dataclasses.dataclass(frozen=True)
class Row:
    """One kept question. `image` is the image file, `features` all text features by name, `boxes` those that this row
    is about; None: all of the image's."""

    image: pathlib.Path
    features: dict[str, str]
    boxes: list[dict[str, Any]] | None = None


@dataclasses.dataclass(frozen=True)
class Folder:
    """What `read_folder` found: rows by split, boxes by image file, and the report."""

    rows: dict[str, list[Row]]
    boxes: dict[pathlib.Path, list[dict[str, Any]]]
    report: dict[str, Any]


def check_folder(folder: pathlib.Path | str) -> pathlib.Path:
    """Returns `folder` as a path if it looks like a released SLAKE folder.

    Raises:
      DataError: it doesn't; names what is missing and, if one looks right, a neighbouring folder.
    """
    folder = files.given_folder(folder, EXPECTED)
    missing = [" or ".join(names) for names in SPLITS.values() if not any((folder / n).is_file() for n in names)]
    if not (folder / "imgs").is_dir():
        missing.append("imgs/")
    if not missing:
        return folder
    hint = ""
    if "imgs/" in missing and (zips := sorted(p.name for p in folder.glob("*.zip"))):
        hint = f"; unpack {', '.join(zips)} there first"
    hint = files.did_you_mean(folder, lambda p: (p / "train.json").is_file() and (p / "imgs").is_dir()) or hint
    raise DataError(
        f"{folder}: not a folder in SLAKE's layout: {', '.join(missing)} not found in it; expected {EXPECTED}{hint}"
    )


def _check_row(row: Any, where: str) -> dict[str, Any]:
    """Returns the row if its keys and types are right; `where` is its file and place, for errors."""
    if not isinstance(row, dict):
        raise DataError(f"{where}: expected an object with 12 keys, found {row!r:.80}")
    where = f"{where} (qid {row['qid']!r})" if "qid" in row else where
    if missing := [k for k in KEYS if k not in row]:
        raise DataError(
            f"{where}: key {', '.join(map(repr, missing))} missing; expected the keys "
            f"{', '.join(KEYS)}; found {', '.join(row)}"
        )
    for key in TEXT_KEYS:
        if not isinstance(row[key], str):
            raise DataError(f"{where}: {key} is {row[key]!r:.80}; expected text")
    if isinstance(row["qid"], bool) or not isinstance(row["qid"], (int, str)):
        raise DataError(f"{where}: qid is {row['qid']!r:.80}; expected a whole number")
    if row["q_lang"] not in ("en", "zh"):
        raise DataError(f"{where}: q_lang is {row['q_lang']!r}; expected 'en' or 'zh'")
    if row["answer_type"].strip().upper() not in ("OPEN", "CLOSED"):
        raise DataError(f"{where}: answer_type is {row['answer_type']!r}; expected 'OPEN' or 'CLOSED'")
    if not row["question"].strip():
        raise DataError(f"{where}: the question is empty; expected text")
    return row


def _image_id(img_name: str) -> str:
    """`xmlab1/source.jpg` -> `xmlab1`: the folder names the image, the file is always `source`."""
    path = pathlib.PurePosixPath(img_name.replace("\\", "/"))
    inside_folder = path.stem == "source" and str(path.parent) != "."
    return str(path.parent if inside_folder else path.with_suffix(""))


def read_boxes(path: pathlib.Path) -> list[dict[str, Any]]:
    """Reads a `detection.json`: `[{"Liver": [x, y, w, h]}, ...]` in pixels, in file order.

    Returns:
      `[{"label": str, "bbox": [x, y, w, h]}, ...]`, floats.

    Raises:
      DataError: not JSON, or a box that is not four finite numbers.
    """
    content = files.read_json(path, "a list of boxes")
    expected = 'expected a list of {"name": [x, y, width, height]} in pixels'
    if not isinstance(content, list):
        raise DataError(f"{path}: found {content!r:.60}; {expected}")
    boxes = []
    for i, item in enumerate(content):
        for label, box in item.items() if isinstance(item, dict) else [(item, None)]:
            numbers = isinstance(box, list) and all(type(v) in (int, float) for v in box)
            if not numbers or len(box) != 4 or not all(math.isfinite(v) for v in box):
                raise DataError(f"{path}: entry {i} is {item!r:.80}; {expected}")
            boxes.append({"label": label, "bbox": [float(v) for v in box]})
    return boxes


def _read_split(folder: pathlib.Path, split: str, language: str) -> tuple[list[Row], dict[str, Any], Counter]:
    """Rows of one split in one language, its part of the report, and the qids seen in the file."""
    path = next(p for n in SPLITS[split] if (p := folder / n).is_file())
    content = files.read_json(path, "a list of question rows")
    if not isinstance(content, list) or not content:
        found = f"an object of type {type(content).__name__}" if content else repr(content)
        raise DataError(f"{path}: found {found}; expected a list of question rows")

    rows, dropped, qids = [], {}, Counter()
    other = 0
    for i, row in enumerate(content):
        row = _check_row(row, f"{path} row {i}")
        question_id = str(row["qid"])
        qids[question_id] += 1
        if language not in ("all", row["q_lang"]):
            other += 1
            continue
        try:
            image = files.path_inside(folder / "imgs", row["img_name"])
        except DataError as e:
            raise DataError(f"{path} row {i} (qid {question_id}): img_name: {e}") from None
        if not row["answer"].strip():
            dropped.setdefault("empty answer", []).append(question_id)
            continue
        features = {k: row[k] for k in TEXT_KEYS if k != "img_name"}
        features["answer_type"] = row["answer_type"].strip().upper()
        features["question_id"] = question_id
        features["image_id"] = _image_id(row["img_name"])
        rows.append(Row(image, features))
    if not rows:
        raise DataError(
            f"{path}: no row in language {language!r} with an answer; found "
            f"{len(content)} rows, {other} of them in another language"
        )
    report = {
        "file": path.name,
        "rows_in_file": len(content),
        "rows_other_language": other,
        "rows_read": len(content) - other,
        "dropped": dropped,
    }
    return rows, report, qids


def kept(rows: list[Row]) -> dict[str, Any]:
    """The part of a split's report that counts its rows."""
    asked = Counter((row.image, row.features["question"]) for row in rows)
    return {
        "rows_kept": len(rows),
        "duplicate_questions_kept": sum(n - 1 for n in asked.values()),
        "answer_types": dict(Counter(r.features["answer_type"] for r in rows).most_common()),
        "content_types": dict(Counter(r.features["content_type"] for r in rows).most_common()),
        "images": len({r.image for r in rows}),
    }


def _check_images(
    rows: dict[str, list[Row]], splits: dict[str, dict[str, Any]], allow_missing: bool
) -> tuple[dict[pathlib.Path, str], dict[str, list[str]]]:
    """Decodes every image once.

    Args:
      rows: by split; those whose image is missing or broken are taken out if `allow_missing`.
      splits: their reports, which count those rows.

    Returns:
      image file -> digest of its bytes; what is odd about images -> their image ids.
    """
    first = {}
    for split, split_rows in rows.items():
        for row in split_rows:
            first.setdefault(row.image, (split, row))
    digests, reasons, notes = {}, {}, {}
    for image, (split, row) in tqdm.tqdm(first.items(), desc="checking images", unit="", leave=False, disable=None):
        try:
            digests[image], found = files.check_image(image)
        except DataError as e:
            if not allow_missing:
                where = f"first used by {split} qid {row.features['question_id']}"
                raise DataError(f"{e} ({where}; --allow_missing_images leaves such rows out)") from None
            reasons[image] = "image broken" if image.is_file() else "image missing"
            continue
        for note in found:
            notes.setdefault(note, []).append(row.features["image_id"])
    for split, split_rows in rows.items():
        for row in split_rows:
            if reason := reasons.get(row.image):
                splits[split]["dropped"].setdefault(reason, []).append(row.features["question_id"])
        rows[split] = [row for row in split_rows if row.image in digests]
        if not rows[split]:
            raise DataError(f"{split}: no row is left, since none of its images can be read; {next(iter(reasons))}")
    return digests, notes


def shared_images(rows: dict[str, list[Row]], digests: dict[pathlib.Path, str]) -> dict[str, list[str]]:
    """Images that two splits share: `{"train+test": [image ids], ...}`.

    Compared by content and not by name, since a renamed copy leaks as much as the file itself.
    """
    by_split = {
        split: {digests[r.image]: r.features["image_id"] for r in split_rows} for split, split_rows in rows.items()
    }
    names = list(rows)
    return {
        f"{a}+{b}": sorted(by_split[b][d] for d in by_split[a].keys() & by_split[b].keys())
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }


def read_folder(folder: pathlib.Path | str, language: str, *, allow_missing_images: bool = False) -> Folder:
    """Reads and checks a whole folder.

    Args:
      folder: the released folder.
      language: "en", "zh", or "all". For the first two no image may be in two splits; "all" can't
        avoid that in SLAKE (its languages split the images differently) and only reports it.
      allow_missing_images: leave out and count rows whose image is missing or broken instead of stopping.

    Raises:
      DataError: see `check_folder`; a malformed row, image or box file; a duplicate question id; splits
        of one language that share images.
    """
    folder = check_folder(folder)
    rows, splits, all_qids = {}, {}, Counter()
    for split in SPLITS:
        rows[split], splits[split], qids = _read_split(folder, split, language)
        all_qids += qids
    if twice := [q for q, n in all_qids.items() if n > 1]:
        raise DataError(
            f"{folder}: qid {', '.join(twice[:5])} used by more than one row ({len(twice)} such "
            "ids); expected each qid once over all splits"
        )
    digests, noted = _check_images(rows, splits, allow_missing_images)
    for split in rows:
        splits[split] |= kept(rows[split])
    shared = shared_images(rows, digests)
    if language != "all":
        for pair, ids in shared.items():
            if ids:
                raise DataError(
                    f"{folder}: {len(ids)} image(s) in both {pair.replace('+', ' and ')} for "
                    f"language {language!r}, e.g. {', '.join(ids[:5])}; expected splits without "
                    "a common image"
                )
    boxes, without = {}, []
    for image in digests:
        path = image.parent / "detection.json"
        if path.is_file():
            boxes[image] = read_boxes(path)
        else:
            boxes[image] = []
            without.append(image.parent.name)
    used = {image.parent.name for image in digests}
    on_disk = {p.name for p in (folder / "imgs").iterdir() if p.is_dir() and not p.name.startswith((".", "__MACOSX"))}
    report = {
        "folder": str(folder.resolve()),
        "language": language,
        "splits": splits,
        "images_on_disk_not_used": len(on_disk - used),
        "images_without_boxes_file": sorted(without),
        "images_noted": noted,
        "images_shared": {pair: len(ids) for pair, ids in shared.items()},
    }
    return Folder(rows, boxes, report)


def examples(folder: Folder, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields TFDS (key, example) pairs of one split, the image as `convert` stores it: nearly always as released."""
    for row in folder.rows[split]:
        content = convert.convert_checked(row.image.read_bytes(), str(row.image))
        boxes = folder.boxes[row.image] if row.boxes is None else row.boxes
        example = dict(row.features, image=content, boxes=boxes)
        yield row.features["question_id"], example


def describe(report: dict[str, Any]) -> Sequence[str]:
    """The report as lines of text."""
    lines = []
    for split, r in report["splits"].items():
        types = ", ".join(f"{k} {v:,}" for k, v in r["answer_types"].items())
        lines.append(
            f"{split}: {r['rows_read']:,} rows read, {r['rows_kept']:,} kept ({types}), {r['images']:,} images"
        )
        for reason, ids in r["dropped"].items():
            lines.append(f"  dropped, {reason}: {len(ids)} (qid {', '.join(ids[:10])})")
        if n := r["duplicate_questions_kept"]:
            lines.append(f"  asked twice about the same image, kept: {n}")
    return [*lines, *describe_images(report)]


def describe_images(report: dict[str, Any]) -> list[str]:
    """What the report says of images, as lines of text."""
    lines = []
    for note, images in report["images_noted"].items():
        lines.append(f"images noted, {note}: {len(images)} ({', '.join(images[:10])})")
    shared = report["images_shared"]
    if any(shared.values()):
        tests = report["splits"]["test"]["images"]
        lines.append(
            f"WARNING: {shared['train+test']} of {tests} test images are also in train (and "
            f"{shared['validate+test']} in validate, {shared['train+validate']} in train and "
            "validate): don't evaluate a model on these splits if it was trained on them"
        )
    else:
        lines.append("no image is in two splits")
    if n := report["images_on_disk_not_used"]:
        lines.append(f"images on disk that no row uses: {n}")
    if n := len(report["images_without_boxes_file"]):
        lines.append(f"images without detection.json (no boxes): {n}")
    return lines
