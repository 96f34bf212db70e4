"""Relevance by pathology category: which rows are kept, and how much more the common ones weigh.

The paper reinforces the most common pathologies instead of the rare ones; its draft keeps MedPix
locations with at least 100 examples, counted in images. A row's category comes from the data set or is
found by key words.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from data_prep.files import DataError

REINFORCE = ("weight", "repeat", "none")
CHOICES = ("drop", "keep")
COUNTED = ("cases", "images")


class Relevance:
    """Settings of the step.

    Args:
      keys: the first of these fields that a row has is its category.
      keywords: [name, regular expression] pairs, tried in order on the fields `text` of a row that has
        none of `keys`.
      text: those fields.
      min_cases: how many cases (or images, see `count`) a category must have.
      count: "cases" (case_id, else image_id) or "images".
      below: "drop" or "keep" rows of smaller categories.
      missing: "drop" or "keep" rows without category.
      reinforce: "weight" adds a weight to each row, "repeat" writes rows several times, "none" does
        neither.
      power, max_weight: the weight is (count / min_cases) ** power, at least 1 and at most this.

    Raises:
      DataError: impossible settings.
    """

    def __init__(
        self,
        keys: Sequence[str] = ("category",),
        keywords: Sequence[Sequence[str]] = (),
        text: Sequence[str] = ("caption", "question", "answer"),
        min_cases: int = 100,
        count: str = "cases",
        below: str = "drop",
        missing: str = "keep",
        reinforce: str = "weight",
        power: float = 0.5,
        max_weight: float = 3.0,
    ):
        for name, value, known in (
            ("count", count, COUNTED),
            ("below", below, CHOICES),
            ("missing", missing, CHOICES),
            ("reinforce", reinforce, REINFORCE),
        ):
            if value not in known:
                raise DataError(f"relevance.{name} is {value!r}; expected {' or '.join(known)}")
        if min_cases < 1 or power < 0 or max_weight < 1:
            raise DataError(
                f"relevance: min_cases {min_cases}, power {power}, max_weight {max_weight}; "
                "expected at least 1, 0 and 1"
            )
        try:
            self._keywords = [(name, re.compile(text_, re.I)) for name, text_ in keywords]
        except (TypeError, ValueError, re.error, OverflowError, RecursionError) as e:
            raise DataError(f"relevance.keywords: {e}; expected [name, expression] pairs") from None
        self._keys, self._text = tuple(keys), tuple(text)
        self.count, self.min_cases, self.below, self.missing = count, min_cases, below, missing
        self.reinforce, self._power, self._max_weight = reinforce, power, max_weight

    def category(self, row: Mapping[str, Any]) -> str:
        """The row's category; "" if it has none."""
        for key in self._keys:
            if value := str(row.get(key) or "").strip():
                return value
        for name, expression in self._keywords:
            if any(expression.search(str(row.get(field) or "")) for field in self._text):
                return name
        return ""

    def counted(self, row: Mapping[str, Any]) -> str:
        """The id of the case or image that a row counts for."""
        case = row.get("case_id") if self.count == "cases" else None
        return f"case {case}" if case else f"image {row.get('image_id')}"

    def reason(self, category: str, n: int) -> str | None:
        """Why rows of a category with `n` cases (or images) are dropped, or None."""
        if not category:
            return "no category" if self.missing == "drop" else None
        small = self.below == "drop" and n < self.min_cases
        return f"{category}: {n} {self.count}, fewer than {self.min_cases}" if small else None

    def weight(self, category: str, n: int) -> float:
        """At least 1, larger for more frequent categories; 1 for rows without category."""
        if not category or self.reinforce == "none":
            return 1.0
        return round(min(self._max_weight, max(1.0, (n / self.min_cases) ** self._power)), 4)


def repeats(weight: float, share: float) -> int:
    """A whole number whose mean over a uniform `share` in [0, 1) is `weight`."""
    whole = int(weight)
    return whole + (share < weight - whole)
