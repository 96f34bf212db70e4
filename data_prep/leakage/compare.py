"""Which images two splits have in common, and which questions about them."""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data_prep.leakage import looks
from data_prep.leakage.records import Picture

# How two images are found to be one, the surest first, with what each says.
WAYS = {
    "content": "the same bytes",
    "synpic": "the same number in MedPix",
    "look": f"alike: perceptual hashes that differ in at most {looks.CLOSE} of {looks.BITS} bits",
    "article": "figures of one article",
}


@dataclasses.dataclass
class Pair:
    """Two images, by index, how they belong together, and the questions that both are asked.

    ways: of WAYS; distance: bits by which the hashes differ, None if they weren't compared or differ in more.
    again: (question, answer in a, answer in b).
    """

    a: int
    b: int
    ways: list[str]
    distance: int | None = None
    again: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)


def compare(a: Sequence[Picture], b: Sequence[Picture]) -> tuple[list[Pair], dict[str, Any]]:
    """The pairs of two splits, the surest and closest first, and counts.

    Figures of one article are counted, and no pairs: an article's figures are different pictures.

    Returns:
      (pairs, {way: {"a": images of a with a partner in b, "b": images of b with one in a}, …, "questions": questions of
      b that a asks about the image of a pair, "answers": of these, those with the same answer}).
    """
    pairs: dict[tuple[int, int], Pair] = {}

    def found(way: str, i: int, j: int) -> Pair:
        pair = pairs.setdefault((i, j), Pair(i, j, []))
        if way not in pair.ways:
            pair.ways.append(way)
        return pair

    for way, key in (("content", lambda p: p.digest), ("synpic", lambda p: p.synpic)):
        for i, j in _equal(a, b, key):
            found(way, i, j)
    for i, j, distance in looks.close_pairs([p.look for p in a], [p.look for p in b]):
        found("look", i, j).distance = distance
    for pair in pairs.values():
        one, other = a[pair.a].asked, b[pair.b].asked
        pair.again = [(other[q][0], one[q][1], other[q][1]) for q in other if q in one]
    order = list(WAYS)
    result = sorted(pairs.values(), key=lambda p: (order.index(p.ways[0]), p.distance or 0, -len(p.again), p.a, p.b))
    counts: dict[str, Any] = {way: _members(p for p in result if way in p.ways) for way in order if way != "article"}
    counts["article"] = _members(Pair(i, j, []) for i, j in _equal(a, b, lambda p: p.article))
    asked = {(p.b, q): _same(x, y) for p in reversed(result) for q, x, y in p.again}
    counts |= {"questions": len(asked), "answers": sum(asked.values())}
    return result, counts


def _equal(a: Sequence[Picture], b: Sequence[Picture], key: Callable[[Picture], str]) -> Iterable[tuple[int, int]]:
    places = collections.defaultdict(list)
    for j, picture in enumerate(b):
        if key(picture):
            places[key(picture)].append(j)
    for i, picture in enumerate(a):
        for j in places.get(key(picture), ()) if key(picture) else ():
            yield i, j


def _members(pairs: Iterable[Pair]) -> dict[str, int]:
    pairs = list(pairs)
    return {"a": len({p.a for p in pairs}), "b": len({p.b for p in pairs})}


def _same(a: str, b: str) -> bool:
    return " ".join(a.lower().split()) == " ".join(b.lower().split())
