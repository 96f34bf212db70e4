"""Boxes as PaliGemma writes them: `<loc0102><loc0000><loc0512><loc0300> liver ; <loc…> spleen`, and back.

A box is four numbers y0, x0, y1, x1 as shares of the image's height and width, each rounded to one of 1,024 places
(0 is the upper or left edge, 1023 the lower or right one), as big_vision's `refcoco_mask2str` does. What it is a box of
follows it; several are joined by " ; ". In an answer with its boxes, the answer stands in front:
`Left lung <loc…><loc…><loc…><loc…>`.

Reading is strict. What isn't exactly of this form is malformed, and counted as such; no box is guessed from it.
"""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

BINS = 1024
JOINED_BY = " ; "

_BOX = re.compile(r"((?:<loc[0-9]{4}>){4})(?: ([^<>;]+))?")
MASKS = (
    "masks as <seg…> tokens need the codebook of the network that makes them (vae-oid.npz in big_vision's bucket), "
    "which isn't part of this package: boxes only"
)


@dataclasses.dataclass(frozen=True)
class Said:
    """What a text says. answer: what stands before its first box, all of it where there is none. labels, boxes: names
    ("" where none follows a box) and (y0, x0, y1, x1) in shares, in order. malformed: pieces that are no box."""

    answer: str
    labels: tuple[str, ...] = ()
    boxes: tuple[tuple[float, float, float, float], ...] = ()
    malformed: tuple[str, ...] = ()


def check(boxes) -> np.ndarray:
    """Boxes as float32[n, 4]; ValueError unless each is y0, x0, y1, x1 in 0 to 1 with y0 < y1 and x0 < x1."""
    out = np.asarray(boxes, np.float32).reshape(-1, 4) if len(boxes) else np.zeros((0, 4), np.float32)
    right = (out >= 0).all(1) & (out <= 1).all(1) & (out[:, 0] < out[:, 2]) & (out[:, 1] < out[:, 3])
    if not right.all():
        raise ValueError(f"box {out[~right][0].tolist()}: expected y0, x0, y1, x1 in 0 to 1, y0 < y1 and x0 < x1")
    return out


def from_pixels(boxes, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Boxes x, y, width, height in pixels, as SLAKE and COCO have them, as shares of an image.

    Parts outside of the image are cut off.

    Returns:
      (float32[n, 4] y0, x0, y1, x1 of the boxes that are in the image, int[n] which of `boxes` they are).
    """
    x, y, w, h = np.asarray(boxes, np.float64).reshape(-1, 4).T
    out = np.stack([y / height, x / width, (y + h) / height, (x + w) / width], axis=1)
    out = np.clip(out, 0, 1).astype(np.float32)
    inside = np.flatnonzero((out[:, 0] < out[:, 2]) & (out[:, 1] < out[:, 3]))
    return out[inside], inside


def places(boxes) -> np.ndarray:
    """int[n, 4]: the places, 0 to 1023, of boxes in shares.

    Raises:
      ValueError: see `check`; a box whose sides have the same place, so that its text would be of no box.
    """
    boxes = check(boxes)
    out = np.rint(boxes * np.float32(BINS - 1)).astype(int)  # float32 and halves to even, as in big_vision
    thin = (out[:, 0] == out[:, 2]) | (out[:, 1] == out[:, 3])
    if thin.any():
        raise ValueError(
            f"box {boxes[thin][0].tolist()} is thinner than 1/{BINS - 1} of the image: no <loc> can say it"
        )
    return out


def to_text(boxes, labels: Sequence[str] = (), answer: str = "") -> str:
    """The text of boxes in shares, in their order: their names after them, or an answer before them.

    Raises:
      ValueError: see `places`; other than one label a box; a label or an answer that couldn't be read back.
    """
    found = places(boxes)
    labels = [str(label) for label in labels] or [""] * len(found)
    if len(labels) != len(found):
        raise ValueError(f"{len(labels)} labels {labels} for {len(found)} boxes; expected one each")
    for label in labels:
        if set(label) & set("<>;") or label != label.strip():
            raise ValueError(f"label {label!r}: expected no '<', '>' or ';' in it, and no blanks around it")
    if "<loc" in answer or answer != answer.strip():
        raise ValueError(f"answer {answer!r}: expected no '<loc' in it, and no blanks around it")
    texts = ("".join(f"<loc{place:04d}>" for place in box) for box in found.tolist())
    said = JOINED_BY.join(f"{text} {label}" if label else text for text, label in zip(texts, labels))
    return f"{answer} {said}" if answer and said else answer or said


def read(text: str) -> Said:
    """What a text says; never raises. A piece between two ";" is malformed if it isn't four <loc> and perhaps a name,
    has a place above 1023, or its sides in the wrong order."""
    answer, sign, _ = text.partition("<loc")
    if not sign:
        return Said(text.strip())
    labels, boxes, malformed = [], [], []
    for piece in text[len(answer) :].split(";"):
        match = _BOX.fullmatch(piece.strip())
        found = [int(n) for n in re.findall(r"[0-9]{4}", match[1])] if match else []
        if match and max(found) < BINS and found[0] < found[2] and found[1] < found[3]:
            labels.append((match[2] or "").strip())
            boxes.append(tuple(place / (BINS - 1) for place in found))
        else:
            malformed.append(piece.strip())
    return Said(answer.strip(), tuple(labels), tuple(boxes), tuple(malformed))
