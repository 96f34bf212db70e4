"""The composite: parity with Hugging Face, masks by perturbation, precision, cache, and its errors."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from paligemma_med.models import vlm
from paligemma_med.models.layers import attention
from tests.models import hf
from tests.rounding import UNIT, assert_close

TOLERANCE = 1e-5


# Models are hashable: as static arguments they let tests share compilations, which cost the most.
@functools.partial(jax.jit, static_argnums=0, static_argnames=("train", "capture_attention"))
def apply(model, params, image, text, mask_ar, **kw):
    return model.apply({"params": params}, image, text, mask_ar, **kw)


def run(model, params, batch, **kw):
    """(logits, out) of a batch as numpy arrays."""
    return jax.device_get(apply(model, params, batch["image"], batch["text"], batch["mask_ar"], **kw))


@functools.partial(jax.jit, static_argnums=0)
def embed(model, params, image, text, **kw):
    return model.apply({"params": params}, image, text, **kw, method="embed_image_and_text")


@functools.cache
def outputs(name):
    """(logits, out) of a reference case with its attention captured."""
    _, _, ours, params, batch = hf.reference(name)
    return run(ours, params, batch, capture_attention=True)


def variant_of(name, img=None, llm=None, **kw):
    """The model of a reference case with some arguments changed."""
    case = hf.CASES[name]
    return vlm.Model(
        img=dict(variant=None, **case["img"], **(img or {})),
        llm=dict(variant=None, **case["llm"], **(llm or {})),
        **kw,
    )


# ---- Parity with Hugging Face


@pytest.mark.parametrize("name", hf.CASES)
def test_logits_and_attention_equal_hugging_face(name):
    case, theirs, _, _, batch = hf.reference(name)
    with torch.no_grad():
        want = theirs(**hf.torch_inputs(case, batch), output_attentions=True)
    logits, out = outputs(name)
    length, valid = logits.shape[1], batch["valid"]
    reference = want.logits[:, -length:].numpy()[valid]
    assert 0.5 < reference.std() < 2  # so that the absolute bound is a relative one too
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits[valid], reference, rtol=0, atol=TOLERANCE)

    seen = np.pad(valid, ((0, 0), (out["llm/attn"].shape[-1] - length, 0)), constant_values=True)
    for ours, theirs_ in zip(out["llm/attn"], want.attentions, strict=True):
        ours, theirs_ = (np.moveaxis(x, 1, 2)[seen] for x in (ours, theirs_.numpy()))
        np.testing.assert_allclose(ours, theirs_, rtol=0, atol=TOLERANCE)
    assert out["img/attn"].shape[:3] == (case["img"]["depth"], len(valid), case["img"]["num_heads"])


def test_long_sequences_equal_hugging_face():
    """As long as at 448 px. An angle of 1,000 rad is known to 6e-5 in float32: Hugging Face's own
    logits move by 2.5e-5 when its positions count from 0, and lie 3e-5 from float64, ours 2.4e-5.
    """
    case, theirs, ours, params, _ = hf.reference("gemma2")
    case = {**case, "prefix": (600, 1000), "suffix": (500, 90)}
    batch = hf.batch_of(case)
    with torch.no_grad():
        want = theirs(**hf.torch_inputs(case, batch)).logits[:, -batch["text"].shape[1] :].numpy()
    logits, _ = run(ours, params, batch)
    np.testing.assert_allclose(logits[batch["valid"]], want[batch["valid"]], rtol=0, atol=6e-5)


@functools.cache
def hugging_face_gradients(name):
    """(loss, gradients as our tree, answer bool[B, T]) of the mean over all answer tokens."""
    case, theirs, _, _, batch = hf.reference(name)
    inputs = hf.torch_inputs(case, batch)
    answer = batch["valid"] & (batch["mask_ar"] == 1)
    labels = np.full(inputs["input_ids"].shape, -100)
    labels[:, -answer.shape[1] :] = np.where(answer, batch["text"], -100)
    theirs.zero_grad()
    loss = theirs(**inputs, labels=torch.tensor(labels)).loss
    loss.backward()
    grads = hf.to_tree({k: p.grad.clone() for k, p in theirs.named_parameters()}, case)
    theirs.zero_grad()
    return loss.item(), grads, answer


@pytest.mark.parametrize(
    "name,img_remat,llm_remat",
    [
        ("gqa", "none", "nothing_saveable"),
        ("gemma2_emb_per_head", "dots_with_no_batch_dims_saveable", "none"),
    ],
)
def test_gradients_of_every_leaf_equal_hugging_face(name, img_remat, llm_remat):
    """And so remat policies agree with each other."""
    _, _, _, params, batch = hf.reference(name)
    want_loss, want, answer = hugging_face_gradients(name)
    model = variant_of(name, dict(remat_policy=img_remat), dict(remat_policy=llm_remat))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        logits, _ = model.apply({"params": params}, batch["image"], batch["text"][:, :-1], batch["mask_ar"][:, :-1])
        logp = jax.nn.log_softmax(logits)
        logp = jnp.take_along_axis(logp, batch["text"][:, 1:, None], axis=-1)[..., 0]
        return -jnp.sum(logp * answer[:, 1:]) / np.sum(answer)

    got_loss, got = loss(params)
    assert abs(got_loss - want_loss) < TOLERANCE
    assert np.abs(want["img"]["head"]["kernel"]).max() > 0.01
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE), got, want)


def test_text_is_scaled_and_image_is_not():
    case, theirs, ours, params, batch = hf.reference("gqa")
    with torch.no_grad():
        image = theirs.get_image_features(hf.torch_inputs(case, batch)["pixel_values"])
    (x, input_mask, mask_ar), out = embed(ours, params, batch["image"], batch["text"])
    patches = image.pooler_output.shape[1]
    np.testing.assert_allclose(x[:, :patches], image.pooler_output.numpy(), atol=TOLERANCE)
    table = params["llm"]["embedder"]["input_embedding"]
    width = case["llm"]["width"]
    np.testing.assert_allclose(x[:, patches:], table[batch["text"]] * width**0.5, rtol=1e-6)
    assert input_mask.all() and input_mask.shape == mask_ar.shape == x.shape[:2]
    np.testing.assert_array_equal(mask_ar[0], np.arange(x.shape[1]) >= patches)
    np.testing.assert_array_equal(out["img/zimg"], x[:, :patches])


# ---- The tree


def test_the_head_takes_the_language_models_width():
    model = vlm.Model(img=dict(variant="mu/14"), llm=dict(variant="gemma2_2b"))
    tree = vlm.abstract_params(model, image_size=28)
    assert tree["img"]["head"]["kernel"].shape == (32, 2304)
    assert tree["llm"]["layers"]["post_ffw_norm"]["scale"].shape == (26, 2304)


@pytest.mark.parametrize("dtype,scan", [("float32", False), ("bfloat16", True)])
def test_scan_and_dtype_do_not_change_the_tree(dtype, scan):
    changed = variant_of("gqa", dict(scan=scan), dict(scan=scan), dtype=dtype)
    got, want = (vlm.abstract_params(m, image_size=30) for m in (changed, variant_of("gqa")))
    assert got == want


# ---- Who sees whom


@functools.cache
def perturbed(name):
    """Changes at every position [source, reader] of the whole sequence, when one source changes, in
    units of rounding.

    Sources and readers are image patches, then text: prompt, answer, one pad.
    """
    case, _, ours, params, _ = hf.reference(name)
    rng = np.random.default_rng(1)
    side, patch = case["image"], case["img"]["patch_size"]
    grid, prompt, length = side // patch, 3, 7
    rows = 1 + grid**2 + length
    image = np.repeat(rng.uniform(-1, 1, (1, side, side, 3)).astype(np.float32), rows, axis=0)
    text = np.repeat(rng.integers(1, case["llm"]["vocab_size"], (1, length)), rows, axis=0)
    for i in range(grid**2):
        r, c = divmod(i, grid)
        image[1 + i, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch] *= -1
    for i in range(length):
        text[1 + grid**2 + i, i] = 1 + text[0, i] % (case["llm"]["vocab_size"] - 1)
    mask_ar = np.repeat((np.arange(length) >= prompt).astype(np.int32)[None], rows, axis=0)
    batch = dict(image=image, text=text.astype(np.int32), mask_ar=mask_ar)
    _, out = run(ours, params, batch)
    y = out["llm/pre_logits"]
    return grid**2, prompt, np.abs(y[1:] - y[:1]).max(axis=-1) / (UNIT * np.abs(y).max())


@pytest.mark.parametrize("name", ["mqa", "gemma2"])
def test_prefix_lm_by_perturbation(name):
    patches, prompt, change = perturbed(name)
    prefix = patches + prompt
    source, reader = np.indices(change.shape)
    must_change = (source < prefix) | (reader >= source)
    assert change[must_change].min() > 64
    assert change[~must_change].max() < 16
    assert (~must_change).any()


def test_padding_at_the_end_changes_nothing_before():
    _, _, ours, params, batch = hf.reference("gqa")
    longer = dict(
        image=batch["image"],
        text=np.pad(batch["text"], ((0, 0), (0, 4))),
        mask_ar=np.pad(batch["mask_ar"], ((0, 0), (0, 4)), constant_values=1),
    )
    got, _ = run(ours, params, longer)
    want, _ = outputs("gqa")
    assert_close(got[:, : want.shape[1]], want)


# ---- Precision, scan and remat


def test_scan_and_unrolled_agree():
    _, _, _, params, batch = hf.reference("mqa")
    unrolled = variant_of("mqa", dict(scan=False), dict(scan=False))
    got, out = run(unrolled, params, batch, capture_attention=True)
    want, want_out = outputs("mqa")
    assert_close(got, want)
    assert_close(out["llm/attn"], want_out["llm/attn"])


def bf16_bound(case):
    """What logits in bfloat16 may miss, as root mean square over their standard deviation.

    Rounding moves a number by up to half a step, 2^-8 of it, so by 2^-8 / sqrt(3) in root mean
    square, and roundings are independent: they add as squares. Counted are 8 for each of the 2
    sublayers of each layer of both towers, and as many for what lies around them. (Measured: 0.007
    and 0.010 where this says 0.022.)
    """
    sublayers = 2 * (case["img"]["depth"] + case["llm"]["depth"]) + 2
    return 2.0**-8 * math.sqrt(8 * sublayers / 3)


@pytest.mark.parametrize("name,stored", [("gqa", "float32"), ("gemma2", "bfloat16")])
def test_bfloat16_stays_near_float32(name, stored):
    case, _, _, params, batch = hf.reference(name)
    params = jax.tree.map(lambda x: jnp.asarray(x, stored), params)
    got, out = run(variant_of(name, dtype="bfloat16"), params, batch)
    want, _ = outputs(name)
    for key in ("img/zimg", "llm/ztxt", "llm/pre_logits", "img/encoded"):
        assert out[key].dtype == jnp.bfloat16, key
    assert got.dtype == np.float32
    error = np.sqrt(np.mean((got - want)[batch["valid"]] ** 2)) / want[batch["valid"]].std()
    assert 1e-4 < error < bf16_bound(case)


@pytest.mark.parametrize("img,llm", [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_each_tower_keeps_its_own_dtype(img, llm):
    _, _, _, params, batch = hf.reference("mha")
    _, out = run(variant_of("mha", dict(dtype=img), dict(dtype=llm)), params, batch)
    assert (out["img/encoded"].dtype, out["llm/pre_logits"].dtype) == (img, llm)


# ---- Arguments


def test_logit_positions_gather():
    _, _, ours, params, batch = hf.reference("gqa")
    at = np.array([[3, 0, 7], [8, 8, 1]])
    got, _ = run(ours, params, batch, logit_positions=at)
    want = np.take_along_axis(outputs("gqa")[0], at[..., None], axis=1)
    assert_close(got, want)


@pytest.mark.parametrize("tower", ["img", "llm"])
def test_dropout_acts_in_training_only_and_by_seed(tower):
    _, _, _, params, batch = hf.reference("gqa")
    model = variant_of("gqa", **{tower: dict(dropout=0.3)})
    args = [batch[k] for k in ("image", "text", "mask_ar")]
    want = outputs("gqa")[0]
    assert_close(run(model, params, batch)[0], want)
    train = jax.jit(lambda key: model.apply({"params": params}, *args, train=True, rngs={"dropout": key})[0])
    one, same, other = (train(jax.random.key(i)) for i in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0.1 and np.abs(one - want).max() > 0.1
    without, _ = run(variant_of("gqa"), params, batch, train=True)
    assert_close(without, want)


def test_model_is_hashable_and_a_static_argument():
    def make(**kw):
        return vlm.Model(img={"variant": "mu/8", "patch_size": [8, 8]}, llm={"variant": "gemma_mu", **kw})

    assert make() == make() and hash(make()) == hash(make())
    assert make() != make(depth=3)
    traces = []

    @functools.partial(jax.jit, static_argnums=0)
    def width(model, x):
        traces.append(model)
        return x + model.llm.get("depth", 0)

    assert [int(width(m, 1)) for m in (make(), make(), make(depth=3))] == [1, 1, 4]
    assert len(traces) == 2


@pytest.mark.parametrize(
    "img,llm,message",
    [
        (dict(variant="So401m/14"), {}, "Image variant 'So401m/14' is unknown"),
        ({}, dict(variant="gemma3"), "LLM variant 'gemma3' is unknown"),
        (dict(patch_size=9), {}, "don't tile"),
        (dict(pool_type="gap"), {}, "pool_type is 'gap'"),
        ({}, dict(num_heads=6, num_kv_heads=4), "num_heads=6 is no multiple of num_kv_heads=4"),
    ],
)
def test_bad_arguments(img, llm, message):
    model = vlm.Model(img={"variant": "mu/8", **img}, llm={"variant": "gemma_mu", "vocab_size": 50, **llm})
    with pytest.raises(ValueError, match=message):
        vlm.abstract_params(model, image_size=16)


def test_capture_is_refused_under_a_fused_kernel():
    _, _, _, params, batch = hf.reference("mha")
    model = variant_of("mha", attn_impl="cudnn")
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        run(model, params, batch, capture_attention=True)


def test_a_fused_kernel_sees_the_same(monkeypatch):
    """The whole model with the split mask, and in cuDNN's place what any device computes."""
    monkeypatch.setattr(attention, "_FUSED", "xla")
    _, _, _, params, batch = hf.reference("mha")
    want, _ = outputs("mha")
    got, _ = run(variant_of("mha", attn_impl="cudnn"), params, batch)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


