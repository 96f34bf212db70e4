"""Reads question-answer pairs about images: those that MedM's authors released, and our own JSONL.

The authors' files come from scripts that changed over time: JSON objects one after another without a
list around them, model output in which questions are marked in four ways, two schemas for ROCO, CSV with
line breaks inside cells. `read_qa` gives the same rows for all of them and counts what each rule kept and
why the rest was dropped, since a parser that skips silently skews a data set.
"""

import dataclasses
import json
import pathlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from data_prep import files
from data_prep.files import DataError
from data_prep.ledger import Ledger
from paligemma_med.pp import json_text, own_rows, tables

# A line that opens a question or an answer: `Q: …`, `**Q:** …`, `**Q: …**`, `Q1. …`, `2. Q: …`.
# Possessive quantifiers keep it fast on long lines of spaces.
_MARK = re.compile(
    r"""\s*+(?:[-*•]\s++|\#++\s*+|\d++[.)]\s*+)?   # a list's bullet or number, a heading
    (?P<bold>\*\*|__)?\s*+
    (?P<kind>Q|A|(?i:Question|Answer))\s?(?P<number>\d++)?\s*+
    (?:(?P<closed>(?:\*\*|__)\s*+:|:\s*+(?:\*\*|__))|:|(?(number)[.)](?=\s)|(?!)))\s*+
    (?P<text>.*)""",
    re.VERBOSE,
)
# The same as a heading only, `### Question 2` or `**Answer**`: its text is below it.
_HEADING = re.compile(
    r"\s*+(?:#++\s*+(?:\*\*|__)?|\*\*|__)\s*+"
    r"(?P<kind>(?i:Question|Answer))\s?(?P<number>\d++)?[.\s*_]*+"
)
# `Q: …? A: …` on one line.
_SECOND_MARK = re.compile(r"(?<=[?*.])\s++(?=(?:\*\*|__)?(?:A|Answer)\s?\d*+(?:\*\*|__)?:)")
_NUMBERED = re.compile(r"\s*+(?:\*\*|__)?\d++[.)]\s*+(?P<text>.*)")
_BULLET = re.compile(r"[-*•]\s++")
_VERBS = set(
    "is are was were am do does did has have had can could will would should may might must isn't "
    "aren't doesn't don't".split()
)
_REQUESTS = set(
    "describe explain name list identify discuss summarize summarise provide give tell compare "
    "outline state define interpret".split()
)
_IMAGE_SUFFIX = re.compile(r"\.(png|jpe?g|gif|tiff?|bmp|dcm)$", re.IGNORECASE)
_CHUNK = 1 << 20
_LONGEST_OBJECT = 1 << 24
_RAW_KEYS = ("qa_pairs_raw", "qa_pairs")
_EXPECTED = (
    "expected rows with image_id, question and answer, or with image_id and one of qa_pairs_raw, qa_pairs, qa_pair"
)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One question and its answer. `rule` says how it was found; `extra` holds the row's other fields."""

    question_id: str
    image_id: str
    question: str
    answer: str
    rule: str
    extra: dict[str, str]

    @property
    def answer_type(self) -> str:
        """ "OPEN" or "CLOSED": the row's own if it says so, else CLOSED for yes and no."""
        given = self.extra.get("answer_type", "").strip().upper()
        return given if given in ("OPEN", "CLOSED") else answer_type(self.answer)


def answer_type(answer: str) -> str:
    """ "CLOSED" if the answer is yes or no and nothing else, else "OPEN"."""
    return "CLOSED" if own_rows.is_yes_no(answer) else "OPEN"


def question_word(question: str) -> str:
    """The beginning of a question, as a question type for pairs that have none.

    "What", "Which", "Where", "When", "Who", "Why", "How", "How many"; "Yes or no" if a verb comes
    first ("Is there …"); "Describe" for requests; else "Other".
    """
    words = re.findall(r"[a-z']+", question.lower())
    if words and words[0] in _VERBS:
        return "Yes or no"
    if words and words[0] in _REQUESTS:
        return "Describe"
    for i, word in enumerate(words):
        if word in ("what's", "whats"):
            return "What"
        if word == "how" and words[i + 1 : i + 2] in (["many"], ["much"]):
            return "How many"
        if word in ("what", "which", "where", "when", "who", "whose", "why", "how"):
            return "Who" if word == "whose" else word.capitalize()
    return "Other"


def image_id(name: str) -> str:
    """`sample/MPX1_synpic2.png` -> `MPX1_synpic2`: without folder and image suffix."""
    return _IMAGE_SUFFIX.sub("", re.split(r"[/\\]", name.strip())[-1])


