"""Reads question-answer pairs from a language model's reply, in whatever form it wrote them.

The prompt asks for JSON. Small models rarely stick to it, so marked, numbered and two-line forms are read
too. Text that looks like a pair but isn't one is reported, never silently skipped; a pair that the end of
the reply cut off isn't used. Any text is read in linear time without raising.
"""

import collections
import dataclasses
import itertools
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any

import pydantic

from data_prep import qa_files
from paligemma_med.pp.rows import LETTERS

KINDS = ("pairs", "choices")
AGAIN = "pair that stands there before"
CUT = "pair that the reply's end cuts off"
_DEEPEST = 8  # levels of JSON within JSON; limits how often a text is read


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and its answer; for multiple choice also the options in the reply's order.

    `letter` is the right option's ("A" is choices[0]), "" without options; `answer` is its text.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    letter: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """The content of a reply.

    pairs: in the order of the text. rejected: (reason, text) of parts that only look like a pair.
    form: how the pairs were written: "json", "json fenced", "json in chatter", "json cut off", "json
    broken", a rule of `qa_files.parse_pairs`, "options" (lines A. to D.), or "" without any.
    problem: "" if there is a pair, else a clause for the next request to the model.
    """

    pairs: tuple[Pair, ...]
    rejected: tuple[tuple[str, str], ...]
    form: str
    problem: str


def read_reply(text: str, kind: str = "pairs", cut: bool = False) -> Reply:
    """Finds the pairs in a reply; never raises.

    Args:
      text: the model's reply, whole.
      kind: "pairs", or "choices" for multiple choice, whose pairs have four different options, one
        of them the answer.
      cut: the reply reached its maximum length (finish "length").
    """
    text = _said(_sound(text))
    pairs, rejected, form = _read_json(text, kind)
    if not pairs:
        read = _read_options if kind == "choices" else _read_lines
        pairs, form = read(text, cut, rejected)
    different: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        if different.setdefault((_same(pair.question), _same(pair.answer)), pair) is not pair:
            rejected.append((AGAIN, pair.question))
    problem = "" if different else _problem(text, rejected)
    return Reply(tuple(different.values()), tuple(rejected), form, problem)


def _problem(text: str, rejected: list[tuple[str, str]]) -> str:
    if not text.strip():
        return "it was empty"
    reasons = collections.Counter(r for r, _ in rejected if r != "no pair found")
    if not reasons:
        return "it held no question with an answer"
    return f"it held no usable pair: {reasons.most_common(1)[0][0]}"


def _sound(text: str) -> str:
    """The text without half surrogate pairs, which a file can't hold."""
    return text.encode("utf-8", "replace").decode()


def _said(text: str) -> str:
    """The text without the model's reasoning before its answer."""
    _, thought, said = text.rpartition("</think>")
    return said if thought else text.partition("<think>")[0]


# --- One pair ---

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_QUESTION_MARK = re.compile(r"\A(?:(?:Q|Question)\s?\d*+\s*+[:.)]|\d++[.)])\s++", re.IGNORECASE)
_ANSWER_MARK = re.compile(r"\A(?:A|Answer)\s?\d*+\s*+:\s++", re.IGNORECASE)
# With shuffled options "all of the above" and "both A and B" mean something else, or nothing.
_REFERS = re.compile(
    r"\b(?:all|none|both|neither|any|either) of (?:the|these|those|them)\b|"
    r"\b[A-D] (?:and|or|&) [A-D]\b|\bnone above\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\W{0,4}\b(?:(?i:option|choice)\s)?([A-Da-d])(?:[.):]++\**\s*+|\s*+$)")


def _tidy(text: str) -> str:
    return _CONTROLS.sub(" ", text).replace("**", "").strip()


def _pair(question: str, answer: str) -> Pair | str:
    """The pair, or why it isn't one."""
    question = _QUESTION_MARK.sub("", " ".join(_tidy(question).split()), count=1)
    answer = _ANSWER_MARK.sub("", _tidy(answer), count=1)
    for name, value in (("question", question), ("answer", answer)):
        if not any(map(str.isalnum, value)):
            return f"empty {name}"
    return Pair(question, answer)


def _same(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower())) or text.strip()