# ---- Cache

# Prompts of a ragged batch, as the eval pp makes them: pads at the end, marked by mask_input.
PROMPTS = (5, 1, 3)
STEPS = 4


def prompts_of(case, length=6):
    rng = np.random.default_rng(2)
    vocab, side = case["llm"]["vocab_size"], case["image"]
    mask_input = np.arange(length)[None] < np.array(PROMPTS)[:, None]
    text = np.where(mask_input, rng.integers(1, vocab, mask_input.shape), 0)
    image = rng.uniform(-1, 1, (len(PROMPTS), side, side, 3))
    return image.astype(np.float32), text.astype(np.int32), mask_input


@functools.partial(jax.jit, static_argnums=0, static_argnames=("cache_size", "num_samples"))
def prefill(model, params, x, input_mask, mask_ar, **kw):
    return model.apply({"params": params}, x, input_mask, mask_ar, **kw, method="prefill_cache", mutable=["cache"])


@functools.partial(jax.jit, static_argnums=0)
def step(model, params, cache, tokens):
    x, _ = model.apply({"params": params}, tokens, method="embed_text")
    return model.apply({"params": params, **cache}, x, method="extend_cache", mutable=["cache"])


def decode(model, params, image, text, mask_input, continuation, mask_ar=None):
    """Logits [B·R, STEPS + 1, V] of prefill and then of each given token, and the cache.

    continuation is int32[B, R, STEPS].
    """
    batch, samples, steps = continuation.shape
    mask_ar = np.zeros_like(text) if mask_ar is None else mask_ar
    prompt, _ = embed(model, params, image, text, input_mask=mask_input, mask_ar=mask_ar)
    size = prompt[0].shape[1] + steps
    first, cache = prefill(model, params, *prompt, cache_size=size, num_samples=samples)
    logits = [np.repeat(first, samples, axis=0)]
    for t in range(steps):
        tokens = continuation.reshape(batch * samples, steps)[:, t : t + 1]
        out, cache = step(model, params, cache, tokens)
        logits.append(out)
    return np.concatenate(logits, axis=1), jax.device_get(cache["cache"])


