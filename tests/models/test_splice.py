"""Where image and text stand in a sequence, who sees whom, and that all of the model keeps to it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.models import splice, vlm
from paligemma_med.models.layers import attention

VOCAB, SIDE, Q, T = 61, 16, 4, 7
IMAGE_AT = np.array([0, 3, 2], np.int32)
PROMPT = np.array([3, 4, 2])  # the image stands in front, within, and at the end of the prompt
LENGTH = np.array([7, 6, 5])  # prompt and answer; padding after them


# ---- By themselves


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_make_attn_mask_equals_its_definition(data):
    length = data.draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = np.array([data.draw(row), data.draw(row)], bool)
    ar = np.array([data.draw(row), data.draw(row)], np.int32)
    want = np.zeros((2, length, length), bool)
    for b in range(2):
        for query in range(length):
            for key in range(length):
                # A key is hidden if a new block opens after the query, up to the key.
                opens = any(ar[b, i] for i in range(query + 1, key + 1))
                want[b, query, key] = valid[b, query] and valid[b, key] and not opens
    np.testing.assert_array_equal(splice.make_attn_mask(valid, ar), want)


def slots_of(at, num_image, num_text):
    """What stands in each slot of a row, one after the other: ("image", i) or ("text", t)."""
    image, text = ([(kind, i) for i in range(n)] for kind, n in (("image", num_image), ("text", num_text)))
    return text[:at] + image + text[at:]


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
@pytest.mark.parametrize("image_at", [None, [0, 2, 5], [5, 5, 1]])
def test_a_layout_equals_lists_that_are_put_together(image_at, image_ar):
    num_image, num_text, rows = 3, 5, 3
    at = None if image_at is None else jnp.array(image_at)
    layout = splice.Layout(num_image, num_text, at, image_ar)
    assert layout.length == 8
    zimg, ztxt = np.arange(rows * 3.0).reshape(3, 3, 1), 100 + np.arange(rows * 5.0).reshape(3, 5, 1)
    x, same = splice.splice(jnp.array(zimg), jnp.array(ztxt), image_at=at, image_ar=image_ar)
    assert (same.num_image, same.num_text) == (num_image, num_text)
    valid = np.arange(5) < np.array([5, 3, 4])[:, None]
    text_ar = np.array([[0, 1, 1, 0, 1]] * rows)
    got_valid, got_ar = layout.masks(jnp.array(valid), jnp.array(text_ar))
    of_image = {"prefix": [0, 0, 0], "block": [1, 0, 0], "causal": [1, 1, 1]}[image_ar]
    token = jnp.tile(jnp.arange(num_text), (rows, 1))
    slot = layout.slot(token)
    np.testing.assert_array_equal(layout.predicted(layout.query(token)), token)
    outputs, some = layout.outputs(x), layout.outputs(x, token[:, ::2])
    for b in range(rows):
        row = slots_of((image_at or [0] * rows)[b], num_image, num_text)
        want = {"image": zimg[b, :, 0], "text": ztxt[b, :, 0]}
        np.testing.assert_array_equal(x[b, :, 0], [want[kind][i] for kind, i in row])
        want = {"image": [True] * 3, "text": valid[b]}
        np.testing.assert_array_equal(got_valid[b], [want[kind][i] for kind, i in row])
        want = {"image": of_image, "text": text_ar[b]}
        np.testing.assert_array_equal(got_ar[b], [want[kind][i] for kind, i in row])
        np.testing.assert_array_equal(slot[b], [row.index(("text", t)) for t in range(num_text)])
        # A token is predicted one slot before its own, whatever stands there.
        before = [row[row.index(("text", t)) - 1] for t in range(1, num_text)] + [row[-1]]
        want = [dict(image=zimg[b], text=ztxt[b])[kind][i] for kind, i in before]
        np.testing.assert_array_equal(outputs[b], want)
        np.testing.assert_array_equal(some[b], want[::2])
        start = row.index(("image", 0))
        np.testing.assert_array_equal(layout.image_slots()[b if image_at else 0], start + np.arange(3))
        one = splice.Layout(num_image, num_text, None if at is None else at[b : b + 1], image_ar)
        np.testing.assert_array_equal(one.of_image(x[b, :, 0]), zimg[b, :, 0])


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
@pytest.mark.parametrize("image_at", [None, [1]])
def test_first_queries_see_the_same_keys(image_at, image_ar):
    """What a fused kernel is told in place of a mask."""
    layout = splice.Layout(3, 4, None if image_at is None else jnp.array(image_at), image_ar)
    mask = splice.make_attn_mask(*layout.masks(jnp.ones((1, 4), bool), jnp.array([[0, 0, 1, 1]])))[0]
    alike = (mask[: layout.first] == mask[0]).all()
    assert alike and layout.first in (0, 3)
    assert layout.first or not (mask[:3] == mask[0]).all() or image_at is not None


# ---- The whole model


@functools.cache
def setting(image_ar):
    """(model, params, batch) with random weights and rows of PROMPT, LENGTH and IMAGE_AT."""
    llm = dict(width=32, depth=2, mlp_dim=48, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=VOCAB)
    model = vlm.Model(img=dict(variant="mu/8"), llm=llm, image_ar=image_ar)
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_params(model, image_size=SIDE)
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(np.float32), shapes)
    place = np.arange(T)[None]
    prompt_ar = 0 if image_ar == "prefix" else 1
    batch = dict(
        image=rng.uniform(-1, 1, (3, SIDE, SIDE, 3)).astype(np.float32),
        text=np.where(place < LENGTH[:, None], rng.integers(1, VOCAB, (3, T)), 0).astype(np.int32),
        mask_ar=np.where(place < PROMPT[:, None], prompt_ar, 1).astype(np.int32),
        image_at=IMAGE_AT,
    )
    return model, params, batch


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, batch, **kw):
    return model.apply({"params": params}, **batch, **kw)


def expected_mask(image_ar, at, prompt):
    """bool[S, S]: who may see whom in a row, from the words of `splice` and not from mask_ar."""
    row = slots_of(at, Q, T)

    def sees(query, key):
        if key <= query:
            return True
        kinds = row[query][0], row[key][0]
        if image_ar == "causal":
            return False
        if image_ar == "block":
            return kinds == ("image", "image")
        return all(kind == "image" or i < prompt for kind, i in (row[query], row[key]))

    return np.array([[sees(q, k) for k in range(len(row))] for q in range(len(row))])


@functools.partial(jax.jit, static_argnums=0)
def embed(model, params, batch):
    """((x, input_mask, mask_ar), image tokens, text tokens)."""
    of_batch, _ = model.apply({"params": params}, **batch, method="embed_image_and_text")
    zimg, _ = model.apply({"params": params}, batch["image"], method="embed_image")
    return of_batch, zimg, model.apply({"params": params}, batch["text"], method="embed_text")[0]


@functools.partial(jax.jit, static_argnums=0)
def run_decoder(model, params, x, mask):
    """Logits float[B, S, V] of whole sequences."""

    def run(model, x, mask):
        return model.compute_logits(model._llm(x, mask)[0])

    return model.apply({"params": params}, x, mask, method=run)


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
def test_who_sees_whom_by_perturbation(image_ar):
    """Each input is changed by itself, and what moves in the output is noted."""
    model, params, batch = setting(image_ar)
    (x, *masks), _, _ = embed(model, params, batch)
    found = splice.make_attn_mask(*masks)
    for b in range(3):
        want = expected_mask(image_ar, IMAGE_AT[b], PROMPT[b])
        np.testing.assert_array_equal(found[b], want)
        # Two layers: what sees what sees the input.
        reached = want.astype(int) @ want > 0
        changed = x[b] + jnp.eye(Q + T + 1, Q + T)[..., None]  # the last one is as it was
        logits = run_decoder(model, params, changed, jnp.repeat(found[b][None], Q + T + 1, axis=0))
        moved = np.abs(logits[:-1] - logits[-1]).max(-1) > 1e-5
        np.testing.assert_array_equal(moved.T, reached)


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
def test_logits_and_their_positions_equal_a_slow_reference(image_ar):
    """Each row put together and masked by hand, and its logits read off by hand."""
    model, params, batch = setting(image_ar)
    _, zimg, ztxt = embed(model, params, batch)
    rows = [slots_of(at, Q, T) for at in IMAGE_AT]
    x = [[dict(image=zimg[b], text=ztxt[b])[kind][i] for kind, i in row] for b, row in enumerate(rows)]
    mask = np.stack([expected_mask(image_ar, *of_row) for of_row in zip(IMAGE_AT, PROMPT)])
    slow = run_decoder(model, params, np.array(x), mask)
    before = [[row.index(("text", t)) - 1 for t in range(1, T)] + [Q + T - 1] for row in rows]
    want = np.take_along_axis(slow, np.array(before)[..., None], axis=1)
    close = dict(rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_allclose(apply(model, params, batch)[0], want, **close)
    at = np.array([[6, 0], [2, 3], [1, 4]])
    some, _ = apply(model, params, batch, logit_positions=at)
    np.testing.assert_allclose(some, np.take_along_axis(want, at[..., None], axis=1), **close)


def test_an_image_in_front_is_today_s_sequence():
    model, params, batch = setting("prefix")
    front = {**batch, "image_at": np.zeros(3, np.int32)}
    without = {k: v for k, v in batch.items() if k != "image_at"}
    want, _ = apply(model, params, without)
    np.testing.assert_allclose(apply(model, params, front)[0], want, rtol=0, atol=1e-5 * np.abs(want).max())
    moved, _ = apply(model, params, batch)
    np.testing.assert_allclose(moved[0], want[0], rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(moved - want)[1:].max() > 1e-2


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
def test_a_fused_kernel_sees_the_same(image_ar, monkeypatch):
    """In cuDNN's place what any device computes: with the whole mask where the image is amid text."""
    monkeypatch.setattr(attention, "_FUSED", "xla")
    model, params, batch = setting(image_ar)
    for case in (batch, {k: v for k, v in batch.items() if k != "image_at"}):
        want, _ = apply(model, params, case)
        got, _ = jax.jit(model.clone(attn_impl="cudnn").apply)({"params": params}, **case)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("image_ar", splice.IMAGE_AR)
