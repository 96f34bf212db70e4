"""Maps against boxes: hand-worked cases, agreement with pixels, and what must not matter."""

import numpy as np
import pytest

from paligemma_med.saliency import localisation

SIZE = (100, 200)  # height, width of the stored image


def pixels(boxes, grid, size):
    """The coverage by counting: every pixel of the stored image is in a box or not."""
    inside = np.zeros(size, bool)
    for x, y, w, h in boxes:
        inside[max(y, 0) : max(y + h, 0), max(x, 0) : max(x + w, 0)] = True
    cell = (size[0] // grid[0], size[1] // grid[1])
    return inside.reshape(grid[0], cell[0], grid[1], cell[1]).mean((1, 3))


def test_coverage_by_hand():
    # Cells of 50 × 50: the box takes half of one and a quarter of the next.
    covered = localisation.coverage([[0, 0, 75, 25]], SIZE, (2, 4))
    np.testing.assert_allclose(covered, [[0.5, 0.25, 0, 0], [0, 0, 0, 0]])


@pytest.mark.parametrize("seed", range(20))
def test_coverage_counts_pixels_of_the_union_once(seed):
    rng = np.random.default_rng(seed)
    low = rng.integers(-20, 100, (4, 2))
    boxes = np.concatenate([low, rng.integers(1, 90, (4, 2))], axis=1)
    boxes[0] = [10, 10, 5, 5]  # something is inside
    for grid in ((5, 10), (2, 4), (1, 1)):
        found = localisation.coverage(boxes, SIZE, grid)
        np.testing.assert_allclose(found, pixels(boxes, grid, SIZE), atol=1e-9)


def test_boxes_outside_of_the_image_are_refused():
    for boxes in ([[300, 0, 5, 5]], [], [[5, 5, 0, 9]]):
        with pytest.raises(ValueError, match="cover nothing"):
            localisation.coverage(boxes, SIZE, (2, 4))


def test_pointing_by_hand():
    values = np.zeros((2, 4))
    values[1, 2] = 1  # the centre is pixel x = 125, y = 75
    assert localisation.pointing(values, [[120, 70, 10, 10]], SIZE) == 1
    assert localisation.pointing(values, [[70, 120, 10, 10]], SIZE) == 0  # x and y are no twins
    beside = [[150, 70, 10, 10]]  # half a cell to the right
    assert localisation.pointing(values, beside, SIZE) == 0
    assert localisation.pointing(values, beside, SIZE, tolerance=0.5) == 1
    assert localisation.pointing(values, beside, SIZE, tolerance=0.4) == 0
    assert localisation.pointing(values, [*beside, [100, 50, 50, 50]], SIZE) == 1  # either box


def test_pointing_of_several_maxima_is_their_mean():
    box = [[0, 0, 50, 100]]  # the left quarter: two of eight centres
    assert localisation.pointing(np.ones((2, 4)), box, SIZE) == 0.25
    assert localisation.pointing([[1, 0, 0, 1], [0, 0, 0, 0]], box, SIZE) == 0.5


def test_energy_by_hand():
    covered = np.array([[1, 0.5], [0, 0]])
    assert localisation.energy([[1, 2], [1, 0]], covered) == pytest.approx(0.5)
    assert localisation.energy([[1, 2], [1, -9]], covered) == pytest.approx(0.5)
    # No positive value: an even map, which has the boxes' share of area.
    assert localisation.energy(-np.ones((2, 2)), covered) == pytest.approx(0.375)
    assert localisation.energy(np.ones((2, 2)), covered) == pytest.approx(0.375)


def test_best_iou_by_hand():
    covered = np.array([[1, 0.5], [0, 0]])
    # From the top: {a} 1/1.5, {a, b} 1.5/2, then less.
    assert localisation.best_iou([[4, 3], [2, 1]], covered) == pytest.approx(0.75)
    # c first: {c} 0/2.5, {c, a} 1/2.5, {c, a, b} 1.5/3, all 1.5/4.
    assert localisation.best_iou([[3, 2], [4, 1]], covered) == pytest.approx(0.5)
    # a comes with c: {a, c} 1/2.5, all 1.5/4.
    assert localisation.best_iou([[1, 0], [1, 0]], covered) == pytest.approx(0.4)


def test_best_iou_is_that_of_all_thresholds():
    rng = np.random.default_rng(0)
    for _ in range(50):
        values, covered = rng.integers(0, 5, (3, 4)), rng.uniform(0, 1, (3, 4))
        every = []
        for t in np.unique(values):
            taken = values >= t
            both = covered[taken].sum()
            every.append(both / (taken.sum() + covered.sum() - both))
        assert localisation.best_iou(values, covered) == pytest.approx(max(every))


def test_scale_and_level_of_a_map_mean_nothing():
    rng = np.random.default_rng(1)
    values, box = rng.uniform(0, 1, (5, 10)), [[30, 20, 70, 50]]
    covered = localisation.coverage(box, SIZE, (5, 10))
    other = 7 * values
    assert localisation.energy(other, covered) == pytest.approx(localisation.energy(values, covered))
    other += 3
    for figure in (localisation.best_iou, lambda v, _: localisation.pointing(v, box, SIZE)):
        assert figure(other, covered) == pytest.approx(figure(values, covered))


def test_a_perfect_map_is_perfect():
    box = [[50, 0, 100, 50]]  # two whole cells
    covered = localisation.coverage(box, SIZE, (2, 4))
    assert localisation.pointing(covered, box, SIZE) == 1
    assert localisation.energy(covered, covered) == 1
    assert localisation.best_iou(covered, covered) == 1


def test_centre_prior_is_even_handed():
    prior = localisation.centre_prior((6, 8))
    np.testing.assert_allclose(prior, prior[::-1])
    np.testing.assert_allclose(prior, prior[:, ::-1])
    assert prior[2:4, 3:5].min() == prior.max() > prior[0].max()
    assert prior[3, 0] == pytest.approx(prior[0, 0] / prior[0, 4] * prior[3, 4])  # a product


def test_steps_take_the_highest_first():
    taken = localisation.steps(np.array([[0.1, 0.9], [0.5, 0.5]]), 4)
    assert taken.shape == (5, 2, 2) and not taken[0].any() and taken[4].all()
    assert [np.argwhere(b & ~a).tolist() for a, b in zip(taken, taken[1:])] == [[[0, 1]], [[1, 0]], [[1, 1]], [[0, 0]]]
    assert localisation.steps(np.arange(12.0).reshape(3, 4), 5).sum((1, 2)).tolist() == [0, 2, 5, 7, 10, 12]


def test_area_by_hand():
    assert localisation.area_under([1, 0]) == 0.5
    assert localisation.area_under([1, 1, 0]) == 0.75
    assert localisation.area_under([0.3] * 7) == pytest.approx(0.3)