def _choice_pair(question: str, options: list[str], answers: list[str]) -> Pair | str:
    """A multiple-choice pair, or why it isn't one; `answers`: letters or texts, which must agree."""
    options = [" ".join(_tidy(o).split()) for o in options]
    labels = [_LABEL.match(o) for o in options]
    if all(labels) and sorted(m[1].upper() for m in labels) == list(LETTERS):
        options = [o[m.end() :] for m, o in sorted(zip(labels, options), key=lambda x: x[0][1])]
    if len(options) != 4 or len(set(map(_same, options))) != 4:
        return "other than four different options"
    if not all(any(map(str.isalnum, o)) for o in options):
        return "empty option"
    if any(_REFERS.search(o) for o in options):
        return "option that refers to others"
    letters = {_letter(a, options) for a in answers}
    if len(letters) != 1 or "" in letters:
        return "answer that is none of the options"
    letter = letters.pop()
    pair = _pair(question, options[LETTERS.index(letter)])
    if isinstance(pair, str):
        return pair
    # Answers are cleaned more than options, but the two must stay the same text.
    answer = options[LETTERS.index(letter)]
    return dataclasses.replace(pair, answer=answer, choices=tuple(options), letter=letter)


def _letter(answer: str, options: list[str]) -> str:
    """Which option an answer names, by letter, text or both; "" if none or several."""
    answer = " ".join(_tidy(answer).split())
    by_text = [x for x, o in zip(LETTERS, options) if _same(o) == _same(answer)]
    if by_text:
        return by_text[0]
    if not (label := _LABEL.match(answer)):
        return ""
    letter, rest = label[1].upper(), answer[label.end() :]
    agrees = not rest.strip() or _same(rest) == _same(options[LETTERS.index(letter)])
    return letter if agrees else ""


# --- JSON ---


def _text(value: Any) -> Any:
    """The text of a JSON value: true and false are answers too; lists and objects aren't."""
    if isinstance(value, bool):
        return "Yes" if value else "No"
    return _sound(value) if isinstance(value, str) else value


_Text = Annotated[str, pydantic.BeforeValidator(_text)]
_COERCE = pydantic.ConfigDict(coerce_numbers_to_str=True)


class _Item(pydantic.BaseModel):
    model_config = _COERCE
    question: _Text
    answer: _Text


class _ChoiceItem(pydantic.BaseModel):
    model_config = _COERCE
    question: _Text
    choices: Annotated[list[_Text], pydantic.BeforeValidator(lambda x: _options(x))]
    answers: list[_Text]


def _options(value: Any) -> Any:
    """{"A": …, "B": …} as a list in the order of the letters."""
    if isinstance(value, dict) and sorted(map(str.upper, value)) == list(LETTERS):
        return [value[k] for k in sorted(value, key=str.upper)]
    return value


_QUESTION_KEYS = ("question", "q", "questiontext")
_ANSWER_KEYS = ("answer", "a", "answertext", "response")
_CHOICES_KEYS = ("choices", "options", "answers", "answerchoices", "answeroptions")
_RIGHT_KEYS = "answer correctanswer correct answerletter correctoption correctchoice correctletter rightanswer".split()


def _read_json(text: str, kind: str) -> tuple[list[Pair], list[tuple[str, str]], str]:
    """(pairs, rejected, form) of all JSON in a text."""
    pairs, rejected, broken = [], [], False
    nodes, closed = _scan(text)
    for value, whole in _values(text, nodes):
        broken = broken or not whole
        for item in _items(value):
            pair = _validated(item, kind)
            if isinstance(pair, Pair):
                pairs.append(pair)
            else:
                rejected.append((pair, _sound(str(_first(item, _QUESTION_KEYS)))))
    objects = [(start, end) for start, end, _ in nodes if text[start] == "{"]
    if objects and objects[-1][1] is None and '"' in text[objects[-1][0] :]:
        rejected.append((CUT, text[objects[-1][0] :]))
    if not pairs:
        return [], rejected, ""
    if not closed:
        return pairs, rejected, "json cut off"
    if broken:
        return pairs, rejected, "json broken"
    roots = [node for node in nodes if node[2] is None]
    outside = "".join(text[a:b] for a, b in zip([0, *(n[1] for n in roots)], [*(n[0] for n in roots), len(text)]))
    if not outside.strip(" \t\r\n,"):
        return pairs, rejected, "json"
    return pairs, rejected, "json fenced" if "```" in outside else "json in chatter"


