"""Rows of PMC-VQA's tables, and the question that one row gives.

The two releases name their columns differently (v1: `Answer` is the text, `Answer_label` the
letter; v2: `Answer` is the letter), and the texts carry leftovers of how they were generated: `A:`
before options, quotes, odd spaces.
"""

import dataclasses
import pathlib
import re
import unicodedata
from collections.abc import Iterator

from data_prep import files
from data_prep.files import DataError
from paligemma_med.pp import tables
from paligemma_med.pp.rows import ANSWER_LETTER, CHOICES

LETTERS = "ABCD"
_NEEDED = ("figure path", "question", "answer", *(f"choice {c.lower()}" for c in LETTERS))
_MISSPELT = {"anwser": "answer", "anwser label": "answer label"}
_REFERS = re.compile(r"\b(of|among) (the following|these)\b|\bthe following (options?|choices?)\b")


@dataclasses.dataclass
class Question:
    """One row. `features` are texts; `dropped` says why it can't be used, if so.

    `image` is the path in the table with `/`, `paper` the article's id or the image's name; `found` says
    whether the image exists, also for dropped rows.
    """

    question_id: str
    image: str = ""
    paper: str = ""
    found: bool = False
    features: dict[str, str] = dataclasses.field(default_factory=dict)
    dropped: str = ""
    flags: list[str] = dataclasses.field(default_factory=list)


def _column(name: str) -> str:
    name = re.sub(r"[\W_]+", " ", name).strip().lower()
    return _MISSPELT.get(name, name)


def read_table(path: pathlib.Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yields (row number from 0, fields by column) of a CSV file; None for a row of another width.

    Columns are named in lower case with single spaces: "figure path", "choice a". No text counts as a
    missing value: "NA" and "None" are texts.

    Raises:
      DataError: missing, a git-LFS pointer, a needed column missing, or a quote never closed.
    """
    try:
        with open(path, "rb") as f:
            if files.is_lfs_pointer(f.read(200)):
                raise DataError(f"{path}: {files.lfs_message('a CSV table')}")
        f = open(path, encoding="utf-8-sig", errors="replace", newline="")
    except OSError as e:
        raise DataError(f"{path}: can't be read ({e.strerror or e}); expected a table") from None
    with f:
        header, rows = tables.read(f, path, error=DataError)
        columns = [_column(c) for c in header]
        if missing := [c for c in _NEEDED if c not in columns]:
            raise DataError(
                f"{path}: column {', '.join(map(repr, missing))} missing; expected PMC-VQA's "
                f"Figure_path, Question, Answer, Choice A to D; found {', '.join(columns)}"
            )
        for i, (_, row) in enumerate(rows):
            if row == tables.TOO_LONG:
                raise DataError(f"{path} row {i}: not CSV ({row}); expected a table whose quotes are closed")
            yield i, None if isinstance(row, str) else dict(zip(columns, row.values()))


def clean(text: str) -> str:
    """The text without odd or repeated spaces, and without surrounding or left-over quotes."""
    # split() doesn't treat format characters (zero-width spaces, byte-order marks) as spaces.
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    text = " ".join(text.split())
    while len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1].strip()
    return text.strip('"').strip() if text.count('"') == 1 else text


def _option(text: str) -> tuple[str, str]:
    """(letter that stands before the option, or ""; the option)."""
    text = clean(text)
    named = re.match(r"([A-D])\s?[:：]", text)
    return (named[1], clean(text[named.end() :])) if named else ("", text)


def _letter(label: str) -> str:
    """The letter in `B`, ` b `, `"B"`, `B:`, `(B)` or `B: Focal uptake`; else ""."""
    label = clean(label)
    if re.fullmatch(r"\(?[A-Da-d]\)?[:.]?", label):
        return label.strip("():.").upper()
    return _option(label)[0]


def parse(row: dict[str, str] | None, question_id: str, where: str, *, blank: bool) -> Question:
    """Makes a question from a table's row.

    Args:
      row: from `read_table`.
      question_id: its id.
      where: names file and row in errors.
      blank: the question will be asked without its options, which then needn't be valid.

    Raises:
      DataError: the image's path leaves the folder.
    """
    q = Question(question_id)
    if row is None:
        q.dropped = "another number of columns than the header"
        return q
    q.image = row["figure path"].strip().replace("\\", "/")
    if not q.image:
        q.dropped = "no image named"
        return q
    try:
        files.path_inside("images", q.image)
    except DataError as e:
        raise DataError(f"{where}: Figure_path: {e}") from None
    name = q.image.rsplit("/", 1)[-1]
    paper = re.match(r"PMC\d+", name)
    q.paper = paper[0] if paper else name

    question = clean(row["question"])
    named, options = zip(*(_option(row[f"choice {c.lower()}"]) for c in LETTERS))
    # v1 has the letter in a separate column, v2 instead of the text.
    letter, text = _letter(row.get("answer label", "")), _option(row["answer"])[1]
    if not letter and (letter := _letter(row["answer"])):
        text = ""
    same = [c for c, o in zip(LETTERS, options) if o and o.casefold() == text.casefold()]
    if not letter and len({options[LETTERS.index(c)].casefold() for c in same}) == 1:
        letter = same[0]
        q.flags.append("answer found by its text, not by a letter")
    elif letter and same and letter not in same:
        q.flags.append("letter and text of the answer disagree; the letter counts")

    if not question:
        q.dropped = "empty question"
    elif any(n not in ("", c) for n, c in zip(named, LETTERS)):
        q.dropped = "options under wrong letters"
    elif not letter:
        q.dropped = "no option is named as the answer"
    elif not (answer := options[LETTERS.index(letter)]):
        q.dropped = "the answer is an empty option"
    elif not blank and not all(options):
        q.dropped = "empty option"
    elif not blank and sum(o.casefold() == answer.casefold() for o in options) > 1:
        q.dropped = "two options are the answer"
    if q.dropped:
        return q
    if len({o.casefold() for o in options}) < len(options):
        q.flags.append("two options alike")
    if blank and _REFERS.search(question.casefold()):
        q.flags.append("the question refers to its options")
    caption = " ".join(row.get("caption", "").split())
    if "\ufffd" in "".join((question, *options, caption)):
        q.flags.append("characters that are not UTF-8")
    q.features = {
        "question": question,
        "answer": answer,
        "answer_type": "OPEN" if blank else "CLOSED",
        ANSWER_LETTER: letter,
        **dict(zip(CHOICES, options)),
        "caption": caption,
        "question_id": question_id,
        "image_id": q.image,
        "paper_id": q.paper,
    }
    return q
