"""When two answers are equal: the forms in which they are compared."""

import re
import string


def strict(text) -> str:
    """Lower case, no surrounding blanks."""
    return text.strip().lower()


def normalise(text) -> str:
    """The form in which answers are compared.

    Lower case; every comma (also the full-width `，` and the enumerating `、`) followed by one
    space and preceded by none; runs of white space become one space; surrounding white space and
    `. , ; : ! ?` (also full-width) at the end are dropped. Nothing else: articles, plurals, number
    words and the order of a list still count.
    """
    text = re.sub(r"\s*[,，、]\s*", ", ", text.lower())
    return re.sub(r"\s+", " ", text).strip().rstrip(" .,;:!?。；：！？")


def as_set(text) -> frozenset[str]:
    """The set of an answer's comma-separated parts, normalised."""
    return frozenset(normalise(part) for part in normalise(text).split(", "))


def squad(text) -> str:
    """SQuAD's form: lower case, without ASCII punctuation and the words a, an, the; single blanks.

    Punctuation is removed first, without a blank in its place, so "x-ray" becomes "xray". P. Rajpurkar et
    al., EMNLP 2016 (arXiv 1606.05250), as in its evaluation script.
    """
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(?:a|an|the)\b", " ", text).split())


_LLAVA_MED_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_LLAVA_MED_NUMBERS = {"none": "0"} | {
    word: str(i) for i, word in enumerate("zero one two three four five six seven eight nine ten".split())
}


def llava_med(text) -> str:
    """LLaVA-Med's form, which is that of the VQA challenge (S. Antol et al., ICCV 2015).

    Lower case. A punctuation mark `; / [ ] " { } ( ) = + \\ _ - > < @ ` , ? !` vanishes if it
    stands beside a blank anywhere in the text, or if the text has a comma between two digits;
    otherwise it becomes a blank. A period that no digit follows vanishes. Then a, an, the are
    dropped and zero to ten become digits, "none" being 0.

    Source: normalize_word in llava/eval/eval_metrics/glossary.py of microsoft/LLaVA-Med, v1.0.0.
    Left out: its table that turns "dont" into "don't".
    """
    digits = re.search(r"\d,\d", text)
    out = text
    for mark in _LLAVA_MED_PUNCTUATION:
        beside = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside or digits else " ")
    words = re.sub(r"\.(?!\d)", "", out).lower().split()
    words = [_LLAVA_MED_NUMBERS.get(word, word) for word in words]
    return " ".join(word for word in words if word not in ("a", "an", "the"))
