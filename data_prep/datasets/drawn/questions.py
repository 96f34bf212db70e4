"""Questions about drawn images: every wording has its answers in equal numbers.

A question bank is only useful if the question alone doesn't give the answer away. So each wording (exact
string) knows its possible answers, and is used for an image only if the image's answer is the least used
so far: within a split, counts of a wording's answers never differ by more than one. Guessing the most
common answer of each wording then scores about 1 / (number of answers).
"""

import dataclasses
from collections import Counter

import numpy as np

YES_NO = ("Yes", "No")
SIDES = ("Left", "Right")
LEVELS = ("Upper", "Lower")
QUADRANTS = tuple(f"{level} {side}" for level in LEVELS for side in SIDES)


@dataclasses.dataclass(frozen=True)
class Question:
    """A wording, this image's answer, and every answer that the wording has over all images."""

    text: str
    answer: str
    answers: tuple[str, ...]
    content_type: str

    @property
    def answer_type(self) -> str:
        """SLAKE's split: yes/no questions are CLOSED, all others OPEN."""
        return "CLOSED" if self.answers == YES_NO else "OPEN"


class Balancer:
    """Chooses questions so that the answers of each wording stay within one of each other."""

    def __init__(self) -> None:
        self._used: dict[str, Counter] = {}

    def choose(self, rng: np.random.Generator, group: list[Question]) -> Question | None:
        """Picks the least used wording of the group for which it is this image's answer's turn.

        Returns None if every wording needs another answer next.
        """
        allowed = []
        for q in group:
            used = self._used.setdefault(q.text, Counter(dict.fromkeys(q.answers, 0)))
            if set(used) != set(q.answers):
                raise ValueError(f"{q.text!r} has answers {sorted(used)} and {sorted(q.answers)}")
            if used[q.answer] == min(used.values()):
                allowed.append((sum(used.values()), rng.random(), q))
        if not allowed:
            return None
        question = min(allowed, key=lambda item: item[:2])[2]
        self._used[question.text][question.answer] += 1
        return question
