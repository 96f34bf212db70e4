"""Maps wherever the image stands, and through a connector, against attention read off by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.models import connector, vlm
from paligemma_med.saliency import capture, occlusion, raw, relevancy, report, rollout, sequence, trace
from tests.models import pool

GRID, P = (4, 4), 16
PROMPT, ANSWER, T = [5, 9, 2, 7], [11, 3, 1], 10
# image_ar, mask_ar of the prompt, image_at, pooled.
CASES = {
    "front": ("prefix", 0, None, False),
    "within a prefix": ("prefix", 0, 2, False),
    "pooled, a block": ("block", 1, 3, True),
    "causal, at the end": ("causal", 1, 4, True),
}
FEW = ("pooled, a block", "causal, at the end")  # where a case compiles much


@pytest.fixture(autouse=True)
def _known():
    with pool.known():
        yield


@functools.cache
def setting(name):
    """(model, params, sequence)."""
    image_ar, mask_ar, image_at, pooled = CASES[name]
    llm = dict(width=32, depth=3, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=61)
    model = vlm.Model(
        img=dict(variant="mu/8", depth=2),
        llm=llm,
        image_ar=image_ar,
        connector=dict(kind="pool of tests", factor=2) if pooled else None,
    )
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_params(model, image_size=32)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    image = rng.uniform(-1, 1, (32, 32, 3))
    kw = dict(mask_ar=mask_ar, image_at=image_at, pad_to=T)
    return model, params, sequence.make(model, PROMPT, ANSWER, image, **kw)


@functools.cache
def whole(name):
    model, params, seq = setting(name)
    return capture.attention(model, params, seq.batch)


def by_hand(name, rows):
    """float[…, S] → float[…, P + T], column by column."""
    pooled, at = CASES[name][3], CASES[name][2] or 0
    q = 4 if pooled else P
    image, text = rows[..., at : at + q], np.concatenate([rows[..., :at], rows[..., at + q :]], axis=-1)
    cells = [image[..., (i // 4 // 2) * 2 + i % 4 // 2] / 4 if pooled else image[..., i] for i in range(P)]
    return np.concatenate([np.stack(cells, axis=-1), text], axis=-1)


def slots(name):
    """(positions that predict the answer, S)."""
    q = 4 if CASES[name][3] else P
    return q + len(PROMPT) - 1 + np.arange(len(ANSWER)), q + T


CLOSE = dict(rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_sequence_and_its_parts(name):
    _, _, seq = setting(name)
    assert (seq.grid, seq.patches, seq.prompt, seq.response) == (GRID, P, slice(16, 20), slice(20, 23))
    np.testing.assert_array_equal(seq.queries, slots(name)[0])
    np.testing.assert_array_equal(seq.tokens, ANSWER)
    np.testing.assert_array_equal(seq.places, [3, 4, 5])
    np.testing.assert_array_equal(seq.batch["mask_ar"][0, :5], [CASES[name][1]] * 4 + [1])
    assert seq.batch.get("image_at") == CASES[name][2]


@pytest.mark.parametrize("name", CASES)
def test_attention_and_rollout(name):
    model, params, seq = setting(name)
    queries, length = slots(name)
    full, got = whole(name), capture.streamed(model, params, seq.batch, seq.queries)
    assert full.llm.shape[-1] == length
    np.testing.assert_allclose(got.rows, by_hand(name, full.llm[:, 0][:, :, queries]), **CLOSE)
    rolled = by_hand(name, np.asarray(rollout.rollout(full.llm[:, 0]))[queries])
    np.testing.assert_allclose(got.rollout, rolled, **CLOSE)
    np.testing.assert_allclose(got.rollout.sum(-1), 1, rtol=1e-5)
    np.testing.assert_allclose(got.logprobs, full.logprobs[0, 4:7], rtol=1e-4, atol=1e-5)
    parts = [by_hand(name, full.llm[:, 0][:, :, queries])[..., s] for s in (slice(P), seq.prompt, slice(20, None))]
    np.testing.assert_allclose(got.mass, np.stack([x.sum(-1) for x in parts], axis=-1), **CLOSE)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in FEW)) for n in CASES])
def test_relevancy(name):
    """The rule by hand, on the gradients by all probabilities of both towers."""
    model, params, seq = setting(name)
    queries, length = slots(name)
    got = relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens)
    probs = whole(name)

    @jax.jit
    def gradients(i):
        def score(zeros):
            variables = {"params": params, "perturbations": vlm.perturbations(model, **zeros)}
            logits, _ = model.apply(variables, **trace.inputs(seq.batch))
            return logits[0, len(PROMPT) - 1 + i, jnp.array(ANSWER)[i]]

        return jax.grad(score)(dict(img=jnp.zeros(probs.img.shape), llm=jnp.zeros(probs.llm.shape)))

    for i, query in enumerate(queries):
        made = {}
        for tower, grad in gradients(i).items():
            weights = np.maximum(np.asarray(grad) * getattr(probs, tower), 0)[:, 0].mean(1)
            made[tower] = functools.reduce(lambda r, w: r + w @ r, weights, np.eye(weights.shape[-1]))
        row = by_hand(name, made["llm"][query])
        close = dict(rtol=1e-4, atol=1e-5 * row.max())
        np.testing.assert_allclose(got.rows[i], row, **close)
        np.testing.assert_allclose(got.patches[i], row[:P] @ made["img"], **close)
    own = relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens, own=False)
    np.testing.assert_allclose(own.rows, got.rows - by_hand(name, np.eye(length)[queries]), **CLOSE)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != FEW[0])) for n in CASES])
def test_a_report(name):
    model, params, seq = setting(name)
    full, (queries, _) = whole(name), slots(name)
    kw = dict(mask_ar=CASES[name][1], image_at=CASES[name][2])
    image = seq.batch["image"][0]
    got, score = report.measure(model, params, image, PROMPT, ANSWER, methods=("rollout", "occlusion"), **kw)
    end = P + len(PROMPT) + len(ANSWER)
    rows = by_hand(name, full.llm[:, 0][:, :, queries])[..., :end]
    np.testing.assert_allclose(got.raw, rows, **CLOSE)
    np.testing.assert_allclose(got.mass, raw.mass(rows, P, seq.prompt), **CLOSE)
    maps = {(m.method, m.variant): m.values for m in got.maps}
    row = by_hand(name, np.asarray(rollout.rollout(full.llm[:, 0]))[queries])[:, :end]
    np.testing.assert_allclose(maps["rollout", "mean of heads"], row, **CLOSE)
    pixels = row[:, :P] @ np.asarray(rollout.rollout(full.img[:, 0]))
    np.testing.assert_allclose(maps["rollout_siglip", "mean of heads"][:, :P], pixels, **CLOSE)
    np.testing.assert_allclose(score(image[None])[0], got.logprobs, rtol=1e-4, atol=1e-5)
    assert got.grid == GRID and maps["occlusion", ""].shape == (3, P)


@pytest.mark.parametrize("name", CASES)
def test_the_answer_is_as_probable_as_decoding_finds_it(name):
    model, params, seq = setting(name)
    score = occlusion.scorer(model, params, seq)(seq.batch["image"])
    valid = np.array([[1] * 4 + [0] * 6])
    prompt = {"mask_input": valid, "text": seq.batch["text"] * valid}
    options = np.array([[ANSWER]])
    sums, _ = decode.score_options(model, params, {**seq.batch, **prompt}, options, np.ones_like(options, bool))
    np.testing.assert_allclose(score.sum(), sums[0, 0], rtol=1e-5)


def test_queries_that_predict_nothing_are_refused():
    model, params, seq = setting("pooled, a block")
    known = [0, 1, 6, 7, 8, 9, 10, 11, 12]  # the image is at 3 to 6; 13 is the text's last
    for query in (2, 3, 5, 13):
        with pytest.raises(ValueError, match=re.escape(f"queries are [{query}]; expected positions that predict its")):
            capture.streamed(model, params, seq.batch, [query])
    np.testing.assert_array_equal(trace.of(model, seq.batch).check_queries(known, last=1), known)
    with pytest.raises(ValueError, match="image_at is 5; expected 0 to 4, the length of the prompt"):
        sequence.make(model, PROMPT, ANSWER, seq.batch["image"][0], image_at=5)


def test_connectors_that_there_are_not():
    assert connector.tokens(None, 16) == 16 and connector.kind_of({}) is None
    with pytest.raises(
        ValueError, match=r"connector.kind is 'x'; expected one of \['pool of tests', 'projector', 'qformer'\]"
    ):
        connector.tokens(dict(kind="x"), 16)
