"""Near duplicates in a stream of rows, in bounded memory.

Two rows are near duplicates if the sets of their texts' runs of words overlap enough (Jaccard). Rows of
the same image or case are all compared. Among all rows, MinHash with bands finds the candidates (Broder
1997) and the sets themselves decide, so that there are no false duplicates.
"""

import hashlib
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data_prep.curate.words import words

BANDS, ROWS = 8, 4  # two rows with similarity s become candidates with 1 - (1 - s^4)^8: 0.98 at 0.8
_PRIME = np.uint64((1 << 31) - 1)  # products of two numbers below it fit in 64 bits
_LONGEST_BUCKET = 64


def shingles(text: str, n: int) -> np.ndarray:
    """Sorted distinct uint32[k] hashes of the runs of `n` words of a text; k >= 1."""
    found = words(text)
    runs = {" ".join(found[i : i + n]) for i in range(max(1, len(found) - n + 1))}
    return np.unique(np.array([zlib.crc32(r.encode()) for r in runs], np.uint32))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard similarity of two sorted sets of hashes."""
    place = np.minimum(np.searchsorted(b, a), len(b) - 1)
    both = int((b[place] == a).sum())
    return both / (len(a) + len(b) - both)


class NearDuplicates:
    """Remembers added rows, and finds the one that a new row repeats.

    Args:
      within: "image", "case" (the image if a row has no case_id), or "all".
      threshold: Jaccard similarity from which two rows are near duplicates.
      shingle: words in a run; a shorter text is one run.
      fields: fields whose texts are compared, each with its own runs.
      max_rows: how many rows are remembered; after that the oldest is forgotten.
    """

    def __init__(
        self,
        within: str = "image",
        threshold: float = 0.8,
        shingle: int = 2,
        fields: Sequence[str] = ("question", "answer"),
        max_rows: int = 100_000,
    ):
        if within not in ("image", "case", "all"):
            raise ValueError(f"within is {within!r}; expected image, case or all")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is {threshold}; expected above 0 and at most 1")
        if shingle < 1 or max_rows < 1 or not fields:
            raise ValueError("expected shingle and max_rows of at least 1, and some fields")
        self._within, self._threshold, self._shingle = within, threshold, shingle
        self._fields, self._max_rows = tuple(fields), max_rows
        random = np.random.default_rng(0)  # part of the method, not a setting
        self._a = random.integers(1, int(_PRIME), (BANDS * ROWS, 1), np.uint64)
        self._b = random.integers(0, int(_PRIME), (BANDS * ROWS, 1), np.uint64)
        # Number of a row -> its name, runs and buckets, oldest first; bucket -> numbers.
        self._rows: OrderedDict[int, tuple[str, np.ndarray, list[int]]] = OrderedDict()
        self._buckets: dict[int, list[int]] = {}
        self._count = 0
        self._last: tuple[Any, np.ndarray, list[int]] | None = None  # a row is looked up, then added

    def __len__(self) -> int:
        return len(self._rows)

    def _runs(self, row: Mapping[str, Any]) -> np.ndarray:
        """The fields' runs; those of different fields are different."""
        parts = [
            shingles(str(row.get(field) or ""), self._shingle) ^ np.uint32(zlib.crc32(field.encode()))
            for field in self._fields
        ]
        return np.unique(np.concatenate(parts))

    def _look_at(self, row: Mapping[str, Any]) -> tuple[np.ndarray, list[int]]:
        if self._last is None or self._last[0] is not row:
            runs = self._runs(row)
            self._last = (row, runs, self._buckets_of(row, runs))
        return self._last[1:]

    def _buckets_of(self, row: Mapping[str, Any], runs: np.ndarray) -> list[int]:
        if self._within != "all":
            case = row.get("case_id") if self._within == "case" else None
            return [_hash(f"case {case}" if case else f"image {row.get('image_id')}")]
        x = runs.astype(np.uint64) % _PRIME
        least = ((self._a * x + self._b) % _PRIME).min(axis=1).astype(np.uint32)
        bands = least.reshape(BANDS, ROWS)
        return [_hash(f"{i} {band.tobytes().hex()}") for i, band in enumerate(bands)]

    def find(self, row: Mapping[str, Any]) -> tuple[str | None, float]:
        """(name of the most similar row remembered, similarity); (None, best) below the threshold.

        The first of several equally similar rows.
        """
        runs, buckets = self._look_at(row)
        seen, best, name = set(), 0.0, None
        for bucket in buckets:
            for number in self._buckets.get(bucket, ()):
                if number not in seen:
                    seen.add(number)
                    similarity = jaccard(runs, self._rows[number][1])
                    if similarity > best:
                        best, name = similarity, self._rows[number][0]
        return (name if best >= self._threshold else None), best

    def add(self, row: Mapping[str, Any], name: str) -> None:
        """Remembers a row."""
        runs, buckets = self._look_at(row)
        self._rows[self._count] = (name, runs, buckets)
        for bucket in buckets:
            held = self._buckets.setdefault(bucket, [])
            # Without a limit, in a corpus of one phrase every row would be compared with every other.
            if len(held) < _LONGEST_BUCKET or self._within != "all":
                held.append(self._count)
        self._count += 1
        if len(self._rows) > self._max_rows:
            number, (_, _, buckets) = self._rows.popitem(last=False)
            for bucket in buckets:
                held = [n for n in self._buckets[bucket] if n != number]
                if held:
                    self._buckets[bucket] = held
                else:
                    del self._buckets[bucket]


def _hash(text: str) -> int:
    data = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")
