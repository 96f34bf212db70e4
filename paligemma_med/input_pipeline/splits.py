"""Splits of an own table: given or drawn here, slices of them, and what two of them have in common."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.pp import own_rows
from paligemma_med.pp.own_table import OwnTable

NAMES = ("train", "validate", "test")
SHARES = (80, 10, 10)
_PART = re.compile(r"([\w.-]+)(?:\[(-?\d+%?)?:(-?\d+%?)?\])?")
_FIRST = 10  # names that are shown
# Images whose files have equal sizes are compared by content, up to so many bytes.
_READ = 4 * 2**30


def shares_of(value: Any) -> tuple[float, ...]:
    """Shares of train, validate and test, from "80/10/10" or three numbers."""
    try:
        shares = tuple(float(x) for x in (value.split("/") if isinstance(value, str) else value))
    except (TypeError, ValueError):
        shares = ()
    if len(shares) != 3 or not all(0 <= x < float("inf") for x in shares) or not sum(shares):
        raise InputError(f"data.split_shares={value!r:.80}: expected three shares like '80/10/10'")
    return shares


def image_keys(table: OwnTable) -> tuple[np.ndarray, bool]:
    """(uint64[rows] equal for rows of one picture, whether all contents were compared).

    Two files can only be copies of each other if they have the same size; those are read.
    """
    keys, sizes = table.image_keys, table.image_sizes
    _, first = np.unique(keys, return_index=True)
    first = first[sizes[first] > 0]
    values, counts = np.unique(sizes[first], return_counts=True)
    doubtful = first[np.isin(sizes[first], values[counts > 1])]
    if sizes[doubtful].sum() > _READ:
        return keys, False
    found: dict[bytes, list[int]] = {}
    for i in doubtful:
        found.setdefault(table.image_digest(i), []).append(int(keys[i]))
    # The smallest stands for all, so that it doesn't depend on the order of rows.
    same = {key: min(copies) for copies in found.values() if len(copies) > 1 for key in copies}
    if same:
        keys = keys.copy()
        inside = np.isin(keys, np.array(list(same), np.uint64))
        keys[inside] = [same[int(k)] for k in keys[inside]]
    return keys, True


def draw(table: OwnTable, seed: int, shares: Sequence[float]) -> tuple[np.ndarray, str]:
    """(int16[rows]: the number among NAMES of the split that each row is drawn into, a sentence about it).

    Patients, or images where no patient is named, are put in the order of a digest of the seed and their name, and this
    order is cut by the shares: the same for any order of rows, and no patient or image is in two splits. Of
    a small table, each split that has a share gets one of them at least, as long as there are enough.
    """
    images, compared = image_keys(table)
    groups = _joined(images, table.patient_keys)
    unique, inverse = np.unique(groups, return_inverse=True)
    digests = np.array([own_rows.key_of(str(seed), str(key)) for key in unique], np.uint64)
    rank = np.empty(len(unique), np.int64)
    rank[np.argsort(digests, kind="stable")] = np.arange(len(unique))
    ends = _ends(shares, len(unique))
    codes = np.searchsorted(ends, rank, side="right").astype(np.int16)[inverse]
    what = "patient_id" if table.patient_keys.any() else "image"
    parts = ", ".join(f"{name} {int((codes == i).sum()):,}" for i, name in enumerate(NAMES))
    said = f"{table.name} names no splits: drawn by {what} with split_seed={seed}, questions: {parts}."
    if not compared:
        said += " Copies of an image under two names were not looked for: too many files have the same size."
    return codes, said


def _ends(shares, total):
    """Where each split ends in the order of `total` groups."""
    sizes = np.diff(np.rint(np.cumsum(shares) / np.sum(shares) * total), prepend=0)
    for i, share in enumerate(shares):
        if share and not sizes[i] and sizes.max() > 1:
            sizes[np.argmax(sizes)] -= 1
            sizes[i] = 1
    return np.cumsum(sizes)


def _joined(images, patients):
    """Rows that share an image or a patient get one number: the smallest key that is reached from row to row."""
    groups = images
    while True:
        before = groups
        for keys in (images, np.where(patients > 0, patients, images)):
            _, inverse = np.unique(keys, return_inverse=True)
            least = np.full(inverse.max() + 1, np.iinfo(np.uint64).max, np.uint64)
            np.minimum.at(least, inverse, groups)
            groups = least[inverse]
        if np.array_equal(groups, before):
            return groups


def shared(table: OwnTable) -> list[str]:
    """Sentences on what two of the splits that a table gives have in common, as builds of data sets report it."""
    if len(table.splits) < 2:
        return []
    images, compared = image_keys(table)
    out = []
    for kind, keys, column in (("image", images, "image_id"), ("patient", table.patient_keys, "patient_id")):
        if not keys.any():
            continue
        members = [np.unique(keys[(table.split_codes == i) & (keys > 0)]) for i in range(len(table.splits))]
        found = False
        for a in range(len(members)):
            for b in range(a + 1, len(members)):
                both = np.intersect1d(members[a], members[b])
                if len(both):
                    found = True
                    first = (int(np.flatnonzero(keys == key)[0]) for key in both[:_FIRST])
                    names = ", ".join(sorted(table[i][column] for i in first)) + (", ..." if len(both) > _FIRST else "")
                    what = f"{len(both):,} {kind}{'s' if len(both) > 1 else ''}"
                    out.append(
                        f"WARNING: {table.name}: {what} in both {table.splits[a]} and {table.splits[b]} ({names})."
                    )
        if not found:
            out.append(f"{table.name}: no {kind} is in two splits.")
    if not compared:
        out.append(f"{table.name}: images were compared by name alone: too many files have the same size.")
    return out


def select(split: str, names: Sequence[str], codes: np.ndarray, where: str) -> np.ndarray:
    """int[n]: rows of a split, in their order. `split` is as TFDS has it: slices in rows or percent, and sums; "all".

    Raises:
      InputError: no such split, a slice that can't be read or goes past the end, nothing in it.
    """
    found = []
    for part in split.split("+"):
        match = _PART.fullmatch(part.strip())
        name = own_rows.split_name(match[1]) if match else ""
        if name in names:
            rows = np.flatnonzero(codes == names.index(name))
        elif name == "all":
            rows = np.arange(len(codes))
        else:
            known = ", ".join(f"{n} ({int((codes == i).sum())} examples)" for i, n in enumerate(names))
            known = ", ".join(filter(None, [known, f"all ({len(codes)} examples)"]))
            raise InputError(f"{where} has no split {part.strip()!r}; it has {known}")
        begin, end = (_boundary(match[i], len(rows), default, part, where) for i, default in ((2, 0), (3, len(rows))))
        if begin >= end:
            raise InputError(f"split {part.strip()!r} of {where} is empty; {name} has {len(rows)} examples")
        found.append(rows[begin:end])
    return np.concatenate(found)


def _boundary(text, count, default, part, where):
    if text is None:
        return default
    value = int(text.rstrip("%"))
    limit = 100 if text.endswith("%") else count
    if abs(value) > limit:
        raise InputError(f"split {part.strip()!r} of {where} can't be read: there are {count} examples")
    value = int(round(value * count / 100)) if text.endswith("%") else value
    return value + count if value < 0 else value
