"""What data sets of radiological reports have in common: which part is asked for, and what splits may share.

A row is an image with the report of its study. Normal reports are templates: the same text in train and test is no
leaked image, but a reader of figures should know how many there are.
"""

from collections.abc import Mapping

from data_prep.builders.leaks import plain
from data_prep.builders.vqa import Option
from data_prep.files import DataError

# What is asked for, and of which parts of the report the answer is made.
TARGETS = {
    "findings": ("Describe the findings.", ("findings",)),
    "impression": ("What is the impression?", ("impression",)),
    "report": ("Write the report.", ("findings", "impression")),
}
TARGET = Option("findings", "findings, impression, or report for both.")


def check_target(target: str) -> None:
    """DataError unless it is a key of TARGETS."""
    if target not in TARGETS:
        raise DataError(f"target is {target!r}; expected one of {', '.join(TARGETS)}")


def asked(parts: Mapping[str, str], target: str) -> tuple[str, str]:
    """(question, answer) for a report's parts; the answer is "" where they have none."""
    question, names = TARGETS[target]
    return question, " ".join(filter(None, (parts.get(name, "") for name in names)))


def groups(study_id: str, answer: str) -> tuple[tuple[str, ...], ...]:
    """What shouldn't be in two splits (see `Asked.groups`): the study, and its text."""
    return (("study", study_id), *([("report", plain(answer), study_id)] if answer else []))
