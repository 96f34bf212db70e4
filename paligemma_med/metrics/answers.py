"""When two answers are equal: the forms in which they are compared."""

import re
import string

_CLOSING = " .,;:!?。；：！？"
_MARK = re.compile("[、-〟〰！-／：-＠［-｀｛-･]")
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3001-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff9f\U00020000-\U0003ffff]"
)


def without_thought(text) -> str:
    """The answer that follows what MedGemma 1.5 may think first, between `<unused94>` and `<unused95>`; a thought that
    doesn't end has none."""
    return re.sub(r"\A\s*<unused94>.*?(?:<unused95>\s*|\Z)", "", text, flags=re.DOTALL)


def strict(text) -> str:
    """Lower case, no surrounding blanks."""
    return text.strip().lower()


def normalise(text) -> str:
    """The form in which answers are compared.

    Lower case; every comma (also the full-width `，` and the enumerating `、`) followed by one
    space and preceded by none; runs of white space become one space; surrounding white space and
    `. , ; : ! ?` (also full-width) at the end are dropped. Nothing else: articles, plurals, number
    words and the order of a list still count. An answer of such marks alone ("...") stays as it is, or an
    empty prediction would equal it.
    """
    form = re.sub(r"\s*[,，、]\s*", ", ", text.lower())
    form = re.sub(r"\s+", " ", form).strip()
    return form.rstrip(_CLOSING) or form


def is_empty(text) -> bool:
    """Whether a text has nothing but blanks and the marks that `normalise` drops."""
    return not text.translate(dict.fromkeys(map(ord, _CLOSING + "，、"))).strip()


def spaced(text) -> str:
    """The text with blanks around each character of scripts that write none between words: Chinese, Japanese,
    Thai, Lao, Khmer, Burmese. So what counts words counts characters there."""
    return _UNSPACED.sub(r" \g<0> ", text)


def is_mark(text) -> bool:
    """Whether a text is a punctuation mark of these scripts."""
    return bool(_MARK.fullmatch(text))


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
