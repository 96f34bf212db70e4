"""How well boxes in answers agree with the true ones, from texts in the form of `pp.boxes`.

Of each question
  iou        mean intersection over union of true boxes and boxes of the same name in the answer, paired one to one so
             that it is largest; divided by the larger of both numbers, so that boxes too many cost as much as missing
             ones
  pointing   the centre of the answer's first box lies in a true box of its name: the pointing game for boxes
  words      what stands before the boxes is equal to the truth after `answers.normalise`
  no_box     the answer has no box
  malformed  the answer has a piece that is neither box nor answer: nothing is guessed from it
Of a set of questions
  ap50, ap   average precision at an IoU of 0.5, and its mean over 0.5, 0.55, …, 0.95, as pycocotools computes them:
             mean over the true names, each a category, of the precision at 101 recalls. A question is what COCO calls
             an image, and the answer's probability the confidence of its boxes.

Boxes have names where the truth has: after `detect`. A box with another name matches none, and counts as a false alarm
of the first name that was asked for.
"""

import functools
from collections.abc import Sequence

import numpy as np
import scipy.optimize

from paligemma_med.metrics import answers
from paligemma_med.pp import boxes as boxes_lib

MEANS = ("iou",)
SHARES = ("pointing", "words", "no_box", "malformed")
THRESHOLDS = np.arange(50, 100, 5) / 100
_RECALLS = np.linspace(0, 1, 101)
MOST = 100  # boxes of an answer that count, COCO's maxDets
# Shares of the image's area that part small, medium and large boxes. COCO's borders, 32² and 96² pixels, are for
# photographs of 640 x 480 pixels, of which they are about these shares.
SIZES = {"small": 0.0, "medium": 0.0033, "large": 0.03}


def pairwise_iou(a, b) -> np.ndarray:
    """float[n, m]: intersection over union of boxes [n, 4] and [m, 4], each y0, x0, y1, x1."""
    a, b = np.asarray(a, float).reshape(-1, 1, 4), np.asarray(b, float).reshape(1, -1, 4)
    sides = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    both = sides.prod(-1)
    return both / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - both)


def size_of(answer: str) -> str:
    """Which of SIZES the largest box of a true answer is."""
    found = np.array(_true(answer).boxes)
    share = float((found[:, 2:] - found[:, :2]).prod(1).max())
    return [name for name, least in SIZES.items() if share >= least][-1]


def name_of(answer: str) -> str:
    """The names of a true answer's boxes; "" where an answer stands before them instead."""
    return ", ".join(sorted({name for name in _true(answer).labels if name}))


def has_boxes(answer: str) -> bool:
    """Whether a true answer is one of boxes."""
    return "<loc" in answer and bool(boxes_lib.read(answer).boxes) and not boxes_lib.read(answer).malformed


def check(answer: str) -> None:
    """Raises ValueError unless a true answer has boxes, and nothing malformed."""
    said = boxes_lib.read(answer)
    if said.malformed or not said.boxes:
        what = f"has {said.malformed[0]!r:.60} in it" if said.malformed else "has no box"
        raise ValueError(f"the answer {answer!r:.80} {what}; expected <loc…> tokens, four a box")


@functools.lru_cache(1 << 12)
def _true(answer):
    check(answer)
    return boxes_lib.read(answer)


def _known(name, true):
    """A box's name as one of the truth's, or None: case and blanks don't count."""
    form = answers.normalise(name)
    return next((other for other in true.labels if answers.normalise(other) == form), None)


@functools.lru_cache(1 << 14)
def _overlaps(prediction, answer):
    """(float[boxes of the answer, true boxes]: IoU, 0 for different names; the category of each box of the answer)."""
    said, true = boxes_lib.read(prediction), _true(answer)
    names = [_known(name, true) for name in said.labels]
    same = np.array([[name == other for other in true.labels] for name in names], bool).reshape(-1, len(true.labels))
    iou = pairwise_iou(said.boxes, true.boxes) * same
    return iou, [true.labels[0] if name is None else name for name in names]


def matched(prediction: str, answer: str) -> tuple[float, float]:
    """(mean IoU as `iou` above, the lowest IoU of a pair, or 0 where numbers of boxes differ)."""
    iou, _ = _overlaps(prediction, answer)
    best = iou[scipy.optimize.linear_sum_assignment(iou, maximize=True)]
    return float(best.sum() / max(iou.shape)), float(best.min()) if iou.shape[0] == iou.shape[1] else 0.0


