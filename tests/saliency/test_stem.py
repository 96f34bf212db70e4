"""A tower with convolutions before its patches (`stem`): its patches are the same, and so are the maps' cells."""

import jax
import numpy as np
import pytest

from paligemma_med import experiment
from paligemma_med.models import paligemma, vlm
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.saliency import capture, report, sanity
from tests import tiny


@pytest.fixture(scope="module")
def setting():
    """(model, params)"""
    model = dict(tiny.MODEL, img=dict(tiny.MODEL["img"], stem=4))
    model = capture.capturable(experiment.make_model(tiny.config(model=model)))
    rng = np.random.default_rng(0)
    shapes = paligemma.abstract_params(model, image_size=tiny.RES)
    return model, jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


def test_a_stem_is_randomised_with_what_is_before_the_layers(setting):
    model, params = setting
    last = sanity.stages(params, model.leaves)[-1]
    before, after = flatten_tree(params), flatten_tree(sanity.randomised(params, [last], leaves=model.leaves))
    changed = {n for n in before if not np.array_equal(before[n], after[n])}
    assert {"img/stem_0/kernel", "img/stem_norm_1/scale", "img/embedding/kernel", "img/pos_embedding"} <= changed
    assert not any(n.startswith(("llm/", "img/Transformer/")) for n in changed)


@pytest.mark.slow
def test_every_map_has_a_cell_for_each_patch(setting):
    model, params = setting
    image = np.random.default_rng(1).uniform(-1, 1, (tiny.RES, tiny.RES, 3)).astype(np.float32)
    arrays, _ = report.measure(model, params, image, [2, 40, 50, 60, 7], [300, 31, 1])
    assert arrays.grid == vlm.patch_grid(model, image) == (tiny.RES // 16,) * 2
    for found in arrays.maps:
        assert np.isfinite(found.values).all() and np.abs(found.values).sum() > 0, found.method