_OPEN = re.compile(r"[{\[]")
# Within JSON: a string (an unclosed one ends with its line), or a bracket.
_INSIDE = re.compile(r'"(?:[^"\\\n]|\\.)*+"?|[{}\[\]]', re.DOTALL)
_Node = list[Any]  # [start, end or None while open, number of the node around it or None]


def _scan(text: str) -> tuple[list[_Node], bool]:
    """(the {…} and […] of a text down to _DEEPEST, in order of opening; whether all of them close)."""
    nodes: list[_Node] = []
    stack: list[tuple[str, int | None]] = []
    at = 0
    while True:
        found = (_INSIDE if stack else _OPEN).search(text, at)
        if not found:
            return nodes, not stack
        at, mark = found.end(), found[0]
        if mark in "{[":
            number = None
            if len(stack) < _DEEPEST:
                number = len(nodes)
                nodes.append([found.start(), None, stack[-1][1] if stack else None])
            stack.append((mark, number))
        elif mark in "}]" and stack[-1][0] == "{["["}]".index(mark)]:
            _, number = stack.pop()
            if number is not None:
                nodes[number][1] = at


def _values(text: str, nodes: list[_Node]) -> Iterator[tuple[Any, bool]]:
    """(value, whether it is whole) of the outermost nodes that are JSON."""
    covered = 0
    has_inner = {n[2] for n in nodes}
    for number, (start, end, parent) in enumerate(nodes):
        if start < covered or end is None:
            continue
        chunk = text[start:end]
        value = _loads(chunk)
        whole = value is not None and parent is None
        if value is None and number not in has_inner and chunk[0] == "{":
            value = _fields(chunk)
        if value is not None:
            covered = end
            yield value, whole


def _loads(chunk: str) -> Any:
    """The JSON value, with surplus commas or not; None if it isn't JSON."""
    for attempt in (chunk, re.sub(r",\s*+(?=[}\]])", "", chunk)):
        try:
            return json.loads(attempt, strict=False)
        except (ValueError, RecursionError):
            pass
    return None


_FIELD = re.compile(r'"(\w[\w ]{0,30}+)"\s*+:\s*+"((?:[^"\\]|\\.)*+)"(?=\s*+(?:[,}"]))', re.DOTALL)


def _fields(chunk: str) -> dict[str, str] | None:
    """The texts of an object that isn't valid JSON (such as a missing comma), if they can be separated."""
    found = {k: v.replace('\\"', '"').replace("\\n", "\n") for k, v in _FIELD.findall(chunk)}
    return found or None


