"""Maps through every connector, against whole matrices in plain numpy: what is fused by hand, multiplied by hand, and
ends where it should.

Axis letters: Q image tokens, P' the tower's tokens, a class token included.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med.models import presets, vlm
from paligemma_med.saliency import capture, occlusion, passes, relevancy, report, sanity, sequence, trace
from paligemma_med.saliency.methods import KINDS
from tools.eval_saliency import measure

PROMPT, ANSWER, T = [5, 9, 2, 7], [11, 3, 12], 10
_LLM = dict(width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=61)
_TOWER = dict(width=24, depth=2, mlp_dim=40, num_heads=3, patch_size=8)
_QFORMER = dict(queries=5, inner=24, depth=4, mlp_dim=32, num_heads=3)
# Changes to a preset; image_at; pixels.
CASES = {
    "medgemma_4b": (dict(connector=dict(factor=2), llm=dict(window=16)), 3, (32, 32)),
    "llama_clip": (dict(), 1, (16, 32)),
    "bloom_qformer": (dict(connector=_QFORMER, llm=dict(num_kv_heads=4)), None, (16, 24)),
    "pefomed": (dict(connector=dict(factor=2), llm=dict(num_kv_heads=4)), 2, (32, 32)),
}
MOST = [pytest.param(name, marks=[pytest.mark.slow] * (name != "bloom_qformer")) for name in CASES]
CLOSE = dict(rtol=1e-4, atol=1e-6)


def model_of(name):
    preset, (changes, _, _) = presets.PRESETS[name], CASES[name]
    llm = {**preset["llm"], **_LLM, **changes.get("llm", {})}
    connector = {**preset["connector"], **changes.get("connector", {})} if "connector" in preset else None
    img = {**preset["img"], **_TOWER}
    return vlm.Model(img=img, llm=llm, connector=connector, image_ar=preset["image_ar"])


@functools.cache
def setting(name):
    """(model, params, sequence); norms, biases, positions, class token and queries are random. Queries and keys are
    large, since by even attention all orders of layers come to the same."""
    model, (_, image_at, (h, w)) = model_of(name), CASES[name]
    rng = np.random.default_rng(0)
    arrays = jnp.zeros((1, h, w, 3)), jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), *arrays))["params"]

    def made(path, x):
        large = any(getattr(key, "key", "") in ("query", "key") for key in path)
        return rng.normal(0, 1.5 if large else 0.3, x.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(made, shapes)
    image = rng.uniform(-1, 1, (h, w, 3))
    return model, params, sequence.make(model, PROMPT, ANSWER, image, mask_ar=1, image_at=image_at, pad_to=T)


@functools.cache
def whole(name):
    """{"img", "llm", "connector/…": every layer's probabilities}, without the axis of the batch."""
    model, params, seq = setting(name)
    _, out = jax.jit(lambda p, x: model.apply({"params": p}, **x, capture_attention=True))(
        params, trace.inputs(seq.batch)
    )
    found = {k: np.asarray(v, np.float64)[:, 0] for k, v in out.items() if k.startswith("connector/")}
    return {"img": np.asarray(out["img/attn"])[:, 0], "llm": np.asarray(out["llm/attn"])[:, 0], **found}


@functools.cache
def gradients(name):
    """[the gradients of one answer token's logit with respect to all of `whole`] for each token."""
    model, params, seq = setting(name)
    probs, places = whole(name), seq.places
    slots = {k: np.zeros((len(probs[k]), 1, *probs[k].shape[1:]), np.float32) for k in ("img", "llm")}
    slots["connector"] = {
        k: np.zeros((v[0], 1, _QFORMER["num_heads"], *v[2:]), np.float32)
        for k, v in trace.of(model, seq.batch).slots.items()
    }

    @jax.jit
    def of(slots, i):
        def score(slots):
            variables = {"params": params, "perturbations": vlm.perturbations(model, **slots)}
            logits, _ = model.apply(variables, **trace.inputs(seq.batch))
            return logits[0, places[0] + i, jnp.asarray(seq.tokens)[i]]

        return jax.grad(score)(slots)

    out = []
    for i in range(len(ANSWER)):
        found = jax.device_get(of(slots, i))
        mine = {k: found[k][:, 0] for k in ("img", "llm")}
        if of_queries := found["connector"]:
            at = "layers/block_{}/{}".format
            own = [of_queries[at(i, "self")][:, 0] for i in (0, 1)]
            mine["connector/self"] = np.stack(own, 1).reshape(-1, *own[0].shape[1:])
            mine["connector/cross"] = of_queries[at(0, "cross")][:, 0]
        out.append(mine)
    return out


def product(layers, halve):
    """The whole matrix of a stack, from the first layer up."""
    size = layers.shape[-1]
    steps = [(a / a.sum(-1, keepdims=True) + np.eye(size)) / 2 if halve else a + np.eye(size) for a in layers]
    return functools.reduce(lambda r, a: a @ r, steps, np.eye(size))


def through_connector(name, own, cross, halve):
    """[Q, constants and P']: an image token's share on what the connector was given, queries first."""
    if name == "bloom_qformer":
        q, p = cross.shape[1:]
        joint = np.eye(q + p)
        for layer, a in enumerate(own):
            step = np.eye(q + p)
            step[:q, :q] = (np.eye(q) + a) / 2 if halve else np.eye(q) + a
            joint = step @ joint
            if layer % 2 == 0:
                step = np.eye(q + p)
                step[:q, :q] /= 2 if halve else 1
                step[:q, q:] = cross[layer // 2] / (2 if halve else 1)
                joint = step @ joint
        return joint[:q]
    rows, columns = (n // 8 for n in CASES[name][2])
    places = np.arange(rows * columns)
    if name == "medgemma_4b":
        token = places // columns // 2 * (columns // 2) + places % columns // 2
    else:
        token = places // (2 if name == "pefomed" else 1)
    shares = np.eye(token.max() + 1)[:, token]
    shares = shares / shares.sum(1, keepdims=True)
    return shares if name == "medgemma_4b" else np.pad(shares, ((0, 0), (1, 0)))  # the class token, which isn't read


def check(name, got, row, joint, tower, *, scaled):
    """Compares `trace.Shares` with a row of the language model, carried through whole matrices by hand."""
    at, p = CASES[name][1] or 0, got.values.shape[-1] - T
    image, text = row[at : at + len(joint)], np.concatenate([row[:at], row[at + len(joint) :]])
    tokens = (image @ joint)[joint.shape[1] - len(tower) :] @ tower
    cells = tokens[len(tower) - p :]
    if scaled:
        left = image.sum() - cells.sum()
        np.testing.assert_allclose(got.values.sum(-1), row.sum(), rtol=1e-5)
        if got.constants is None:
            assert name != "bloom_qformer" and abs(left) < 1e-6
        else:
            np.testing.assert_allclose(got.constants, left, rtol=1e-4, atol=1e-6)
        cells = cells * image.sum() / cells.sum()
    np.testing.assert_allclose(got.values, np.concatenate([cells, text]), rtol=1e-4, atol=1e-6 * np.abs(row).max())


def nth(shares, i):
    return trace.Shares(*(x if x is None else x[i] for x in shares))


@pytest.mark.parametrize("name", MOST)
def test_rollout_and_raw_attention(name):
    model, params, seq = setting(name)
    probs, patches = whole(name), seq.patches
    one = dict([next(iter(passes.ROLLOUTS.items()))])
    found = passes.Passes(model, params, seq, None, one).attention
    (rolled, carried), end = found.rollouts["mean of heads"], seq.response.stop

    def full(shares):  # the padding's columns, which are 0
        return shares._replace(
            values=np.pad(shares.values, [(0, 0)] * (shares.values.ndim - 1) + [(0, patches + T - end)])
        )

    of_llm = product(probs["llm"].mean(1), True)
    tower = product(probs["img"].mean(1), True)
    between = (
        [probs[f"connector/{k}"].mean(1) for k in ("self", "cross")] if "connector/self" in probs else (None, None)
    )
    joint = through_connector(name, *between, True)
    for i, query in enumerate(seq.queries):
        check(name, nth(full(rolled), i), of_llm[query], joint, np.eye(len(tower)), scaled=True)
        check(name, nth(full(carried), i), of_llm[query], joint, tower, scaled=True)
    if name == "bloom_qformer":
        # Of what is on the image, two layers that cross leave a quarter on the queries. The class token has more.
        on_image = of_llm[seq.queries, : _QFORMER["queries"]].sum(-1)
        assert (rolled.constants > on_image / 4).all() and (carried.constants > on_image / 4).all()
        # Raw attention goes by the last cross-attention alone.
        joint = np.pad(between[1][-1], ((0, 0), (_QFORMER["queries"], 0)))
    for layer, head, i in np.ndindex(*found.raw.values.shape[:3]):
        row = probs["llm"][layer, head, seq.queries[i]]
        got = nth(full(nth(found.raw, (layer, head))), i)
        check(name, got, row, joint, np.eye(len(tower)), scaled=True)


@pytest.mark.parametrize("name", MOST)
def test_relevancy(name):
    model, params, seq = setting(name)
    got = relevancy.relevancy(model, params, seq.batch, seq.queries, seq.tokens)
    for i, grads in enumerate(gradients(name)):
        weights = {k: np.maximum(g * whole(name)[k], 0).mean(1) for k, g in grads.items()}
        of_llm, tower = (product(weights[k], False) for k in ("llm", "img"))
        between = (weights.get("connector/self"), weights.get("connector/cross"))
        if between[0] is not None:
            assert between[0][0].max() > 0 and between[1].max() > 0
        joint = through_connector(name, *between, False)
        row = of_llm[seq.queries[i]]
        check(name, trace.Shares(got.rows[i]), row, joint, np.eye(len(tower)), scaled=False)
        carried = np.concatenate([got.patches[i], got.rows[i, seq.patches :]])
        check(name, trace.Shares(carried), row, joint, tower, scaled=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_its_rows(name):
    model, params, seq = setting(name)
    other = sequence.make(
        model, [8, *PROMPT], ANSWER, -seq.batch["image"][0], mask_ar=1, image_at=CASES[name][1], pad_to=T
    )
    both = {k: np.concatenate([seq.batch[k], other.batch[k]]) for k in trace.INPUTS if k in seq.batch}
    if "image_at" in both:
        both["image_at"][1] += 1
        other.batch["image_at"][:] += 1
    together = capture.attention(model, params, both)
    for i, one in enumerate((seq, other)):
        alone = capture.attention(model, params, one.batch)
        for a, b in zip(together, alone):
            np.testing.assert_allclose(a.take([i], axis=int(a.ndim > 2)), b, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_report(name):
    """All methods; grids that aren't square, but for poolings; what is on constants is told."""
    model, params, seq = setting(name)
    kw = dict(mask_ar=1, image_at=CASES[name][1])
    got, _ = report.measure(model, params, seq.batch["image"][0], PROMPT, ANSWER, **kw)
    assert got.grid == tuple(n // 8 for n in CASES[name][2])
    assert {m.method for m in got.maps} | {"raw"} == set(KINDS)
    columns = seq.response.stop
    assert got.raw.shape[-1] == columns and np.isfinite(got.raw).all()
    np.testing.assert_allclose(got.mass.sum(-1), 1, rtol=1e-5)
    # Queries, and a class token that is read, hold shares from the start; another one does within the tower.
    assert (got.raw_constants is None) == (name != "bloom_qformer")
    without = dict(rollout=name != "bloom_qformer", rollout_siglip=name == "medgemma_4b")
    for m in got.maps:
        if m.method in without:
            assert (m.constants is None) == without[m.method]
    for m in got.maps:
        assert m.values.shape == (len(ANSWER), seq.patches if m.method == "occlusion" else columns)
        if KINDS[m.method].shares:
            np.testing.assert_allclose(m.values.sum(-1), 1, rtol=1e-5)
        else:
            assert m.constants is None


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_what_eval_saliency_measures(name):
    model, params, seq = setting(name)
    found = measure.maps_of(model, params, seq, occlusion.scorer(model, params, seq))
    assert set(found) == set(measure.METHODS)
    for values in found.values():
        assert values.shape == (len(ANSWER), *seq.grid) and np.isfinite(values).all() and np.ptp(values) > 0


def test_weights_are_randomised_from_the_output_down():
    """The query transformer's layers, in pairs, lie between the language model and the tower; no leaf is forgotten."""
    model, params, _ = setting("bloom_qformer")
    stages = sanity.stages(params, model.leaves)
    assert list(dict.fromkeys(stage.split("/")[0] for stage in stages)) == ["llm", "connector", "img"]
    between = [stage for stage in stages if stage.startswith("connector")]
    assert between == ["connector/proj", "connector/layers/1", "connector/layers/0", "connector/embeddings"]
    *_, (_, noise) = sanity.cascade(params, leaves=model.leaves)
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), params, noise)
    assert not any(jax.tree.leaves(same))


def test_shares_keep_their_sum_whatever_the_image_has():
    """Rows of nothing on the image, of all of it on constants, and of both."""
    example = trace.of(model_of("bloom_qformer"), {"image": np.zeros((1, 16, 24, 3)), "text": np.zeros((1, 4))})
    q, p = _QFORMER["queries"], 7
    rng = np.random.default_rng(0)
    own = rng.dirichlet(np.ones(q), (4, 1, 3, q))
    for cross in (rng.dirichlet(np.ones(p), (2, 1, 3, q)), np.tile(np.eye(p)[0], (2, 1, 3, q, 1))):
        rows = np.stack([rng.dirichlet(np.ones(q + 4)), np.repeat([0, 0.25], [q, 4])]).astype(np.float32)
        out = {"connector/self": jnp.asarray(own), "connector/cross": jnp.asarray(cross)}
        for rule in ("raw", "rollout"):
            got = example.map(rows, out, rule=rule)
            assert np.isfinite(got.values).all() and (np.asarray(got.constants) >= 0).all()
            np.testing.assert_allclose(got.values[:, 6:], rows[:, q:])
            assert got.constants[1] == 0
            if cross[0, 0, 0, 0, 0] == 1:  # all is on the class token, or on queries
                np.testing.assert_allclose(got.constants, rows[:, :q].sum(-1), rtol=1e-6)
                assert (got.values[:, :6] == 0).all()
            else:
                np.testing.assert_allclose(got.values.sum(-1), 1, rtol=1e-6)
