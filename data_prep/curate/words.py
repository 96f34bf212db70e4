"""Texts as words: the rules ignore case and punctuation."""

import re

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_STOP = frozenset(
    "the and for with from that this these those what which where when who whom whose why how "
    "does did has have had are was were been being can could will would should may might must "
    "shall not but into onto over under than then there here their they them its his her about "
    "also such very more most some any each other seen shown show shows image images picture "
    "most likely based".split()
)

SMALL = _STOP | frozenset("a an as at be by in is it its of on one or so to".split())


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters and digits of any script."""
    return _WORD.findall(text.lower())


def content_words(text: str) -> set[str]:
    """Words of four letters or more, and abbreviations (MRI, CT), in lower case.

    Without function words and without talk about "the image".
    """
    found = _WORD.findall(text)
    long = {w.lower() for w in found if len(w) >= 4 or (len(w) >= 2 and w.isupper())}
    return long - _STOP


def as_words(question: str, answer: str) -> tuple[str, str]:
    """A pair in the form that is compared."""
    return " ".join(words(question)), " ".join(words(answer))