def _items(value: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Objects with a question in them, at any depth; keys in lower case, only letters."""
    if depth > _DEEPEST:
        return
    if isinstance(value, list):
        for x in value:
            yield from _items(x, depth + 1)
    if not isinstance(value, dict):
        return
    groups: dict[str, dict[str, Any]] = {}
    for key, x in value.items():
        number = re.search(r"\d*$", key.strip())[0]
        groups.setdefault(number, {})[re.sub(r"[^a-z]", "", key.lower())] = x
    # {"Q1": …, "A1": …, "Q2": …}: a question with a number is one of several.
    for item in groups.values():
        if any(isinstance(item.get(k), str) for k in _QUESTION_KEYS):
            yield item
    if questions := [k for k in value if k.rstrip().endswith("?")]:  # {"What …?": "…"}
        for key in questions:
            yield {"question": key, "answer": value[key]}
    for x in value.values():
        if isinstance(x, (list, dict)):
            yield from _items(x, depth + 1)


_LACKS = {
    "question": "answer without a question",
    "answer": "question without an answer",
    "answers": "question without an answer",
    "choices": "question without options",
}


def _validated(item: dict[str, Any], kind: str) -> Pair | str:
    """The pair that an object describes, or why it isn't one."""
    question = _first(item, _QUESTION_KEYS)
    try:
        if kind == "pairs":
            found = _Item(question=question, answer=_first(item, _ANSWER_KEYS))
            return _pair(found.question, found.answer)
        flat = [item.get(p + x) for p in ("choice", "option", "") for x in "abcd"]
        flat = next((flat[i : i + 4] for i in (0, 4, 8) if None not in flat[i : i + 4]), None)
        found = _ChoiceItem(
            question=question,
            choices=flat or _first(item, _CHOICES_KEYS),
            answers=[item[k] for k in _RIGHT_KEYS if item.get(k) is not None],
        )
        if not found.answers:
            return "question without an answer"
        return _choice_pair(found.question, found.choices, found.answers)
    except pydantic.ValidationError as e:
        where = str(e.errors(include_url=False, include_input=False)[0]["loc"][0])
        return _LACKS[where]


def _first(item: dict[str, Any], keys: Any) -> Any:
    return next((item[k] for k in keys if item.get(k) is not None), None)


# --- Lines ---


def _read_lines(text: str, cut: bool, rejected: list[tuple[str, str]]) -> tuple[list[Pair], str]:
    """Pairs in a text without JSON, and the form of the first."""
    found, refused = qa_files.parse_pairs(text)
    if cut and not text.endswith("\n"):
        # What the last line belongs to may be incomplete.
        short, _ = qa_files.parse_pairs(text.rpartition("\n")[0])
        same = itertools.takewhile(lambda x: x[0] == x[1], zip(short, found, strict=False))
        whole = [x for x, _ in same] if found else short
        refused += [(CUT, x[0]) for x in found[len(whole) :]]
        found = whole
    rejected += refused
    pairs, form = [], ""
    for question, answer, rule in found:
        pair = _pair(question, answer)
        if isinstance(pair, str):
            rejected.append((pair, f"{question} {answer}".strip()))
        else:
            pairs.append(pair)
            form = form or rule
    return pairs, form


# `A. …`, `(b) …`, `- **C)** …`, `D: …`
_OPTION = re.compile(r"\W{0,6}(?:(?i:option|choice)\s)?([A-Da-d])[.):]++\W{0,3}?\s++(\S.*)")
_INLINES = [re.compile(rf"(?:^|(?<=\s))\(?([A-D]){end}\s++") for end in (r"\)", r"\.", ":")]
_BEHIND = re.compile(r"\s\W{0,3}(?:correct\s)?answer\W", re.IGNORECASE)
_RIGHT = re.compile(
    r"\W{0,6}(?:the\s)?(?:correct\s|right\s)?(?:answer|option|choice)\W{0,4}?\s*+(?:is\b)?"
    r"(?:\*\*|\s|:)*+(?P<text>.*)",
    re.IGNORECASE,
)


def _read_options(text: str, cut: bool, rejected: list[tuple[str, str]]) -> tuple[list[Pair], str]:
    """Multiple choice as lines: a question, options A to D below or after it, "Answer: C"."""
    lines = text.splitlines()
    if cut and not text.endswith("\n"):
        lines = lines[:-1]
    found: list[tuple[list[str], list[str], list[str]]] = []  # question, options, answers
    for line in filter(str.strip, itertools.chain.from_iterable(map(_split, lines))):
        question, options, answers = found[-1] if found else ([], [], [])
        option, mark = _OPTION.fullmatch(line), qa_files.mark(line)
        if found and option and option[1].upper() == LETTERS[len(options) : len(options) + 1]:
            options.append(option[2])
        elif found and not answers and (right := _RIGHT.fullmatch(line)):
            answers.append(right["text"])
        elif found and options and not answers and mark and mark[0] == "A":
            answers.append(mark[2])
        elif mark and mark[0] == "Q":
            found.append(([mark[2]], [], []))
        elif "?" in line or _QUESTION_MARK.match(line):
            if found and not any(map(str.strip, found[-1][0])):
                question.append(line)  # below "Question 2:"
            else:
                found.append(([line], [], []))
        elif found and not options:
            question.append(line)
    pairs = []
    for question, options, answers in found:
        asked = " ".join(" ".join(question).split())
        if not options and not answers:
            pair = "question without options"
        elif not answers:
            pair = "question without an answer"
        else:
            pair = _choice_pair(asked, options, answers)
        if isinstance(pair, str):
            rejected.append((pair, asked))
        else:
            pairs.append(pair)
    return pairs, "options" if pairs else ""


def _split(line: str) -> list[str]:
    """A line that contains all options, split into lines: the text before, each option, the text after."""
    styles = ([*style.finditer(line)] for style in _INLINES)
    found = next((x for x in styles if [m[1] for m in x] == list(LETTERS)), None)
    if not found:
        return [line]
    starts = [m.start() for m in found]
    if behind := _BEHIND.search(line, starts[-1]):
        starts.append(behind.start())
    return [line[a:b].strip(" ,;") for a, b in itertools.pairwise([0, *starts, len(line)])]
