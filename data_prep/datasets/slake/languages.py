"""Chinese questions about the images that English training has: more to train on, of the same images.

SLAKE splits its images differently in each language: `zh` train has images of `en` validate and test. Here questions
of all Chinese splits are taken whose image is in English train, and no others.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from data_prep.datasets.slake import layout
from data_prep.files import DataError
from paligemma_med.pp import image_digests


def chinese_of_english_train(folder: layout.Folder) -> layout.Folder:
    """The Chinese rows about images of English train, as the split `train` alone.

    Args:
      folder: read with both languages.

    Raises:
      DataError: an image of English train is in English validate or test, too, by content; or no row is left.
    """
    digests = {row.image: "" for rows in folder.rows.values() for row in rows}
    digests = {image: image_digests.digest(image.read_bytes()) for image in digests}
    english = {split: [r for r in rows if _language(r) == "en"] for split, rows in folder.rows.items()}
    for pair, ids in layout.shared_images(english, digests).items():
        if ids and pair.startswith("train+"):
            raise DataError(
                f"{len(ids)} images are in both {pair.replace('+', ' and ')} of English, such as {ids[0]}; "
                "expected none"
            )
    wanted = {digests[row.image] for row in english["train"]}
    rows, taken = [], {}
    for split, found in folder.rows.items():
        chinese = [row for row in found if _language(row) == "zh"]
        mine = [row for row in chinese if digests[row.image] in wanted]
        taken[split] = {"questions": len(chinese), "taken": len(mine)}
        rows += mine
    if not rows:
        raise DataError("no Chinese question is about an image of English train")
    report = {k: v for k, v in folder.report.items() if k not in ("splits", "images_shared")}
    report |= {"splits": {"train": layout.kept(rows)}, "images_shared": {}, "taken_of_zh": taken}
    return dataclasses.replace(folder, rows={"train": rows}, report=report)


def _language(row: layout.Row) -> str:
    return row.features["q_lang"]


def describe(report: dict[str, Any]) -> Sequence[str]:
    """The report of `chinese_of_english_train` as lines of text."""
    made = report["splits"]["train"]
    parts = ", ".join(f"{n['taken']:,} of {n['questions']:,} in {split}" for split, n in report["taken_of_zh"].items())
    return [
        f"train: {made['rows_kept']:,} Chinese questions about {made['images']:,} images of English train ({parts})"
    ]
