"""A row of an own table: what its columns are called, and what is made up of what it lacks."""

import hashlib
import re
from collections.abc import Mapping, Sequence

from paligemma_med.pp import json_text, rows, table_forms

# Columns with a meaning, whose names may be written in any case.
KNOWN = ("image", "split", "patient_id", "choices", rows.ANSWER_LETTER, *rows.KEYS, *rows.GROUPS)


CHOICE = re.compile("choice_([a-z])", re.IGNORECASE)


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# How splits are called elsewhere; others keep their names.
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validate", "validation", "valid", "val", "dev"), "validate"),
    **dict.fromkeys(("test", "testing"), "test"),
}


def split_name(text: str) -> str:
    """A split's name as it is called here: "dev" is "validate"."""
    return SPLITS.get(text.strip().lower(), text.strip())


def names_of(columns: str | Mapping[str, str] | None) -> dict[str, str]:
    """{name in the file: our name} of "image=file,question=frage", or of a dict the same way round."""
    if isinstance(columns, str):
        pairs = [p.partition("=") for p in columns.split(",") if p.strip()]
        if wrong := [p for p in pairs if not p[0].strip() or not p[2].strip()]:
            raise ValueError(
                f"columns={columns!r}: {''.join(wrong[0])!r}; expected pairs like image=file,question=frage."
            )
        columns = {ours.strip(): theirs.strip() for ours, _, theirs in pairs}
    columns = dict(columns or {})
    if not all(isinstance(x, str) and x for pair in columns.items() for x in pair):
        raise ValueError(f"columns={columns!r:.200}: expected a text for each name.")
    theirs = list(columns.values())
    if again := [x for x in theirs if theirs.count(x) > 1]:
        raise ValueError(f"columns gives {again[0]!r} two names; expected one.")
    return {theirs: known(ours) for ours, theirs in columns.items()}


def known(name):
    small = name.strip().lower()
    return small if small in KNOWN or CHOICE.fullmatch(small) else name.strip()


def choices_of_flag(text: str | None) -> dict[str, str]:
    """{choice_a: text, …} of what --choices says, {} of nothing. ValueError: fewer than two, or an empty one."""
    try:
        choices = split_choices(text) if text is not None else {}
        if text is not None and (not choices or not all(x.strip() for x in choices.values())):
            raise ValueError("choices: expected two or more texts with | between them")
    except ValueError as e:
        raise ValueError(f"--choices={text:.80}: {str(e).removeprefix('choices: ')}.") from None
    return {k: v.strip() for k, v in choices.items()}


def prompted(pp, row, choices=None) -> dict:
    """`pp` of a question and its choices. ValueError: a prompt shows choices that aren't given."""
    try:
        return pp({**row, **(choices or {})})
    except ValueError as e:
        if "no key 'choice_" not in str(e):
            raise
        raise ValueError(
            f"{e}. The run's prompt shows choices: --choices gives them, or a table's columns choice_a, choice_b, …"
        ) from None


def split_choices(value):
    """{choice_a: text, …} of a list, of a JSON list, or of a text with | between choices."""
    if isinstance(value, str):
        text = value.strip()
        value = json_text.parse(text, "choices", "a list", root=list) if text.startswith("[") else text.split("|")
        value = [] if value == [""] else value
    if value is None:
        value = []
    if not isinstance(value, list) or len(value) == 1 or len(value) > len(LETTERS):
        raise ValueError("choices: expected a list of two or more, or texts with | between them")
    return {f"choice_{letter.lower()}": table_forms.as_text(x) for letter, x in zip(LETTERS, value)}


def choices_of(row: Mapping[str, str]) -> list[str]:
    """The choices of a row in the order of their letters; [] if it has none."""
    found = [row.get(f"choice_{letter.lower()}", "") for letter in LETTERS]
    while found and not found[-1]:
        found.pop()
    return found


def completed(row, entry, number, prefix=""):
    """A row with what it lacks: question_id, image_id, answer_type, and of a choice its letter and text."""
    row = dict(row)
    row.setdefault("image", "")
    row.setdefault("question", "")
    row.setdefault("answer", "")
    row["question_id"] = row.get("question_id") or f"row{number}"
    row["image_id"] = row.get("image_id") or _image_id(row["image"], entry, prefix) or f"row{number}"
    choices = choices_of(row)
    if choices and row["answer"]:
        row = _lettered(row, choices)
    kind = row.get("answer_type") or ("CLOSED" if choices or is_yes_no(row["answer"]) else "OPEN")
    row["answer_type"] = kind.upper() if kind.upper() in ("OPEN", "CLOSED") else kind
    return row


def _image_id(name, entry, prefix):
    if entry is not None:
        return entry[0]
    parts = [p for p in name.replace("\\", "/").split("/") if p not in ("", ".")]
    return prefix + "/".join(parts) if parts else ""


def image_key(names: str | Sequence[str], prefix: str = "") -> int:
    """Equal for one image_id, or for the same files."""
    return key_of(names) if isinstance(names, str) else key_of(*(_image_id(name, None, prefix) for name in names))


def _lettered(row, choices):
    """Answer and letter of a row with choices, each from the other. ValueError: the answer is none of them."""
    answer, given = row["answer"], row.get(rows.ANSWER_LETTER, "").upper()
    same = [LETTERS[i] for i, c in enumerate(choices) if c.casefold() == answer.casefold()]
    if not given and not same and len(answer) == 1 and answer.upper() in LETTERS[: len(choices)]:
        given = answer.upper()
    letter = given or (same[0] if same else "")
    if letter not in LETTERS[: len(choices)] or not letter or not choices[LETTERS.index(letter)]:
        raise ValueError(f"the answer is none of its choices: {answer:.60}")
    return row | {rows.ANSWER_LETTER: letter, "answer": choices[LETTERS.index(letter)]}


def is_yes_no(answer: str) -> bool:
    """Whether an answer is yes or no and nothing else."""
    return answer.strip().strip(".!").lower() in ("yes", "no")


def is_blank(text: str) -> bool:
    """Whether a text has nothing but blanks and marks that end sentences."""
    return not "".join(text.split()).strip(".,;:!?。，；：！？、")


def key_of(*texts: str) -> int:
    """A number from 1 to 2**64 - 1 that stands for these texts."""
    digest = hashlib.blake2b("\0".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1
