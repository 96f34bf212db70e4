"""Scores and tags of a generated pair, and whether it stays: the rules of `data_prep.curate`.

Each pair gets the tags of all rules that it fails; a config says which of them drop it. So a language
model's mistakes can be counted even if nothing is dropped for them.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from data_prep.curate import rules as rule_lib
from data_prep.curate.duplicates import NearDuplicates
from data_prep.curate.words import content_words
from data_prep.files import DataError

NEAR_DUPLICATE = "near_duplicate"
_LONG_WORD = re.compile(r"[^\W\d_]{4,}")


def leak(question: str, answer: str) -> float:
    """Share of the answer's distinct content words that occur in the question; 0 if it has none."""
    asked, said = content_words(question), content_words(answer)
    return len(asked & said) / max(len(said), 1)


def caption_leak(question: str, caption: str) -> float:
    """Share of the caption's distinct words of four or more letters that occur in the question.

    Of MedM's released questions (ROCO) it is 35 % on average, and at least half in 27 % of them.
    """
    asked, said = (set(_LONG_WORD.findall(text.lower())) for text in (question, caption))
    return len(asked & said) / max(len(said), 1)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """scores: {"leak", "caption_leak"}; failed: [(rule, why), …] of all failed rules; reasons: those that
    drop the pair, of which the first is recorded as the reason."""

    scores: dict[str, float]
    failed: list[tuple[str, str]]
    reasons: list[tuple[str, str]]

    @property
    def quality(self) -> dict[str, Any]:
        """What a row records: {"leak", "caption_leak", "tags"}."""
        return {**self.scores, "tags": [name for name, _ in self.failed]}


class Quality:
    """The rules of a config, and the memory of kept pairs for finding near duplicates.

    Args:
      config: {"rules": [{"rule": one of `data_prep.curate.rules` or "near_duplicate" (last),
        "name": tag, "drop": bool, setting: value, …}, …]}; `drop` is True by default.

    Raises:
      DataError: an unknown rule, setting or value.
    """

    def __init__(self, config: Mapping[str, Any]):
        if unknown := sorted(set(config) - {"rules"}):
            raise DataError(f"config has {unknown[0]!r}; expected rules alone")
        specs = [dict(spec) for spec in config.get("rules", ())]
        drops = [spec.pop("drop", True) for spec in specs]
        if odd := [d for d in drops if not isinstance(d, bool)]:
            raise DataError(f"config.rules: drop is {odd[0]!r}; expected True or False")
        near = [i for i, spec in enumerate(specs) if spec.get("rule") == NEAR_DUPLICATE]
        if near not in ([], [len(specs) - 1]):
            raise DataError(f"config.rules: {NEAR_DUPLICATE} can stand once, as the last one")
        self._near = None
        if near:
            settings = {k: v for k, v in specs.pop().items() if k not in ("rule", "name")}
            try:
                self._near = NearDuplicates(**settings)
            except (TypeError, ValueError) as e:
                raise DataError(f"config.rules ({NEAR_DUPLICATE}): {e}") from None
        self._rules = rule_lib.make_rules(specs)
        names = [r.name for r in self._rules] + [NEAR_DUPLICATE] * len(near)
        self.drops = dict(zip(names, drops, strict=True))  # tag -> whether it drops, in order

    def judge(self, row: Mapping[str, Any], name: str) -> Verdict:
        """Judges a pair and, if it stays, remembers it; pairs come in source order.

        Args:
          row: question, answer, caption, image_id, case_id, and other fields that the rules use.
          name: the pair's name, shown for its near duplicates.
        """
        scores = {
            "leak": round(leak(row["question"], row["answer"]), 4),
            "caption_leak": round(caption_leak(row["question"], row.get("caption", "")), 4),
        }
        failed = [(r.name, why) for r in self._rules if (why := r.check(row)[0])]
        if self._near is not None:
            like, similarity = self._near.find(row)
            if like:
                failed.append((NEAR_DUPLICATE, f"{similarity:.2f} like {like}"))
        reasons = [x for x in failed if self.drops[x[0]]]
        if self._near is not None and not reasons:
            self._near.add(row, name)
        return Verdict(scores, failed, reasons)