@functools.cache
def given_tokens(name, samples):
    """(ragged prompts, continuation int32[B, R, STEPS], logits after each from one full pass)."""
    case, _, model, params, _ = hf.reference(name)
    image, text, mask_input = prompts_of(case)
    shape = (len(PROMPTS), samples, STEPS)
    rng = np.random.default_rng(3)
    continuation = rng.integers(1, case["llm"]["vocab_size"], shape).astype(np.int32)
    # Rows packed tightly: image, prompt, continuation, pads.
    rows = np.zeros((*shape[:2], text.shape[1] + STEPS), np.int32)
    mask_ar = np.ones_like(rows)
    for i, n in enumerate(PROMPTS):
        rows[i, :, :n], rows[i, :, n : n + STEPS] = text[i, :n], continuation[i]
        mask_ar[i, :, :n] = 0
    flat_rows = (x.reshape(-1, rows.shape[-1]) for x in (rows, mask_ar))
    batch = dict(zip(("image", "text", "mask_ar"), (np.repeat(image, samples, 0), *flat_rows)))
    logits, _ = run(model, params, batch)
    at = np.repeat(np.array(PROMPTS), samples)[:, None] - 1 + np.arange(STEPS + 1)
    want = np.take_along_axis(logits, at[..., None], axis=1)
    return (image, text, mask_input), continuation, want


