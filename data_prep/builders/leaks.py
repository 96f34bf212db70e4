"""Leakage that equal ids and equal images don't show: a fact asked anew in other words, a caption but for its side.

A question re-worded has its image and its answer; two figures of one article often have the same caption but for a
plane, a side or the colour of an arrow. Both make a test partly recall, and a report that counts images alone says that
nothing leaks.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from data_prep.ledger import Ledger

QUESTION, ANSWER = "question about the same image", "answer about the same image"
NEAR_CAPTION = "near-equal caption"
_FEWEST = 6  # words that must be left of a caption, or many that say little would be alike
# Words by which captions of one article's figures differ; numbers and single letters do, too.
_VARY = frozenset(
    "left right bilateral unilateral axial coronal sagittal transverse transaxial ap pa lateral frontal oblique "
    "anteroposterior posteroanterior upper lower superior inferior anterior posterior proximal distal medial "
    "preoperative postoperative pre post before after initial first second third fourth final "
    "red blue green yellow white black orange purple arrow arrows arrowhead arrowheads star stars asterisk asterisks "
    "circle circles line lines box view plane section slice image images figure fig t1 t2 t1w t2w flair".split()
)


def plain(text: str) -> str:
    """Lower case, single blanks: the form in which questions and answers are compared."""
    return " ".join(text.lower().split())


def near_caption(caption: str) -> str:
    """A caption without what varies between figures of one article; "" if too little is left to compare."""
    words = re.findall(r"[^\W_]+", caption.lower())
    words = [w for w in words if w not in _VARY and len(w) > 1 and not w.isdecimal()]
    return " ".join(words) if len(words) >= _FEWEST else ""


def book_questions(books: Ledger, rows: Callable[[], Iterable[tuple[str, bytes, Mapping[str, str]]]]) -> None:
    """Counts questions, and answers but yes and no, that splits share about images that are in both.

    Only rows about such images are kept in memory, which are few.

    Args:
      books: the build's.
      rows: gives (split, digest of the image, features) of all kept rows, each time it is called.
    """
    first: dict[bytes, str] = {}
    several: set[bytes] = set()
    for split, digest, _ in rows():
        if first.setdefault(digest, split) != split:
            several.add(digest)
    books.look_for(QUESTION, ANSWER)
    for split, digest, features in rows() if several else ():
        if digest in several:
            qid, answer = features["question_id"], plain(features["answer"])
            books.member(split, QUESTION, f"{digest.hex()} {plain(features['question'])}", qid)
            if answer not in ("yes", "no"):
                books.member(split, ANSWER, f"{digest.hex()} {answer}", qid)
