"""A row for each name that has a box on an image: "detect cardiomegaly" → its boxes, as `slake/en_detect` has them."""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data_prep.builders.questioned import Asked
from data_prep.datasets.vindr_cxr import fusion
from data_prep.datasets.vindr_cxr.fusion import Box
from data_prep.datasets.vindr_cxr.layout import Picture
from data_prep.files import DataError
from data_prep.images.store import Store
from paligemma_med.pp import boxes as boxes_lib
from paligemma_med.pp import images

FEATURES = ("content_type", "base_type", "q_lang", "location", "modality", "readers")
CHEST = dict(content_type="Detect finding", location="Chest", modality="X-Ray")
OTHER = dict(content_type="Detect object", location="", modality="")
OUTSIDE = "a box reaches outside of the image, and is cut"
LEFT_OUT = "a box left out, outside of the image or too thin for <loc>"
SCALED = "boxes scaled to the size of the image"
FEW_READERS = "a box left out, drawn by too few readers"
CROWD = "also named without a box"


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of several readers' boxes. each: a row for each reader; else they are fused at an IoU above `iou`,
    and boxes of fewer than `fewest` readers are left out."""

    each: bool = False
    iou: float = 0.5
    fewest: int = 1


def make(
    picture: Picture, split: str, store: Store, rule: Rule, about: Mapping[str, str], allow_missing: bool
) -> Iterator[Asked]:
    """The rows of one image.

    Raises:
      DataError: the image can't be read, unless `allow_missing`; an image that isn't there is `make_rows`' to refuse.
    """
    name = next((n for n in picture.names if store.has(n)), picture.names[0])
    wanted = [(n, reader, boxes) for n in sorted(picture.boxes) for reader, boxes in _sets(picture.boxes[n], rule)]
    size, dropped = _size(store, name, allow_missing) if wanted else (None, "")
    for label, reader, boxes in wanted:
        row = _Row(picture, split, name, label, reader, about)
        yield row.dropped(dropped) if dropped else row.missing() if size is None else row.asked(boxes, size, rule)
    for label in sorted(picture.unplaced - picture.boxes.keys()):
        yield _Row(picture, split, name, label, "", about).dropped("no box")


def _sets(boxes: Sequence[Box], rule: Rule) -> Iterator[tuple[str, list[Box]]]:
    """(reader, boxes) of each row of a name; "" for all readers."""
    if not rule.each:
        yield "", list(boxes)
        return
    readers = sorted({reader for box in boxes for reader in box.readers})
    for reader in readers or [""]:
        yield reader, [box for box in boxes if reader in box.readers or not reader]


def _size(store: Store, name: str, allow: bool) -> tuple[tuple[int, int] | None, str]:
    """((height, width) or None: the image isn't there; why its rows are dropped, or "")."""
    if not store.has(name):
        return None, ""
    try:
        return images.size(store.read(name)), ""
    except (DataError, images.ImageError) as e:
        if allow:
            return None, "image broken"
        where = "" if isinstance(e, DataError) else f"{store.root}/{name}: "
        raise DataError(f"{where}{e} (--allow_missing_images leaves such rows out)") from None


@dataclasses.dataclass(frozen=True)
class _Row:
    picture: Picture
    split: str
    file: str
    label: str
    reader: str
    about: Mapping[str, str]

    def asked(self, boxes: Sequence[Box], size: tuple[int, int], rule: Rule) -> Asked:
        flags = [CROWD] if self.label in self.picture.unplaced else []
        readers = {reader for box in boxes for reader in box.readers}
        if not rule.each:
            boxes = fusion.fuse(boxes, rule.iou)
        many = [box for box in boxes if not box.readers or len(box.readers) >= rule.fewest or rule.each]
        if len(many) < len(boxes):
            flags.append(FEW_READERS)
        if not many:
            return self.dropped(f"no box of {rule.fewest} readers")
        kept, found = _in_image([box.corners for box in many], self.picture.size, size)
        if not kept:
            return self.dropped("no box inside of the image")
        features = self._features(readers) | dict(
            answer=boxes_lib.to_text([share for share, _ in kept], [self.label] * len(kept)),
            boxes=[{"label": self.label, "bbox": bbox} for _, bbox in kept],
        )
        return Asked(self.split, self.picture.root, self.file, features, flags=(*flags, *found))

    def missing(self) -> Asked:
        """Its image isn't there: never written, since `make_rows` refuses or drops it."""
        return Asked(self.split, self.picture.root, self.file, self._features(()))

    def dropped(self, why: str) -> Asked:
        return Asked(self.split, self.picture.root, self.file, self._features(()), why)

    def _features(self, readers) -> dict[str, Any]:
        parts = (self.picture.image_id, re.sub(r"[^a-z0-9]+", "_", self.label), self.reader)
        return {
            **self.about,
            "question_id": "_".join(part for part in parts if part),
            "image_id": self.picture.image_id,
            "question": f"detect {self.label}",
            "answer": "(its image isn't there)",
            "answer_type": "OPEN",
            "base_type": "detect",
            "q_lang": "en",
            "readers": str(len(readers)) if readers else "",
            "boxes": [],
        }


def _in_image(
    corners: Sequence[Sequence[float]], given: tuple[float, float] | None, size: tuple[int, int]
) -> tuple[list[tuple[Any, list[float]]], list[str]]:
    """([(share, [x, y, width, height])] from above to below, flags). given: (width, height) that corners are in."""
    height, width = size
    across, down = (width / given[0], height / given[1]) if given else (1.0, 1.0)
    kept, flags = [], [SCALED] if (across, down) != (1.0, 1.0) else []
    for x0, y0, x1, y1 in corners:
        bbox = [x0 * across, y0 * down, (x1 - x0) * across, (y1 - y0) * down]
        shares, _ = boxes_lib.from_pixels([bbox], height, width)
        try:
            boxes_lib.places(shares)
        except ValueError:
            shares = ()
        if not len(shares):
            flags.append(LEFT_OUT)
            continue
        if min(bbox[:2]) < 0 or bbox[0] + bbox[2] > width + 1 or bbox[1] + bbox[3] > height + 1:
            flags.append(OUTSIDE)
        kept.append((shares[0], bbox))
    kept.sort(key=lambda box: tuple(box[0][:2]))
    return kept, list(dict.fromkeys(flags))
