"""The questions of a split: what a row must hold, and what is known about it before it is asked."""

import hashlib
import re

import numpy as np

from paligemma_med.evaluation import results
from paligemma_med.metrics import answers
from paligemma_med.parallel import distributed
from paligemma_med.pp import rows as row_keys

# Keys of a batch that are arrays for the model, not about the question.
_ARRAYS = ("image", "text", "mask_ar", "mask_input", "image_at", "_mask")


def check(batch, rows) -> None:
    """Raises ValueError unless these rows can be asked and scored, and are the first ones of the batch."""
    valid = distributed.to_host(batch["_mask"]) if "_mask" in batch else np.ones(len(rows))
    if not np.array_equal(np.flatnonzero(valid), np.arange(len(rows))):
        raise ValueError(f"_mask is {valid} for {len(rows)} rows; expected the valid ones first.")
    for row in rows:
        where = f"question {row.get('question_id')!r}"
        _check_keys(row, row_keys.NEEDED, where)
        if "suffix" in row:
            raise ValueError(
                f"{where} has a key 'suffix', which an eval pp would put into the prompt; "
                "call the ground truth 'answer'."
            )
        if answers.is_empty(row["answer"]):
            raise ValueError(f"{where} has an empty answer: {row['answer']!r}.")


def lines(batch, rows, pixels, tokenizer, *, choices=(), cut=None) -> list[dict]:
    """The first keys of each row's line in predictions.jsonl: all that is known before it is asked.

    Args:
      batch, rows: as `input_pipeline.evaluation` gives them.
      pixels: float[B, height, width, 3], the batch's images on the host.
      tokenizer: of the model, which gives the prompt as it was read.
      choices: keys of a row that hold the texts of its choices A, B, …; the line has them as
        `choices`.
      cut: tokens that each row's prompt lost to `tolen`, if that is known.

    Raises:
      ValueError: a multiple-choice question without a choice or its letter; a value that can't be
        written.
    """
    text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
    numbers = {k: v for k, v in batch.items() if k not in _ARRAYS and v.ndim == 1}
    numbers = {k: v.tolist() for k, v in distributed.to_host(numbers).items()}
    out = []
    for i, row in enumerate(rows):
        line = dict(
            question_id=row["question_id"],
            image_id=row.get("image_id"),
            image_key=image_key(pixels[i]),
            question=row["question"],
            prompt=tokenizer.to_str(text[i][mask[i].astype(bool)], stop_at_eos=False),
            answer=row["answer"],
            answer_type=row["answer_type"],
        )
        more = row | {k: v[i] for k, v in numbers.items()}
        more = {k: v for k, v in more.items() if k not in line and k not in choices}
        line |= results.plain(more, f"question {row['question_id']!r}")
        if choices:
            line |= choices_of(row, choices)
        if cut is not None:
            line["tokens_cut"] = int(cut[i])
        out.append(line)
    return out


def choices_of(row, keys) -> dict:
    """{choices, answer_letter} of a multiple-choice question; ValueError: no such letter or key."""
    where = f"question {row['question_id']!r}"
    _check_keys(row, (*keys, row_keys.ANSWER_LETTER), where)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(keys)]
    letter = row[row_keys.ANSWER_LETTER].strip().upper()
    if letter not in letters or len(letter) != 1:
        raise ValueError(f"{where} has the answer_letter {row[row_keys.ANSWER_LETTER]!r}; expected one of {letters}.")
    return {"choices": row_keys.choices_there(row, keys, ord(letter) - ord("A")), row_keys.ANSWER_LETTER: letter}


def _check_keys(row, keys, where):
    if missing := [k for k in keys if k not in row]:
        raise ValueError(f"{where} has no {missing[0]!r}, found {sorted(row)}; add it to the keep(...) of pp_fn.")


def checked(saved, asked) -> list[dict] | None:
    """`saved`, the rows that an earlier start left of these lines, or None if it left none.

    Raises:
      ValueError: they are of other questions.
    """
    if saved is None:
        return None
    for row, line in zip(saved, asked, strict=False):
        if len(saved) != len(asked) or any(row.get(k) != v for k, v in line.items()):
            raise ValueError(
                f"{results.PART} has another question or image at {line['question_id']!r} than the "
                "split, which has changed since: start anew with --noresume."
            )
    return saved


def image_key(pixels) -> str:
    """A digest of an image as the model sees it: 16 hexadecimal digits. It identifies pictures, since one
    picture can have two ids."""
    return hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest()[:16]


def natural_key(text: str) -> list:
    """A key that sorts "q2" before "q10"."""
    return [int(t) if i % 2 else t for i, t in enumerate(re.split(r"(\d+)", text))]
