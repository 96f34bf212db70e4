"""Reads what a language model wrote as question-answer pairs, in whatever form it wrote them.

JSON is asked for. Small models rarely keep to it, so marked, numbered and two-line forms are read as
well; what looks like a pair and isn't one is told, never silently skipped.
"""

import dataclasses

from data_prep import medm_qa

KINDS = ("pairs", "choices")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A question and its answer; of a multiple-choice one also its options in the reply's order.

    `letter` is the right option's ("A" is choices[0]) and `answer` its text; "" without options.
    """

    question: str
    answer: str
    choices: tuple[str, ...] = ()
    letter: str = ""


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a reply holds.

    pairs: in the order of the text. rejected: (reason, text) of parts that look like a pair and
    aren't one. form: how the pairs were written, "" without any. problem: "" if there is a pair,
    else a sentence that can be told to the model.
    """

    pairs: tuple[Pair, ...]
    rejected: tuple[tuple[str, str], ...]
    form: str
    problem: str


def read_reply(text: str, kind: str = "pairs") -> Reply:
    """Finds the pairs in a reply; raises nothing, whatever the text.

    Args:
      text: the model's reply, whole.
      kind: "pairs", or "choices" for multiple choice (a pair without four options is rejected).
    """
    found, rejected = medm_qa.parse_pairs(text)
    pairs = tuple(Pair(q, a) for q, a, _ in found)
    problem = "" if pairs else "no question with an answer was found in it"
    return Reply(pairs, tuple(rejected), found[0][2] if found else "", problem)