def test_steps_with_the_cache_equal_the_whole_pass(image_ar):
    """Prompts of unlike length, padded, their images at unlike places."""
    model, params, batch = setting(image_ar)
    logits, _ = apply(model, params, batch)
    size = PROMPT.max()
    valid = np.arange(size) < PROMPT[:, None]
    prompts = dict(image=batch["image"], text=batch["text"][:, :size], image_at=IMAGE_AT)

    @jax.jit
    def start(params):
        (x, *masks), _ = model.apply(
            {"params": params},
            **prompts,
            mask_ar=batch["mask_ar"][:, :size],
            input_mask=valid,
            method="embed_image_and_text",
        )
        kw = dict(cache_size=Q + T, method="prefill_cache", mutable=["cache"])
        return model.apply({"params": params}, x, *masks, **kw)

    @jax.jit
    def step(params, cache, tokens):
        ztxt, _ = model.apply({"params": params}, tokens[:, None], method="embed_text")
        return model.apply({"params": params, **cache}, ztxt, method="extend_cache", mutable=["cache"])

    got, cache = start(params)
    scale, rows = np.abs(logits).max(), np.arange(3)
    np.testing.assert_allclose(got[:, 0], logits[rows, PROMPT - 1], rtol=0, atol=1e-5 * scale)
    for i in range(3):
        got, cache = step(params, cache, batch["text"][rows, PROMPT + i])
        going = PROMPT + i < LENGTH
        np.testing.assert_allclose(got[going, 0], logits[rows, PROMPT + i][going], rtol=0, atol=1e-5 * scale)


def test_an_unknown_image_ar():
    with pytest.raises(ValueError, match=r"image_ar is 'both'; expected one of \('prefix', 'block', 'causal'\)"):
        vlm.Model(image_ar="both")
