"""Counts the rows of a data set split by split: read, kept, dropped and why.

A data set that silently loses rows can't be compared with anything. So each reader reports every row to a
`Ledger`, from which the build report is made. It only holds counters, the first few ids of each kind and,
for leakage, short digests, so memory doesn't grow with the data's bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

FIRST = 10  # how many ids are listed for each reason


def shared(members: Mapping[str, Mapping[Any, str]]) -> dict[str, dict[str, Any]]:
    """What pairs of splits have in common.

    Args:
      members: split -> {key: name to show}; a key is a content digest or a case id, since a renamed
        copy of an image leaks as much as the file itself.

    Returns:
      {"train+test": {"count": n, "first": [at most FIRST names, sorted]}, ...} for all pairs.
    """
    splits = list(members)
    result = {}
    for i, a in enumerate(splits):
        for b in splits[i + 1 :]:
            names = sorted(members[b][key] for key in members[a].keys() & members[b].keys())
            result[f"{a}+{b}"] = {"count": len(names), "first": names[:FIRST]}
    return result


class Ledger:
    """The counts of one build.

    Args:
      splits: their names, in the report's order.
      tables: features whose values are counted in addition to `answer_type`, such as modality.
    """

    def __init__(self, splits: Iterable[str], tables: Iterable[str] = ()):
        self._tables = ("answer_type", *(t for t in tables if t != "answer_type"))
        self._splits = {s: _Split(self._tables) for s in splits}
        self._members: dict[str, dict[str, dict[bytes, str]]] = {}

    def read(self, split: str, n: int = 1) -> None:
        """`n` rows were read."""
        self._splits[split].read += n

    def keep(self, split: str, features: Mapping[str, Any]) -> None:
        """One row goes into the data set with these features (`image_id` identifies its image)."""
        book = self._splits[split]
        book.kept += 1
        book.images.add(_digest(features["image_id"]))
        for key, table in book.tables.items():
            table[features.get(key) or "(none)"] += 1

    def drop(self, split: str, reason: str, row_id: Any) -> None:
        """One row is left out; `reason` is a few words, the same for all such rows."""
        _note(self._splits[split].dropped, reason, row_id)

    def flag(self, split: str, what: str, row_id: Any) -> None:
        """One row is kept, but the report should mention it."""
        _note(self._splits[split].flags, what, row_id)

    def member(self, split: str, kind: str, key: str | bytes, name: str) -> None:
        """`split` holds this image or case; the report shows what two splits have in common.

        Args:
          split: name of the split.
          kind: "image" (the key is a digest of the content), "case", "paper", ...
          key: equal in two splits if and only if they share it.
          name: shown in the report.
        """
        kinds = self._members.setdefault(kind, {s: {} for s in self._splits})
        kinds[split].setdefault(_digest(key), name)

    def look_for(self, *kinds: str) -> None:
        """The report says of these kinds what splits share, even if no member of them is named: nothing."""
        for kind in kinds:
            self._members.setdefault(kind, {s: {} for s in self._splits})

    def to_report(self) -> dict[str, Any]:
        """Everything, JSON-able: {"splits": {...}, "shared": {kind: {pair: ...}}}."""
        return {
            "splits": {split: book.to_report() for split, book in self._splits.items()},
            "shared": {kind: shared(splits) for kind, splits in self._members.items()},
        }


class _Split:
    def __init__(self, tables: Iterable[str]):
        self.read = self.kept = 0
        self.dropped: dict[str, dict[str, Any]] = {}
        self.flags: dict[str, dict[str, Any]] = {}
        self.images: set[bytes] = set()
        self.tables = {key: Counter() for key in tables}

    def to_report(self) -> dict[str, Any]:
        return {
            "rows_read": self.read,
            "rows_kept": self.kept,
            "dropped": self.dropped,
            "flags": self.flags,
            "images": len(self.images),
            "tables": {key: dict(table.most_common()) for key, table in self.tables.items()},
        }


def _note(notes: dict[str, dict[str, Any]], reason: str, row_id: Any) -> None:
    note = notes.setdefault(reason, {"count": 0, "first": []})
    note["count"] += 1
    if len(note["first"]) < FIRST:
        note["first"].append(str(row_id))


def _digest(key: str | bytes) -> bytes:
    """16 bytes instead of names and digests of any length; enough to tell two million apart."""
    content = key if isinstance(key, bytes) else key.encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def describe(report: Mapping[str, Any]) -> Sequence[str]:
    """A report with `to_report`'s keys as lines of text."""
    lines = []
    for split, r in report["splits"].items():
        types = ", ".join(f"{k} {v:,}" for k, v in r["tables"]["answer_type"].items())
        lines.append(
            f"{split}: {r['rows_read']:,} rows read, {r['rows_kept']:,} kept"
            f"{f' ({types})' if types else ''}, {r['images']:,} images"
        )
        for word, notes in (("dropped", r["dropped"]), ("note", r["flags"])):
            for reason, note in notes.items():
                lines.append(f"  {word}, {reason}: {note['count']:,} ({_examples(note)})")
    for kind, pairs in report["shared"].items():
        found = {pair: note for pair, note in pairs.items() if note["count"]}
        if not found:
            lines.append(f"no {kind} is in two splits")
        for pair, note in found.items():
            a, b = pair.split("+")
            lines.append(
                f"WARNING: {note['count']:,} {kind}{'s' if note['count'] > 1 else ''} in both {a} "
                f"and {b} ({_examples(note)})"
            )
    return lines


def _examples(note: Mapping[str, Any]) -> str:
    more = ", ..." if note["count"] > len(note["first"]) else ""
    return ", ".join(note["first"]) + more
