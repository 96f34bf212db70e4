"""How well a saliency map agrees with a box, and how well it orders patches by importance.

Both are compared on the grid of patches: a map has one number per cell, and boxes become the share of
each cell's area that they cover. Since a map is constant within a cell, energy and IoU are exactly those
of the pixels. None of these figures depends on a map's scale.

Axis letters: h, w cells of the grid.
"""

import numpy as np


def coverage(boxes, size, grid) -> np.ndarray:
    """The share of each cell that the union of boxes covers, float64[h, w] in [0, 1].

    The model sees the whole image, resized in each axis independently. That keeps shares of the image,
    so the model's size in pixels isn't needed.

    Args:
      boxes: [N, 4] x, y, width, height in pixels of the stored image; parts outside the image don't
        count.
      size: (height, width) of the stored image.
      grid: (rows, columns).

    Raises:
      ValueError: boxes that aren't [N, 4], or that cover no part of the image.
    """
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4) if len(boxes) else np.zeros((0, 4))
    scale = np.array([grid[1] / size[1], grid[0] / size[0]])
    low = boxes[:, :2] * scale
    high = low + boxes[:, 2:] * scale
    # The edges of all boxes cut the image into rectangles, each wholly inside or outside every box.
    limits = (grid[1], grid[0])
    xs, ys = (np.unique(np.clip(np.r_[0 : n + 1, low[:, i], high[:, i]], 0, n)) for i, n in enumerate(limits))
    x, y = (xs[1:] + xs[:-1]) / 2, (ys[1:] + ys[:-1]) / 2
    in_x = (low[:, :1] < x) & (x < high[:, :1])
    in_y = (low[:, 1:] < y) & (y < high[:, 1:])
    inside = (in_y[:, :, None] & in_x[:, None, :]).any(0)
    area = inside * np.diff(ys)[:, None] * np.diff(xs)[None]
    out = np.zeros(grid)
    np.add.at(out, (y.astype(int)[:, None], x.astype(int)[None]), area)
    if not out.any():
        raise ValueError(f"the boxes {boxes.tolist()} cover nothing of an image of {tuple(size)}.")
    return out


def pointing(values, boxes, size, *, tolerance=0.0) -> float:
    """The pointing game: is the maximum of the map in a box?

    The point is the centre of the maximal cell. J. Zhang et al., "Top-down Neural Attention by
    Excitation Backprop" (arXiv 1608.00507), 4.1, who allow 15 pixels. With several maximal cells this
    is the expected hit of one drawn at random, so that a constant map scores like a random one.

    Args:
      values: float[h, w].
      boxes, size: as in `coverage`.
      tolerance: a hit may lie up to this many cells outside the box, on either axis.

    Returns:
      float in [0, 1].
    """
    values = np.asarray(values)
    scale = np.array([values.shape[1] / size[1], values.shape[0] / size[0]])
    low = np.asarray(boxes, np.float64)[:, :2] * scale
    high = low + np.asarray(boxes, np.float64)[:, 2:] * scale
    ys, xs = np.nonzero(values == values.max())
    centres = np.stack([xs, ys], axis=-1)[:, None] + 0.5
    hit = ((centres >= low - tolerance) & (centres <= high + tolerance)).all(-1).any(1)
    return float(hit.mean())


def energy(values, covered) -> float:
    """The share of a map that lies in the boxes: Σ map · coverage / Σ map.

    H. Wang et al., "Score-CAM" (arXiv 1910.01279), 4.2. Negative values count as 0. A map without a
    positive value says nothing and is treated as constant, which gives the boxes' share of area.

    Args:
      values: float[h, w].
      covered: float[h, w] of `coverage`.
    """
    values = np.maximum(values, 0).astype(np.float64)
    total = values.sum()
    return float((values * covered).sum() / total if total > 0 else covered.mean())


def best_iou(values, covered) -> float:
    """The largest intersection over union of the boxes and {map >= t}, over all thresholds t.

    The threshold is chosen knowing the box, so even a poor map scores well with a box that fills the
    image: compare with priors.

    Args: as in `energy`.
    """
    values, covered = np.ravel(values), np.ravel(covered).astype(np.float64)
    order = np.argsort(-values, kind="stable")
    inside = np.cumsum(covered[order])
    taken = np.arange(1, len(order) + 1)
    ends = np.append(np.diff(values[order]) != 0, True)  # equal values stay on one side together
    return float(np.max((inside / (taken + covered.sum() - inside))[ends]))


def centre_prior(grid, sigma=0.25) -> np.ndarray:
    """A Gaussian, float64[h, w]: a map that only knows that things lie in the middle.

    Args:
      grid: (rows, columns).
      sigma: standard deviation as a share of the side.
    """
    y, x = (((np.arange(n) + 0.5) / n - 0.5) / sigma for n in grid)
    return np.exp(-(y[:, None] ** 2 + x[None] ** 2) / 2)


def random_order(grid, rng) -> np.ndarray:
    """float64[h, w]: all cells in random order."""
    return rng.permutation(grid[0] * grid[1]).reshape(grid).astype(np.float64)


def steps(values, count) -> np.ndarray:
    """bool[count + 1, h, w]: which cells are taken after 0, …, `count` equal steps, highest values first;
    among equal values, upper and left cells first."""
    order = np.argsort(-np.ravel(values), kind="stable")
    rank = np.empty(len(order), int)
    rank[order] = np.arange(len(order))
    taken = np.round(np.linspace(0, len(order), count + 1))
    return (rank < taken[:, None]).reshape(-1, *np.shape(values))


def area_under(curve) -> float:
    """Area under a curve of equal steps over [0, 1] by the trapezoidal rule.

    For deletion and insertion curves, see V. Petsiuk et al., "RISE" (arXiv 1806.07421), 3.2.
    """
    curve = np.asarray(curve, np.float64)
    return float((curve[1:] + curve[:-1]).mean() / 2)