@pytest.mark.parametrize("name,samples", [("mqa", 1), ("mha", 3), ("gemma2", 3)])
def test_steps_with_the_cache_equal_full_passes(name, samples):
    _, _, model, params, _ = hf.reference(name)
    prompts, continuation, want = given_tokens(name, samples)
    got, cache = decode(model, params, *prompts, continuation)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=TOLERANCE)
    # One prefix for all samples of a prompt, and the batch in front for sharding.
    case = hf.CASES[name]
    llm, side = case["llm"], case["image"] // case["img"]["patch_size"]
    batch, length = len(PROMPTS), side**2 + prompts[1].shape[1]
    attn = cache["llm"]["layers"]["attn"]
    head = (llm["num_kv_heads"], llm["head_dim"])
    for x in "kv":
        assert attn[f"{x}_prefix"].shape == (batch, llm["depth"], length, *head)
        assert attn[f"{x}_new"].shape == (batch * samples, llm["depth"], STEPS, *head)


def test_bfloat16_steps_stay_near_float32():
    _, _, _, params, _ = hf.reference("gemma2")
    prompts, continuation, want = given_tokens("gemma2", 3)
    model = variant_of("gemma2", dtype="bfloat16")
    got, cache = decode(model, params, *prompts, continuation)
    attn = cache["llm"]["layers"]["attn"]
    assert {x.dtype for x in jax.tree.leaves(attn)} == {jnp.dtype(jnp.bfloat16)}
    error = np.sqrt(np.mean((got - want) ** 2)) / want.std()
    assert 1e-4 < error < bf16_bound(hf.CASES["gemma2"])


def test_what_is_under_padding_and_how_much_of_it_does_not_matter():
    case, _, ours, params, _ = hf.reference("mqa")
    image, text, mask_input = prompts_of(case)
    nothing = np.zeros((len(PROMPTS), 1, 0), np.int32)
    want, _ = decode(ours, params, image, text, mask_input, nothing)
    other = np.where(mask_input, text, 7), mask_input, nothing, np.where(mask_input, 0, 1)
    assert_close(decode(ours, params, image, *other)[0], want)
    pad = ((0, 0), (0, 5))
    longer = np.pad(text, pad), np.pad(mask_input, pad), nothing
    assert_close(decode(ours, params, image, *longer)[0], want)


def test_too_small_a_cache():
    case, _, ours, params, _ = hf.reference("mha")
    x = np.zeros((1, 4, case["llm"]["width"]), np.float32)
    with pytest.raises(ValueError, match="cache_size is 3, less than the prompt's 4"):
        ours.apply(
            {"params": params},
            x,
            np.ones((1, 4), bool),
            np.zeros((1, 4), np.int32),
            cache_size=3,
            method="prefill_cache",
            mutable=["cache"],
        )