def equal(prediction: str, answer: str) -> bool:
    """Whether an answer has the true boxes: as many, of the same names, each with an IoU of 0.5 or more."""
    return not boxes_lib.read(prediction).malformed and matched(prediction, answer)[1] >= 0.5


def score(prediction: str, answer: str) -> dict[str, float]:
    """{figure: number} of one answer, for MEANS and SHARES."""
    said, true = boxes_lib.read(prediction), _true(answer)
    pointing = False
    if said.boxes:
        y0, x0, y1, x1 = said.boxes[0]
        y, x, name = (y0 + y1) / 2, (x0 + x1) / 2, _known(said.labels[0], true)
        pointing = any(
            other == name and box[0] <= y <= box[2] and box[1] <= x <= box[3]
            for other, box in zip(true.labels, true.boxes)
        )
    return dict(
        iou=matched(prediction, answer)[0],
        pointing=float(pointing),
        words=float(answers.normalise(said.answer) == answers.normalise(true.answer)),
        no_box=float(not said.boxes),
        malformed=float(bool(said.malformed)),
    )


class Matches:
    """Which boxes of answers find true ones, at each of THRESHOLDS: made once, for average precision of any set of
    the questions.

    At a threshold each box takes, in the order in which it was said, the true box of its question with the largest IoU
    that no other has taken, of equal ones the last.
    """

    def __init__(self, predictions: Sequence[str], truths: Sequence[str], confidences: Sequence[float]):
        """One prediction, truth and confidence a question."""
        numbers, hits, categories, wanted = [], [], [], []
        for i, (prediction, answer) in enumerate(zip(predictions, truths, strict=True)):
            true = _true(answer)
            iou, names = (x[:MOST] for x in _overlaps(prediction, answer))
            numbers += [i] * len(names)
            categories += names
            hits += list(_taken(iou))
            wanted += [(i, name) for name in true.labels]
        self._names = {name: k for k, name in enumerate(sorted({name for _, name in wanted}))}
        self._question = np.array(numbers, int)
        self._category = np.array([self._names[name] for name in categories], int)
        self._hit = np.array(hits, bool).reshape(-1, len(THRESHOLDS))
        self._confidence = np.array(confidences, float)[self._question]
        self._wanted = np.zeros((len(truths), len(self._names)), int)
        for i, name in wanted:
            self._wanted[i, self._names[name]] += 1

    def precision(self, times=None) -> tuple[float, float]:
        """(ap50, ap) over all questions, or over these: times int[questions], how often each is in the set. NaN for
        a set without true boxes."""
        times = np.ones(len(self._wanted), int) if times is None else np.asarray(times)
        index = np.repeat(np.arange(len(self._question)), times[self._question])
        # Stable, so that of equal confidences the earlier question comes first.
        index = index[np.argsort(-self._confidence[index], kind="stable")]
        totals = times @ self._wanted
        found = [
            _precision(self._hit[index[self._category[index] == k]], total) for k, total in enumerate(totals) if total
        ]
        if not found:
            return float("nan"), float("nan")
        by_threshold = np.mean(found, axis=0)
        return float(by_threshold[0]), float(by_threshold.mean())


def _taken(iou):
    """bool[boxes, thresholds]: whether each box of an answer takes a true one."""
    out = np.zeros((len(iou), len(THRESHOLDS)), bool)
    for t, threshold in enumerate(THRESHOLDS):
        free = np.ones(iou.shape[1], bool)
        for d, row in enumerate(iou):
            best = np.where(free, row, -1.0)
            if len(best) and best.max() >= threshold:
                free[np.flatnonzero(best == best.max())[-1]] = False
                out[d, t] = True
    return out


def _precision(hit, total):
    """float[thresholds]: mean precision at 101 recalls of boxes in the order of their confidence; `total` true ones."""
    right = np.cumsum(hit, axis=0)
    precision = right / np.arange(1, len(hit) + 1)[:, None]
    # At a recall counts the best precision at this recall or a higher one.
    precision = np.maximum.accumulate(precision[::-1], axis=0)[::-1]
    out = np.zeros(hit.shape[1])
    for t in range(hit.shape[1]):
        at = np.searchsorted(right[:, t] / total, _RECALLS, side="left")
        out[t] = precision[at[at < len(hit)], t].sum() / len(_RECALLS)
    return out
