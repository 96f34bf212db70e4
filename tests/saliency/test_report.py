"""The arrays of a report are those of the methods' own functions, in order and cut to size."""

import types

import jax
import numpy as np
import pytest

from paligemma_med import decode, experiment
from paligemma_med.explain import page
from paligemma_med.models import paligemma
from paligemma_med.saliency import (
    capture,
    occlusion,
    passes,
    raw,
    relevancy,
    report,
    rollout,
    sequence,
)
from tests import tiny

PROMPT, ANSWER = [2, 40, 50, 60, 7], [300, 31, 1]


@pytest.fixture(scope="module")
def setting():
    """(model, params, image)."""
    model = capture.capturable(experiment.make_model(tiny.config()))
    rng = np.random.default_rng(0)
    shapes = paligemma.abstract_params(model, image_size=tiny.RES)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    image = rng.uniform(-1, 1, (tiny.RES, tiny.RES, 3)).astype(np.float32)
    return model, params, image


@pytest.fixture(scope="module")
def measured(setting):
    return report.measure(setting[0], setting[1], setting[2], PROMPT, ANSWER)


def test_one_pass_gives_what_the_methods_give(setting, measured):
    model, params, image = setting
    arrays, _ = measured
    seq = sequence.make(model, PROMPT, ANSWER, image)
    end, p = seq.response.stop, seq.patches
    found = capture.attention(model, params, seq.batch)
    close = dict(rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(arrays.raw, found.llm[:, 0][:, :, seq.queries, :end], **close)
    assert arrays.grid == seq.grid
    np.testing.assert_allclose(arrays.logprobs, found.logprobs[0, 5:8], rtol=1e-4, atol=1e-5)
    maps = {(m.method, m.variant): m.values for m in arrays.maps}
    assert [v for m, v in maps if m == "rollout"] == list(passes.ROLLOUTS)
    for variant, kw in passes.ROLLOUTS.items():
        row = np.asarray(rollout.rollout(found.llm[:, 0], **kw))[seq.queries, :end]
        np.testing.assert_allclose(maps["rollout", variant], row, **close)
        pixels = rollout.to_patches(row[:, :p], rollout.rollout(found.img[:, 0], **kw))
        got = maps["rollout_siglip", variant]
        np.testing.assert_allclose(got[:, :p], pixels, **close)
        np.testing.assert_array_equal(got[:, p:], maps["rollout", variant][:, p:])
        np.testing.assert_allclose(got.sum(-1), 1, rtol=1e-5)
    want = relevancy.relevancy(model, params, seq.batch, seq.queries, ANSWER)
    own = np.eye(seq.batch["text"].shape[1] + p)[seq.queries]
    np.testing.assert_allclose(maps["relevancy", ""], (want.rows - own)[:, :end], **close)
    np.testing.assert_allclose(maps["relevancy_siglip", ""][:, :p], want.patches, **close)


@pytest.mark.slow
def test_without_a_prompt(setting):
    """As decoding finds it, of the image alone."""
    model, params, image = setting
    got, score = report.measure(model, params, image, [], ANSWER)
    empty = np.zeros((1, 4), np.int32)
    batch = dict(image=image[None], text=empty, mask_ar=empty, mask_input=empty)
    options = np.array([[ANSWER]])
    sums, _ = decode.score_options(model, params, batch, options, np.ones_like(options, bool))
    np.testing.assert_allclose(got.logprobs.sum(), sums[0, 0], rtol=1e-5)
    np.testing.assert_allclose(score(image[None])[0], got.logprobs, rtol=1e-4, atol=1e-5)
    for m in got.maps:
        if m.method.startswith("rollout"):
            np.testing.assert_allclose(m.values.sum(-1), 1, rtol=1e-5)
    assert (got.mass[..., 1] == 0).all()


def test_occlusion_and_its_regions(setting, measured):
    model, params, image = setting
    arrays, score = measured
    (values,) = [m.values for m in arrays.maps if m.method == "occlusion"]
    grid = arrays.grid
    seq = sequence.make(model, PROMPT, ANSWER, image)
    want = occlusion.occlusion(occlusion.scorer(model, params, seq), image, grid)
    np.testing.assert_allclose(values, want.reshape(3, -1), atol=1e-5)
    boxes = arrays.regions.boxes
    whole = [0, 0, *grid]
    after = arrays.regions.logprobs[boxes.tolist().index(whole)]
    mask = np.ones(image.shape[:2], bool)
    np.testing.assert_allclose(after, occlusion.region(score, image, mask)[1], atol=1e-3)
    # A rectangle of one patch is that patch's cell.
    y0, x0, y1, x1 = boxes[0]
    assert (y1 - y0, x1 - x0) == (1, 1)
    drop = values[:, y0 * grid[1] + x0]
    np.testing.assert_allclose(arrays.logprobs - drop, arrays.regions.logprobs[0], atol=1e-3)


def test_a_page_can_be_made_of_it(measured):
    arrays, _ = measured
    for m in (arrays.mass, raw.mass(arrays.raw, 4, slice(4, 9))):
        np.testing.assert_allclose(m.sum(-1), 1, rtol=1e-5)
    tokens, p = arrays.rivals
    assert tokens.shape == p.shape == (3, passes.RIVALS)
    assert (np.diff(p) <= 0).all() and (p.sum(-1) <= 1).all()
    made = types.SimpleNamespace(**vars(arrays), prompt=["x"] * 5, tokens=["x"] * 3)
    page.check(made)
    assert page.first_method(made) == "relevancy_siglip"


@pytest.mark.parametrize("grid", [(2, 2), (3, 5), (8, 8), (32, 32)])
def test_rectangles_of_the_coarse_grid(grid):
    boxes = report.boxes(grid)
    assert len(set(map(tuple, boxes.tolist()))) == len(boxes)
    assert (boxes[:, :2] < boxes[:, 2:]).all() and (boxes[:, 2:] <= grid).all()
    assert [0, 0, *grid] in boxes.tolist()
    cells = [min(n, report.REGIONS) for n in grid]
    assert len(boxes) == np.prod([n * (n + 1) // 2 for n in cells])


@pytest.mark.slow  # another program
def test_fewer_methods(setting):
    model, params, image = setting
    arrays, _ = report.measure(model, params, image, PROMPT, ANSWER, methods=["raw"])
    assert arrays.maps == [] and arrays.regions is None and arrays.occlusion is None


def test_mistakes(setting):
    model, params, image = setting
    with pytest.raises(ValueError, match=r"methods has \['gradcam'\]; expected some of"):
        report.measure(model, params, image, PROMPT, ANSWER, methods=["gradcam"])
    with pytest.raises(ValueError, match="fill is 'noise'"):
        report.measure(model, params, image, PROMPT, ANSWER, fill="noise")
