"""Images that look alike: a perceptual hash, and pairs of hashes that differ in few bits.

The hash is a difference hash: is each cell of a 16 x 16 grid brighter than its neighbour to the left? It stays nearly
the same under another size, format, compression or brightness; under a crop, turn or mirror it doesn't. 256 bits, not
the usual 64, since radiographs of one kind resemble each other. Source of the method: N. Krawetz, "Kind of Like That"
(2013), hackerfactor.com.
"""

from collections.abc import Sequence

import numpy as np
import PIL.Image

from paligemma_med.pp import images

SIDE = 16
BITS = SIDE * SIDE
CLOSE = 12  # bits in which two pictures taken for the same may differ
# A picture with fewer bits of either kind is nearly plain, or one edge: too many others have its hash.
_LEAST = 24
_BANDS = CLOSE + 1


def fingerprint(content: bytes) -> np.ndarray | None:
    """uint8[32], the hash of an image's bytes; None if it is too plain to compare, or can't be read."""
    try:
        rgb = images.decode(content).rgb
    except ValueError:
        return None
    grey = PIL.Image.fromarray(rgb).convert("L").resize((SIDE + 1, SIDE), PIL.Image.Resampling.BOX)
    cells = np.asarray(grey, np.int16)
    bits = cells[:, 1:] > cells[:, :-1]
    return np.packbits(bits) if _LEAST <= bits.sum() <= BITS - _LEAST else None


def close_pairs(a: Sequence[np.ndarray | None], b: Sequence[np.ndarray | None]) -> list[tuple[int, int, int]]:
    """(i, j, bits that differ) of all pairs a[i], b[j] that differ in at most CLOSE bits, in order.

    Exact: of CLOSE + 1 groups of bits one must be equal. Groups are drawn from all over the picture, or all with a
    black border would be compared with all.
    """
    rows = [[i for i, x in enumerate(some) if x is not None] for some in (a, b)]
    if not all(rows):
        return []
    packed = [np.stack([some[i] for i in r]) for some, r in zip((a, b), rows)]
    bits = [np.unpackbits(x, axis=1) for x in packed]
    order = np.random.default_rng(0).permutation(BITS)
    found = {}
    for band in np.array_split(order, _BANDS):
        weights = 1 << np.arange(len(band), dtype=np.int64)
        keys = [x[:, band].astype(np.int64) @ weights for x in bits]
        by_key = np.argsort(keys[1], kind="stable")
        ordered = keys[1][by_key]
        first, last = (np.searchsorted(ordered, keys[0], side) for side in ("left", "right"))
        for i in np.flatnonzero(last > first):
            candidates = by_key[first[i] : last[i]]
            distance = np.bitwise_count(packed[0][i] ^ packed[1][candidates]).sum(axis=1, dtype=np.int64)
            for j, d in zip(candidates[distance <= CLOSE], distance[distance <= CLOSE]):
                found[rows[0][i], rows[1][j]] = int(d)
    return sorted((i, j, d) for (i, j), d in found.items())