def parse_pairs(text: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Finds question-answer pairs in the free text of a language model; any text, linear time.

    A blank line ends an answer, unless it has no text yet; so closing remarks are left out.

    Returns:
      pairs: (question, answer, rule); the rule is the form of the question's mark:
        "Q:", "**Q: …**", "**Q:**", "Q1:" (bold or not), "heading" ("### Question 1", the text
        below); or in a text without such marks "? A:" (a question, numbered or not, before a
        marked answer), "1." (a numbered question, its answer behind it or below) or "unmarked"
        (paragraphs that are a question and an answer in turn).
      rejected: (reason, text) of what only looked like a part of a pair.
    """
    lines = text.splitlines()
    parts = _parts(lines, mark)
    if not parts:
        return _unmarked(text)
    if all(kind == "A" for kind, *_ in parts):
        parts = _parts(lines, lambda line: mark(line) or _bare_question(line))
    pairs, rejected, question = [], [], None
    for kind, rule, lines in parts:
        content = _joined(lines)
        if kind == "Q":
            if question:
                rejected.append(("question without an answer", question[0]))
            question = (" ".join(content.split()), rule)
        elif question is None:
            rejected.append(("answer without a question", content))
        else:
            pairs.append((question[0], content, question[1]))
            question = None
    if question:
        rejected.append(("question without an answer", question[0]))
    return pairs, rejected


def _parts(lines: list[str], opens: Any) -> list[tuple[str, str, list[str]]]:
    """(kind, rule, lines) of each part that a line opens; `opens(line)` is (kind, rule, text)."""
    parts, open_part = [], False
    for line in lines:
        if found := opens(line):
            kind, rule, content = found
            both = _SECOND_MARK.split(content, maxsplit=1) if kind == "Q" else [content]
            parts.append((kind, rule, both[:1]))
            if len(both) == 2:
                parts.append(("A", "", [mark(both[1])[2]]))
            open_part = True
        elif not line.strip():
            open_part = open_part and not any(part.strip("*_ ") for part in parts[-1][2])
        elif open_part:
            parts[-1][2].append(line)
    return parts


def _joined(lines: list[str]) -> str:
    return "\n".join(lines).replace("**", "").replace("__", "").strip()


def mark(line: str) -> tuple[str, str, str] | None:
    """("Q" or "A", rule, text after the mark) of a line that opens a question or an answer."""
    if found := _MARK.fullmatch(line):
        return found["kind"][0].upper(), _rule(found), found["text"]
    if found := _HEADING.fullmatch(line):
        return found["kind"][0].upper(), "heading", ""
    return None


def _bare_question(line: str) -> tuple[str, str, str] | None:
    """The same for an unmarked question, in texts where only answers are marked."""
    numbered = _NUMBERED.fullmatch(line)
    content = (numbered["text"] if numbered else line).strip(" *_#\t")
    return ("Q", "? A:", content) if "?" in content else None


def _rule(mark: re.Match) -> str:
    if mark["number"]:
        return "Q1:"
    if mark["closed"]:
        return "**Q:**"
    return "**Q: …**" if mark["bold"] else "Q:"


def _unmarked(text: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # "Here are the pairs:"
        lines = lines[1:]
    lines = [bare for line in lines if (bare := line.strip("*_# "))]
    questions, answers = lines[::2], lines[1::2]
    in_turn = len(questions) == len(answers) and all(
        q.endswith("?") and not a.endswith("?") for q, a in zip(questions, answers, strict=True)
    )
    numbered = [bool(_NUMBERED.fullmatch(line)) for line in lines]
    if not lines or not (in_turn or any(numbered)):
        return [], [("no pair found", " ".join(text.split()))]
    if in_turn and not any(numbered):
        return [(q, a, "unmarked") for q, a in zip(questions, answers, strict=True)], []
    return _numbered(text)


def _numbered(text: str) -> tuple[list[tuple[str, str, str]], list[tuple[str, str]]]:
    """Pairs of a numbered list; a number stands before each question, or before each line."""
    blocks, open_block = [], False
    for line in text.splitlines():
        if found := _NUMBERED.fullmatch(line):
            blocks.append([found["text"]])
            open_block = True
        elif not line.strip():
            # The answer may be a separate paragraph below its question.
            open_block = open_block and len(blocks[-1]) == 1 and blocks[-1][0].strip(" *_")[-1:] == "?"
        elif open_block:
            blocks[-1].append(_BULLET.sub("", line.strip(), count=1))
    pairs, rejected, question = [], [], None
    for first, *below in blocks:
        at = first.rfind("?") + 1
        asked, behind = first[:at].strip(" *_"), first[at:].strip(' *_"”)')
        answer = _joined([behind, *below])
        if at and question:
            rejected.append(("question without an answer", question))
            question = None
        if at and answer:
            pairs.append((" ".join(asked.split()), answer, "1."))
        elif at:
            question = asked
        elif question:
            pairs.append((" ".join(question.split()), answer, "1."))
            question = None
        else:
            rejected.append(("numbered text without a question", answer))
    if question:
        rejected.append(("question without an answer", question))
    if not pairs:
        rejected = [("no pair found", " ".join(text.split())), *rejected]
    return pairs, rejected


def _open(path: pathlib.Path) -> Any:
    """An open text file, after checking that it exists, isn't empty and isn't an LFS pointer."""
    try:
        with open(path, "rb") as f:
            head = f.read(200)
    except OSError as e:
        raise DataError(f"{path}: question-answer pairs can't be read ({e.strerror})") from None
    if files.is_lfs_pointer(head):
        raise DataError(f"{path}: {files.lfs_message('question-answer pairs')}")
    if not head.strip():
        raise DataError(f"{path}: the file is empty; {_EXPECTED}")
    return open(path, encoding="utf-8-sig", newline="")


def iter_objects(path: pathlib.Path | str) -> Iterator[dict[str, Any]]:
    """Yields the objects of a JSON list, of JSON Lines, or of objects that just follow each other.

    Only a list is held in memory entirely.

    Raises:
      DataError: not UTF-8, not JSON (with the line), or something other than objects.
    """
    path = pathlib.Path(path)
    with _open(path) as f:
        if _first_letter(f) == "[":
            content = files.read_json(path, "question-answer pairs")
            for i, row in enumerate(content):
                if not isinstance(row, dict):
                    raise DataError(f"{path} row {i}: found {row!r:.60}; {_EXPECTED}")
            yield from content
            return
        f.seek(0)
        yield from _following(f, path)


def _first_letter(f: Any) -> str:
    try:
        for line in f:
            if line.strip():
                return line.strip()[0]
    except UnicodeDecodeError:
        pass  # reported when the file is read on
    return ""


def _following(f: Any, path: pathlib.Path) -> Iterator[dict[str, Any]]:
    decoder, space = json_text.decoder(constants=True), re.compile(r"[\s,\ufeff]*")
    buffer, line, more = "", 1, True
    while more or buffer:
        try:
            chunk = f.read(_CHUNK)
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 text ({e.reason}); {_EXPECTED}") from None
        buffer, more, at = buffer + chunk, bool(chunk), 0
        while (at := space.match(buffer, at).end()) < len(buffer):
            try:
                found, end = decoder.raw_decode(buffer, at)
                json_text.check(found, buffer[at:end])
            except json.JSONDecodeError as e:
                if more and len(buffer) - at < _LONGEST_OBJECT:
                    break  # it may go on in the next chunk
                number = line + buffer.count("\n", 0, e.pos)
                raise DataError(f"{path}: not valid JSON at line {number} ({e.msg}); {_EXPECTED}") from None
            except RecursionError:
                raise DataError(f"{path}: JSON nested too deeply; {_EXPECTED}") from None
            except ValueError as e:
                number = line + buffer.count("\n", 0, at)
                raise DataError(f"{path} line {number}: found {e}; {_EXPECTED}") from None
            if not isinstance(found, dict):
                number = line + buffer.count("\n", 0, at)
                raise DataError(f"{path} line {number}: found {found!r:.60}; {_EXPECTED}")
            yield found
            at = end
        line += buffer.count("\n", 0, at)
        buffer = buffer[at:]


def _csv_rows(path: pathlib.Path, ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a CSV file with a header; cells may hold line breaks."""
    with _open(path) as f:
        try:
            header, rows = tables.read(f, path, error=DataError)
            if missing := [k for k in ("image_id", "question", "answer") if k not in header]:
                raise DataError(
                    f"{path}: no column {', '.join(missing)} in the header {','.join(header)!r:.80}; {_EXPECTED}"
                )
            for line, row in rows:
                if isinstance(row, str):
                    ledger.read("records")
                    ledger.drop("records", row, f"{path.name} line {line}")
                    continue
                # The index column that pandas writes has no name.
                yield f"line {line}", {k: v for k, v in row.items() if k}
        except UnicodeDecodeError as e:
            raise DataError(f"{path}: not UTF-8 text ({e.reason}); {_EXPECTED}") from None


def qa_ledger() -> Ledger:
    """The ledger of `read_qa`: "records" (objects or rows) and the "pairs" in them, by rule."""
    return Ledger(("records", "pairs"), ("rule",))


def read_qa(paths: pathlib.Path | str | Sequence[pathlib.Path | str], ledger: Ledger | None = None) -> Iterator[Pair]:
    """Yields the question-answer pairs of one or several files in their order, each once.

    Args:
      paths: `.csv` with a header, or JSON of any form that `iter_objects` reads. Rows are one of
        {image_id, question, answer, …}           ours, ROCO test, MedM's csv files
        {image_id, "original caption", qa_pair}   ROCO valid; the caption is the answer
        {image_id, qa_pairs_raw | qa_pairs, …}    MedPix; pairs in a model's free text
      ledger: from `qa_ledger`; counts each record and each pair.

    Dropped: pairs with an empty side, duplicates of earlier pairs, what `parse_pairs` rejects.
    Texts lose surrounding spaces and `**`; questions become one line. A row's `question_id` is
    kept; otherwise it is the image id and the pair's number within the image.

    Raises:
      DataError: unreadable, none of the schemas above, or a duplicate question_id.
    """
    paths = [paths] if isinstance(paths, (str, pathlib.Path)) else paths
    ledger = ledger or qa_ledger()
    per_image, seen, raw_images, ids = Counter(), set(), set(), set()
    for where, record in _records(paths, ledger):
        ledger.read("records")
        image, found, rejected, extra = _pairs_of(record, where)
        if not image:
            ledger.drop("records", "no image id", where)
            continue
        if any(k in record for k in _RAW_KEYS):
            if image in raw_images:
                ledger.flag("records", "another record of the same image", image)
            raw_images.add(image)
        for reason, text in rejected:
            if reason == "no pair found":
                ledger.drop("records", reason, image)
            else:
                ledger.read("pairs")
                ledger.drop("pairs", reason, f"{image}: {text[:60]}")
        if found:
            ledger.keep("records", {"image_id": image})
        for question, answer, rule in found:
            ledger.read("pairs")
            per_image[image] += 1
            question_id = extra.get("question_id") or f"{image}_{per_image[image]}"
            if question_id in ids:
                raise DataError(f"{where}: question_id {question_id!r} is used before; expected each once")
            ids.add(question_id)
            if "\n" in question.strip():
                ledger.flag("pairs", "question on several lines, joined", question_id)
            question = " ".join(question.replace("**", "").split())
            answer = answer.replace("**", "").strip()
            if not _has_text(question) or not _has_text(answer):
                which = "answer" if _has_text(question) else "question"
                ledger.drop("pairs", f"empty {which}", question_id)
                continue
            again = extra.get("repeat")  # written by data_prep.curate, on purpose
            key = hash((image, question, answer, again))
            if key in seen:
                ledger.drop("pairs", "the same question and answer again", question_id)
                continue
            seen.add(key)
            key = hash((image, question, again))
            if key in seen:
                ledger.flag("pairs", "asked again about the image, other answer", question_id)
            seen.add(key)
            if not question.endswith(("?", ".", ":")):
                ledger.flag("pairs", "question without a question mark", question_id)
            pair = Pair(question_id, image, question, answer, rule, extra)
            ledger.keep("pairs", {"image_id": image, "answer_type": pair.answer_type, "rule": rule})
            yield pair


def _records(paths: Sequence[pathlib.Path | str], ledger: Ledger) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and place, record) of all files."""
    for path in (pathlib.Path(p).expanduser() for p in paths):
        if path.suffix.lower() == ".csv":
            records = _csv_rows(path, ledger)
        else:
            records = ((f"record {i}", r) for i, r in enumerate(iter_objects(path)))
        yield from ((f"{path} {where}", record) for where, record in records)


def _has_text(text: str) -> bool:
    return any(c.isalnum() for c in text)


def _pairs_of(record: dict[str, Any], where: str) -> tuple[str, list, list, dict[str, str]]:
    """(image id, pairs, rejected, other fields as text) of one record."""
    used = {"image_id", "question", "answer", "qa_pair", "original caption", *_RAW_KEYS}
    extra = {
        k: str(v)
        for k, v in record.items()
        if k not in used and isinstance(v, (str, int, float)) and not isinstance(v, bool)
    }
    text = {k: v if isinstance(v, str) else str(v) for k, v in record.items() if v is not None}
    image, rejected = image_id(text.get("image_id", "")), []
    if raw := next((k for k in _RAW_KEYS if k in record), None):
        pairs, rejected = parse_pairs(text.get(raw, ""))
        extra.pop("question_id", None)  # one record, several questions
    elif "qa_pair" in record:
        pairs = [(text.get("qa_pair", ""), text.get("original caption", ""), "caption")]
    elif "question" in record and "answer" in record:
        pairs = [(text.get("question", ""), text.get("answer", ""), "columns")]
    else:
        raise DataError(f"{where}: found the keys {', '.join(record)}; {_EXPECTED}")
    if "image_id" not in record:
        raise DataError(f"{where}: no image_id in {', '.join(record)}; {_EXPECTED}")
    return image, pairs, rejected, extra
