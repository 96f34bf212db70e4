"""Sanity checks: what is randomised when, how maps are compared, and that the checks can fail."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from paligemma_med.models import paligemma
from paligemma_med.saliency import relevancy, sanity, sequence

MODEL = paligemma.Model(
    img=dict(variant="mu/16", depth=2),
    llm=dict(variant="gemma_mu", depth=3, vocab_size=64),
    lora=[("llm/layers/attn/q_einsum", dict(rank=2))],
)


@functools.cache
def params():
    """Random numbers in every leaf, so that none has one value throughout."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), jnp.float32),
        paligemma.abstract_params(MODEL, image_size=96),
    )


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(p.key for p in path): np.asarray(x, np.float32) for path, x in leaves}


def changed(a, b):
    """{(leaf, layer or None) that differ} of two trees."""
    out = set()
    for (name, x), y in zip(flat(a).items(), flat(b).values(), strict=True):
        stacked = "/layers/" in name or "/encoderblock/" in name
        for i in range(len(x)) if stacked else (None,):
            if not np.array_equal(x if i is None else x[i], y if i is None else y[i]):
                out.add((name, i))
    return out


def everything():
    return changed(params(), jax.tree.map(lambda x: x + 1, params()))


# --- Randomised weights ---


def test_stages_run_from_the_output_down():
    assert sanity.stages(params()) == [
        "llm/final_norm",
        "llm/layers/2",
        "llm/layers/1",
        "llm/layers/0",
        "llm/embedder",
        "img/head",
        "img/Transformer/encoder_norm",
        "img/Transformer/encoderblock/1",
        "img/Transformer/encoderblock/0",
        "img/embeddings",
    ]


def test_each_stage_changes_its_own_leaves_and_all_stages_change_all():
    seen = [changed(params(), sanity.randomised(params(), [s])) for s in sanity.stages(params())]
    for i, one in enumerate(seen):
        assert one
        for other in seen[:i]:
            assert not one & other
    assert set.union(*seen) == everything()
    assert {name for name, i in seen[1]} == {n for n in flat(params()) if "llm/layers/" in n}
    assert {i for _, i in seen[1]} == {2}
    assert {name for name, _ in seen[-1]} == {"img/embedding/kernel", "img/embedding/bias", "img/pos_embedding"}


def test_cascade_keeps_the_noise_above_and_ends_in_noise_alone():
    above = set()
    before = params()
    for name, random in sanity.cascade(params(), seed=3):
        step = changed(before, random)
        assert step == changed(params(), sanity.randomised(params(), [name], seed=3))
        assert not step & above
        above |= step
        before = random
    assert above == everything()
    whole = sanity.randomised(params(), sanity.stages(params()), seed=3)
    assert not changed(before, whole)
    assert changed(whole, sanity.randomised(params(), sanity.stages(params()), seed=4)) == above


def test_noise_has_the_scale_and_type_of_the_weights():
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params())
    random = sanity.randomised(half, sanity.stages(half))
    for x, y in zip(jax.tree.leaves(half), jax.tree.leaves(random), strict=True):
        assert (x.dtype, x.shape, x.sharding) == (y.dtype, y.shape, y.sharding)
        if x.size > 2000:
            x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
            assert abs(np.corrcoef(x.ravel(), y.ravel())[0, 1]) < 0.1
            np.testing.assert_allclose([y.mean(), y.std()], [x.mean(), x.std()], atol=0.03)
    with pytest.raises(ValueError, match=r"no stages \['llm/layers/9'\]"):
        sanity.randomised(half, ["llm/layers/9", "img/head"])


# --- Comparing maps ---


def test_similarity_is_spearmans():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 6, (2, 30))  # with ties
        assert sanity.similarity(a, b) == pytest.approx(scipy.stats.spearmanr(a, b)[0], abs=1e-12)
    a = rng.normal(size=(4, 5))
    assert sanity.similarity(a, np.exp(3 * a)) == pytest.approx(1)
    assert sanity.similarity(a, -a) == pytest.approx(-1)
    assert sanity.similarity(a, np.ones(20)) == 0
    with pytest.raises(ValueError, match="20 and 19 values"):
        sanity.similarity(a, np.ones(19))


def test_between_questions_tells_maps_of_the_image_from_maps_of_the_question():
    rng = np.random.default_rng(0)
    images = [i for i in range(6) for _ in range(4)]
    questions = list(range(4)) * 6
    of_image = rng.normal(size=(6, 50))[images]
    of_both = rng.normal(size=(24, 50))
    stuck = sanity.between_questions(of_image, images, questions)
    assert [round(s, 9) for _, s in stuck["same_image"]] == [1] * 36  # 6 images, 6 pairs each
    assert {i for i, _ in stuck["same_image"]} == set(range(6))
    assert abs(np.mean(stuck["other_image"])) < 0.1
    assert len(stuck["other_image"]) == 15 * 16 - 15 * 4  # the same question doesn't count
    free = sanity.between_questions(of_both, images, questions)
    assert abs(np.mean([s for _, s in free["same_image"]])) < 0.1
    assert len(sanity.between_questions(of_both, images, questions, 7)["other_image"]) == 7


# --- On a model ---


@pytest.mark.slow
def test_randomised_weights_change_relevancy_and_not_an_edge_detector():
    image = np.random.default_rng(1).uniform(-1, 1, (96, 96, 3))
    seq = sequence.make(MODEL, [2, 5, 7, 9], [11, 1], image)

    def of_model(params):
        return relevancy.relevancy(MODEL, params, seq.batch, seq.queries, seq.tokens).patches[0]

    def edges(_):
        patches = image.mean(-1).reshape(6, 16, 6, 16)
        return np.abs(np.diff(patches, axis=1)).mean(axis=(1, 3))

    random = sanity.randomised(params(), sanity.stages(params()))
    assert sanity.similarity(edges(params()), edges(random)) == pytest.approx(1)
    assert sanity.similarity(of_model(params()), of_model(params())) == pytest.approx(1)
    found = sanity.similarity(of_model(params()), of_model(random))
    assert abs(found) < sanity.MAX_AFTER_RANDOMISING
