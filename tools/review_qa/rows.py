"""Reads a file of question-answer pairs, line by line, and draws the sample to review.

It takes any JSON Lines whose rows have question_id, image_id, question and answer, such as the output of
`tools.synthesize_qa` or `data_prep.curate`. Other fields of a row (caption, choices, quality, mode) are
shown if present.
"""

import hashlib
import heapq
import itertools
import json
import pathlib
from collections.abc import Iterator

from paligemma_med import files
from paligemma_med.pp import json_text
from paligemma_med.pp import rows as row_keys

# The answer's type isn't needed: reviewers see it themselves.
KEYS = tuple(key for key in row_keys.KEYS if key != "answer_type")
EXPECTED = "expected a JSON object a line, with question_id, image_id, question and answer"


def read(path) -> Iterator[tuple[int, bytes, dict]]:
    """Yields (line number from 1, the line as bytes, row) of a file of pairs.

    Raises:
      ValueError: the file can't be read or is empty, a line has another form, an id occurs twice.
    """
    seen, found = set(), False
    try:
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if not line.strip():
                    continue
                found, where = True, f"{path} line {number}"
                row = _parse(line, where)
                key = _number(row["question_id"])
                if key in seen:
                    raise ValueError(f"{where}: question_id {row['question_id']!r} is used before; expected each once.")
                seen.add(key)
                yield number, line, row
    except OSError as e:
        raise ValueError(f"{path}: can't be read ({e.strerror or e}); {EXPECTED}.") from None
    if not found:
        raise ValueError(f"{path}: the file is empty; {EXPECTED}.")


def _parse(line, where):
    row = json_text.parse(line, where, EXPECTED.removeprefix("expected "), root=dict, constants=True, halves=True)
    for key in KEYS:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{where}: {key} is {row.get(key)!r:.60}; {EXPECTED}.")
    return row


def _number(*texts):
    """128 bits that stand for texts: uniform, and the same everywhere."""
    joined = "\0".join(map(str, texts)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(joined, digest_size=16).digest())


def sample(path, count, seed=0) -> tuple:
    """Draws `count` pairs, all equally likely, in random order.

    So someone who stops half-way has seen a sample too. Which pairs are drawn only depends on their ids
    and the seed: after another filter, most of the sample is the same.

    Args:
      path: the file of pairs.
      count: how many; 0: all.
      seed: of the sample.

    Returns:
      (rows, how many there are in the file). Errors as `read`.
    """
    numbers = itertools.count()
    drawn = ((_number(seed, row["question_id"]), next(numbers), row) for _, _, row in read(path))
    chosen = heapq.nsmallest(count, drawn) if count else sorted(drawn)
    return [row for _, _, row in chosen], next(numbers)


def digest(row) -> str:
    """Short digest of what is judged: a verdict is about this text, not about whatever has its id.

    It begins with a letter, since a spreadsheet would read 12 digits, or 12e3, as a number.
    """
    said = [row["question"], row["answer"], *(row.get(k) or "" for k in row_keys.CHOICES)]
    return "p" + hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12]


def template(row) -> str:
    """The template that made a pair, for tables; "(none)" if its row doesn't say."""
    found = row.get("mode")
    return found if isinstance(found, str) and found else "(none)"


def check_output(path, *inputs) -> None:
    """Raises ValueError if a file to be written is one of the inputs."""
    if pathlib.Path(path).resolve() in (pathlib.Path(p).resolve() for p in inputs):
        raise ValueError(f"{path} is an input and would be overwritten; give another name.")


def write_whole(path, lines) -> None:
    """Writes an iterable of bytes to a file, whole or not at all; ValueError if it can't be."""
    if not pathlib.Path(path).parent.is_dir():  # more likely a typo than a folder to create
        raise ValueError(f"{path} can't be written: there is no such folder.")
    try:
        with files.whole_file(path) as f:
            f.writelines(lines)
    except OSError as e:
        raise ValueError(f"{path} can't be written: {e.strerror or e}.") from None
