"""The rows of a predictions.jsonl as other programs read them: from outside, and so checked key by key.

Figures are made anew from these rows. A text where a list of answers belongs would be scored letter by letter, and a
list where a text belongs fails far from the line that holds it.
"""

import math
import os
from collections.abc import Collection
from typing import Any

from paligemma_med.evaluation import results
from paligemma_med.metrics import scoring
from paligemma_med.pp import json_text
from paligemma_med.pp import rows as row_keys


def _is_id(x):
    return isinstance(x, str) or type(x) is int


def _is_text(x):
    return isinstance(x, str)


def _are_texts(x):
    return isinstance(x, list) and bool(x) and all(isinstance(t, str) for t in x)


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool) and not math.isnan(x)


def _are_numbers(x):
    return isinstance(x, list) and bool(x) and all(map(_is_number, x))


def _is_count(x):
    return isinstance(x, int) and abs(x) < 2**63


_TEXT, _TEXTS, _NUMBERS = ("a text", _is_text), ("a list of texts", _are_texts), ("a list of numbers", _are_numbers)
_COUNT = ("a whole number", _is_count)
_FORMS = {
    "question_id": ("a text or a whole number", _is_id),
    **dict.fromkeys(("question", "prompt", "answer", "answer_type"), _TEXT),
    row_keys.ACCEPTED: _TEXT,
    "predictions": _TEXTS,
    "logprobs": _NUMBERS,
    "choices": _TEXTS,
    "answer_letter": (f"a letter from {row_keys.LETTERS[0]} on", lambda x: isinstance(x, str) and bool(x)),
    "option_logprobs": _NUMBERS,
    "option_tokens": ("a list of numbers above 0", lambda x: _are_numbers(x) and min(x) > 0),
    "tokens_cut": _COUNT,
    "unfinished": _COUNT,
}
_OF_CONTROLS = {"prediction": _TEXT, "predictions": _TEXTS, "logprobs": _NUMBERS, "option_logprobs": _NUMBERS}


def read(path: os.PathLike | str, needed: Collection[str] = row_keys.NEEDED) -> list[dict[str, Any]]:
    """The rows of a file, one or more, each checked.

    Args:
      needed: keys that each row must have; those that the first row has of the controls must be in all.

    Raises:
      ValueError: names file, line and key.
    """
    rows = results.read_rows(path)
    if not rows:
        raise ValueError(f"{path} is empty; expected a line a question.")
    controls = scoring.controls_of(rows)
    forms = _FORMS | {f"{who}_{key}": form for who in controls for key, form in _OF_CONTROLS.items()}
    needed = [*needed, *(k for who in controls for k in _texts_of(who))]
    needed += [k for k in (*forms, "choices", "answer_letter") if k in rows[0] and k not in needed]
    first = rows[0]
    for number, row in enumerate(rows, 1):
        where = f"{path}, line {number}"
        if missing := [key for key in needed if key not in row]:
            raise ValueError(f"{where}: has no {missing[0]!r}; expected {', '.join(needed)}.")
        for key, (expected, fits) in forms.items():
            if key in row and not fits(row[key]):
                raise ValueError(f"{where}: {key} is {json_text.shown(row[key])}; expected {expected}.")
            # Questions may have different numbers of choices; `_check_choices` compares those with their numbers.
            by_choice = key == "choices" or key.endswith(("option_logprobs", "option_tokens"))
            count = len(first.get(key, ())) if not by_choice and isinstance(row.get(key), list) else None
            if count is not None and len(row[key]) != count:
                what = f"{len(row[key])} {key.replace('_', ' ')}"
                raise ValueError(f"{where}: {what}; expected {count} as in the first line.")
        _check_choices(row, where, forms)
    return rows


def _texts_of(who):
    return [f"{who}_prediction" if who in scoring.ONE_TEXT else f"{who}_predictions"]


def _check_choices(row, where, forms):
    if "choices" not in row or "answer_letter" not in row:
        return
    number = len(row["choices"])
    letters = [chr(ord("A") + i) for i in range(number)]
    if row["answer_letter"] not in letters:
        raise ValueError(
            f"{where}: answer_letter is {row['answer_letter']!r:.40}; expected one of {', '.join(letters)}."
        )
    for key in forms:
        if key.endswith(("option_logprobs", "option_tokens")) and len(row.get(key, row["choices"])) != number:
            raise ValueError(f"{where}: {key} has {len(row[key])} numbers; expected {number}, one a choice.")
