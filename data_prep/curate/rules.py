"""The rules of the filter: each looks at one row and says why it should be dropped, if so.

A config lists them by name with their settings, so that a corpus can be filtered differently without
changing code. The measurement, number and history rules are what MedM's prompt forbade its language
model, in vain; the others come from looking at its output.
"""

import dataclasses
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_prep import qa_files
from data_prep.curate.words import SMALL, as_words, content_words, words
from data_prep.files import DataError

Row = Mapping[str, Any]
# Why the row should be dropped (None: it may stay), and a score to store with it, or None.
Verdict = tuple[str | None, float | None]
RULES: dict[str, Callable[..., Callable[[Row], Verdict]]] = {}
PASS: Verdict = (None, None)


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule with its settings: `check(row)` gives its verdict; reports show `name`."""

    name: str
    check: Callable[[Row], Verdict]


def rule(make: Callable[..., Callable[[Row], Verdict]]) -> Callable[..., Callable[[Row], Verdict]]:
    """Registers a maker of rules under its name; its keyword arguments are the settings."""
    RULES[make.__name__] = make
    return make


def make_rules(specs: Sequence[Mapping[str, Any]]) -> list[Rule]:
    """Rules from a config's list of {"rule": name, setting: value, ...}; "name" is for reports.

    Raises:
      DataError: an unknown rule or setting, a wrong value, or a name used twice.
    """
    made: list[Rule] = []
    for i, spec in enumerate(specs):
        settings = dict(spec)
        kind = settings.pop("rule", None)
        name = settings.pop("name", kind)
        if kind not in RULES:
            raise DataError(f"rules[{i}] is {kind!r}; known rules: {', '.join(sorted(RULES))}")
        known = inspect.signature(RULES[kind]).parameters
        if unknown := [k for k in settings if k not in known]:
            raise DataError(
                f"rules[{i}] ({kind}): unknown setting {', '.join(unknown)}; it has {', '.join(known) or 'none'}"
            )
        if name in [r.name for r in made]:
            raise DataError(f"rules[{i}]: a second rule {name!r}; give it another name=")
        try:
            made.append(Rule(name, RULES[kind](**settings)))
        except (TypeError, ValueError, re.error, OverflowError, RecursionError) as e:
            raise DataError(f"rules[{i}] ({kind}): {e}") from None
    return made


def _regex(patterns: Sequence[str]) -> re.Pattern:
    return re.compile("|".join(f"(?:{p})" for p in patterns), re.IGNORECASE | re.MULTILINE)


def _found(regex: re.Pattern, row: Row, fields: Sequence[str]) -> Verdict:
    """Drops a row if the regex matches in one of its fields; the reason quotes the match."""
    for field in fields:
        if match := regex.search(str(row.get(field) or "")):
            return f"{field}: {' '.join(match[0].split())!r:.60}", None
    return PASS


BOTH = ("question", "answer")


@rule
def pattern(patterns: Sequence[str], fields: Sequence[str] = BOTH) -> Callable[[Row], Verdict]:
    """Drops rows in which one of the regular expressions matches (case doesn't matter)."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("no patterns; expected at least one regular expression")
    regex = _regex(patterns)
    return lambda row: _found(regex, row, fields)


@rule
def empty(
    fields: Sequence[str] = ("question", "answer", "image_id"),
    nothing: Sequence[str] = ("n/a", "na", "nan", "none", "null", "unknown", "not available"),
) -> Callable[[Row], Verdict]:
    """Drops rows with a field that is missing, without letters or digits, or says "N/A"."""
    nothing = {" ".join(words(n)) for n in nothing}

    def check(row):
        for field in fields:
            found = " ".join(words(str(row.get(field) or "")))
            if not found or found in nothing:
                return f"{field}: {str(row.get(field) or '')!r:.40}", None
        return PASS

    return check


@rule
def length(
    min_question_words: int = 2,
    max_question_words: int = 60,
    min_answer_words: int = 1,
    max_answer_words: int = 60,
    max_answer_chars: int = 600,
) -> Callable[[Row], Verdict]:
    """Drops rows whose question or answer is too short or too long, in words and characters."""
    limits = {
        "question": (min_question_words, max_question_words),
        "answer": (min_answer_words, max_answer_words),
    }

    def check(row):
        for field, (least, most) in limits.items():
            n = len(str(row.get(field) or "").split())
            if not least <= n <= most:
                return f"{field}: {n} words", None
        n = len(str(row.get("answer") or ""))
        return (f"answer: {n} characters", None) if n > max_answer_chars else PASS

    return check


@rule
def question_form(
    starts: Sequence[str] = ("describe", "list", "name", "identify", "explain", "compare", "state"),
) -> Callable[[Row], Verdict]:
    """Drops questions on several lines, and those without "?" that don't start like a request."""

    def check(row):
        text = str(row.get("question") or "").strip()
        if "\n" in text:
            return "question: several lines", None
        if not text.rstrip("\"'”’*) ").endswith("?") and text.lower().split()[:1] not in [[s] for s in starts]:
            return f"question: no question mark, {text[-30:]!r}", None
        return PASS

    return check


_NUMBER = r"\d+(?:[.,]\d+)?"
_UNIT = (
    r"(?:[µμumck]?m[23²³]?|millimet\w+|centimet\w+|inch(?:es)?|c\.?c\.?|[mdµμ]?l|millilit\w+|"
    r"lit(?:er|re)s?|[mkµμ]?g|kilograms?|hu|hounsfield\w*|mmhg|bpm|kvp?|mas|mgy|msv|[mgk]?hz|"
    r"m?sec(?:onds?)?|min(?:ute)?s?|hours?|days?|weeks?|months?|years?|fr(?:ench)?|"
    r"degrees?|percent)(?![\w])|%|°"
)
MEASURES = (
    rf"(?<![\w.]){_NUMBER}(?:\s*[-–x×]\s*{_NUMBER})*[\s-]*(?:{_UNIT})",
    rf"(?<![\w.]){_NUMBER}\s*[x×]\s*{_NUMBER}",
)
MEASURE_QUESTIONS = (
    r"\bhow (?:many|much|large|big|small|long|wide|tall|thick|deep|far|high|heavy|dense)\b",
    r"\bwhat (?:is|are|was|were) (?:the|its|their) (?:\w+ ){0,2}?(?:size|diameter|length|width|"
    r"height|thickness|volume|measurements?|dimensions?|distance|angle|number|depth|weight)\b",
    r"\bwhat (?:size|number|percentage|measurement)\b",
)


@rule
def measurement(
    questions: Sequence[str] = MEASURE_QUESTIONS,
    values: Sequence[str] = MEASURES,
    fields: Sequence[str] = BOTH,
) -> Callable[[Row], Verdict]:
    """Drops questions that ask for a size or count, and rows in which a number has a unit."""
    ask, value = _regex(questions), _regex(values)

    def check(row):
        found = _found(ask, row, ("question",))
        return found if found[0] else _found(value, row, fields)

    return check


# Digits that are part of names, not amounts: vertebrae, MRI weightings, isotopes, stages, "third rib".
NAMES_WITH_DIGITS = (
    r"\b(?:type|grade|stage|segment|class|level|group|zone|phase|category|figure|rib|vertebrae?|"
    r"neurofibromatosis|trisomy|chromosome)"
    r"s? \d+[a-d]?\b",
    r"\b\d+(?:st|nd|rd|th)\b",
    r"\b\d-?d\b|\b\d[- ](?:chamber|vessel|view)\b",
    r"\b\d+m?[- ]?(?:f|tc|ga|in|i|fdg)\b[- ]?",
    r"\b[a-z]+-?\d+(?:[-–/]?[a-z]*\d+)*[a-z*]?\b",
)


@rule
def numbers(
    fields: Sequence[str] = ("answer",), allowed: Sequence[str] = NAMES_WITH_DIGITS
) -> Callable[[Row], Verdict]:
    """Drops rows with a free-standing number, except for names that match `allowed` expressions."""
    names, number = _regex(allowed), re.compile(rf"{_NUMBER}\b")

    def check(row):
        for field in fields:
            if match := number.search(names.sub(" ", str(row.get(field) or ""))):
                return f"{field}: {match[0]!r}", None
        return PASS

    return check


HISTORY = (
    r"\b(?:medical|clinical|family|surgical|social|past|patient(?:'s)?|travel|smoking) history\b",
    r"\bhistory of\b",
    r"\b\d+[- ]?(?:year|yr|month|week|day)s?[- ]?olds?\b",
    r"\b(?:how old|what age|at what age)\b",
    r"\bpatient(?:'s)? (?:age|sex|gender|name|race|ethnicity|occupation|date of birth)\b",
    r"\b(?:age|sex|gender|race|ethnicity|occupation) of (?:the|this) "
    r"(?:patient|person|woman|man|boy|girl|child|infant)\b",
    r"\b(?:is|was) (?:the|this) patient (?:an? )?(?:male|female|man|woman|boy|girl|child)\b",
    r"\bchief complaint\b|\bpresenting (?:complaint|symptom)",
    r"\bpatient (?:\w+ ){0,3}(?:present(?:s|ed|ing)?|report(?:s|ed)|complain(?:s|ed)|denie[sd])\b",
)


@rule
def patient_history(patterns: Sequence[str] = HISTORY, fields: Sequence[str] = BOTH) -> Callable[[Row], Verdict]:
    """Drops rows about the patient's history, age, sex or complaints: no image shows them."""
    return pattern(patterns, fields)


REFUSALS = (
    r"\bas an? (?:ai|artificial intelligence|(?:large )?language model)\b",
    r"\bi(?:'m|’m| am) (?:sorry|unable|not able|just an? ai|an? ai)\b",
    r"\bi (?:can't|can’t|cannot|can not|couldn't|could not|don't|don’t|do not|am unable to) "
    r"(?:provide|answer|see|determine|have|assist|help|generate|create|fulfill|access|view|find)\b",
    r"\b(?:seek|consult|not) (?:\w+ ){0,4}(?:medical advice|healthcare (?:provider|professional))",
)
CHATTER = (
    r"^\s*(?:sure|certainly|of course|absolutely|okay|great)\b\s*[,!:.]",
    r"^\s*here(?:'s|’s| is| are)\b",
    r"\bhope (?:this|that) helps\b|\blet me know\b|\bfeel free\b|\bplease (?:note|provide|let)\b",
    r"^\s*note ?:",
    r"\bquestion[- ]answer pairs?\b|\bopen-ended questions?\b|\b(?:generated?|rephrased?) question",
)
META = (
    r"\b(?:the|this|that|your) (?:\w+ )?(?:caption|passage|prompt|snippet)\b",
    r"\b(?:mentioned|stated|described|provided|given|according to|as per|based on|in) "
    r"(?:\w+ ){0,4}?(?:caption|text|(?:the|provided|given) context(?! of)|passage|abstract|"
    r"disease discussion|"
    r"case (?:information|description|details|report|discussion))\b",
    r"\b(?:provided|given) (?:medical )?(?:information|description|context|text)\b",
)
MARKUP = (
    r"\*\*|```|<\|?/?\w+\|?>|\[/?INST\]|^\s*#+ |\\n",
    r"^\s*(?:\d+[.)] *)?(?:q|a|question|answer) ?\d* ?[:.)] ",
)


@rule
def chatter(
    patterns: Sequence[str] = REFUSALS + CHATTER + META + MARKUP, fields: Sequence[str] = BOTH
) -> Callable[[Row], Verdict]:
    """Drops a chatbot's refusals, greetings, remarks on "the caption", and left-over markup."""
    return pattern(patterns, fields)


@rule
def answer_leak(max_share: float = 0.8, min_words: int = 3) -> Callable[[Row], Verdict]:
    """Drops rows whose question already contains the answer.

    Score: the share of the answer's content words that occur in the question. An answer with fewer than
    `min_words` of them leaks if the question has all its words ("Which leg is the left one?", "The left
    leg"), unless the question offers a choice: "Is it left or right?" contains every right answer.
    """
    if not 0 < max_share <= 1:
        raise ValueError(f"max_share is {max_share}; expected above 0 and at most 1")

    def check(row):
        texts = [str(row.get(field) or "") for field in BOTH]
        question, answer = map(content_words, texts)
        share = len(answer & question) / max(len(answer), 1)
        leaks = len(answer) >= min_words and share >= max_share
        if len(answer) < min_words and qa_files.question_word(texts[0]) != "Yes or no":
            asked, said = set(words(texts[0])), set(words(texts[1])) - SMALL
            if said and said <= asked and "or" not in asked:
                return "all of the answer in the question", round(share, 4)
        return (f"{share:.2f} of the answer in the question" if leaks else None), round(share, 4)

    return check


@rule
def not_in_source(
    min_share: float = 0.5, min_words: int = 2, fields: Sequence[str] = ("caption",), stem: int = 5
) -> Callable[[Row], Verdict]:
    """Drops rows whose answer says something that neither the source nor the question says.

    Score: the share of the answer's content words that occur in one of `fields` or in the question; words
    count as equal if their first `stem` letters are (calcified, calcification). Synonyms count as absent,
    so a low share is a hint and not a proof.
    """
    if not 0 < min_share <= 1 or stem < 1:
        raise ValueError(f"min_share is {min_share}, stem {stem}; expected above 0 and at most 1, and 1 or more")

    def stems(text):
        return {w[:stem] for w in content_words(text)}

    def check(row):
        answer = stems(str(row.get("answer") or ""))
        there = stems(" ".join(str(row.get(field) or "") for field in ("question", *fields)))
        share = len(answer & there) / len(answer) if answer else 1.0
        made_up = len(answer) >= min_words and share < min_share
        return (f"{share:.2f} of the answer in the source" if made_up else None), round(share, 4)

    return check


@rule
def copied_example(fields: Sequence[str] = ("caption",)) -> Callable[[Row], Verdict]:
    """Drops copies of the example pairs that the language model was shown, unless a source says the same.

    An example's question with another answer is dropped if the answer has words that no source has. A
    row's "example_pairs" holds the examples as made by `words.as_words`; `fields` hold the source's text.
    """

    def check(row):
        question, answer = (str(row.get(field) or "") for field in BOTH)
        shown, pair = row.get("example_pairs") or (), as_words(question, answer)
        said = content_words(answer)
        if pair not in shown and not (said and pair[0] in {asked for asked, _ in shown}):
            return PASS
        told = content_words(" ".join(str(row.get(field) or "") for field in fields))
        return PASS if said and said <= told else (f"{question!r:.60}", None)

    return check


# Frequent short words that are rare or absent in the other languages.
FUNCTION_WORDS = {
    "en": "the of and is are with this that what which for by from was were shows showing an there "
    "does as at be has no it in on to",
    "fr": "le la les des du une est et dans avec sur par pour montrant sans aux au chez ce cette",
    "de": "der die das und ist mit von eine einer eines des dem den im zur zum nicht bei auf",
    "es": "el los las del una con por para que muestra en se y sin como",
    "it": "il della dello delle di che una con nel nella sono gli dei mostra",
    "pt": "os da do dos uma com em na não por para mostrando ao pela",
    "nl": "het een van en met op de dat niet bij voor is",
}
SCRIPTS = {"zh": r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]", "ru": r"[\u0400-\u04ff]", "ar": r"[\u0600-\u06ff]"}


@rule
def language(
    allowed: Sequence[str] = ("en",), min_hits: int = 2, fields: Sequence[str] = BOTH
) -> Callable[[Row], Verdict]:
    """Drops rows in which a field is in a language that isn't allowed, judging by short words.

    A field is in another language if at least `min_hits` of its words are function words there and
    more than in any allowed one, or if a third of its letters are of another script.
    """
    known = {code: frozenset(text.split()) for code, text in FUNCTION_WORDS.items()}
    if unknown := [c for c in allowed if c not in known and c not in SCRIPTS]:
        raise ValueError(f"unknown language {', '.join(unknown)}; known: {[*known, *SCRIPTS]}")
    scripts = {code: re.compile(text) for code, text in SCRIPTS.items() if code not in allowed}

    def check(row):
        for field in fields:
            text = str(row.get(field) or "")
            letters = sum(map(str.isalpha, text))
            for code, script in scripts.items():
                if letters and len(script.findall(text)) > letters / 3:
                    return f"{field}: {code}", None
            found = words(text)
            hits = {code: sum(w in own for w in found) for code, own in known.items()}
            code = max(hits, key=lambda c: (hits[c], c in allowed))
            if code not in allowed and hits[code] >= min_hits:
                return f"{field}: {code}", None
        return PASS

    return check
