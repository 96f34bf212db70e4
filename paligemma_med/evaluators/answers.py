"""When two answers are equal: the forms in which they are compared."""

import re


def strict(text):
    """Lower case, no blanks around."""
    return text.strip().lower()


def normalise(text):
    """The form in which answers are compared.

    Lower case; every comma (also the full-width `，` and the enumerating `、`) followed by one
    space and preceded by none; runs of white space become one space; white space around and
    `. , ; : ! ?` (also full-width) at the end are dropped. Nothing else: articles, plurals and
    number words count, and so does the order of a list.
    """
    text = re.sub(r"\s*[,，、]\s*", ", ", text.lower())
    return re.sub(r"\s+", " ", text).strip().rstrip(" .,;:!?。；：！？")


def as_set(text):
    """The set of an answer's comma-separated parts, normalised."""
    return frozenset(normalise(part) for part in normalise(text).split(", "))
