"""The library under JAX_ENABLE_X64=1, which other code in a user's process may have set.

JAX then takes every type that isn't said for 64 bits. Nothing of ours shall: float64 would double
the memory and the time of what it reaches, and a loop whose state changes its type is refused. What
is looked at is the lowered program, which takes no compiling. (Of dropout Flax draws the noise, in
64 bits then: other noise, at other speed, and the same model.) That results stay the same is what
`JAX_ENABLE_X64=1 pytest tests/models tests/decode tests/checkpoints` is for.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.checkpoints import fingerprint
from paligemma_med.models import paligemma
from paligemma_med.saliency import capture, occlusion, relevancy, sequence
from paligemma_med.setup import TrainingSetup
from paligemma_med.training import dry_run
from tests import tiny

MODEL = paligemma.Model(
    img=dict(width=16, depth=2, mlp_dim=24, num_heads=2, patch_size=(4, 4)),
    llm=dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=31),
)
PROMPT = dict(
    image=np.zeros((2, 8, 8, 3), np.float32),
    text=np.array([[3, 4, 5], [6, 0, 0]], np.int32),
    mask_ar=np.array([[0, 0, 0], [0, 1, 1]], np.int32),
    mask_input=np.array([[1, 1, 1], [1, 0, 0]], np.int32),
)
OPTIONS = np.ones((2, 3, 2), np.int32)
LORA = dict(
    lora=[("llm/layers/.*|img/head/kernel", dict(rank=2))],
    schedule=[(".*/lora_[ab]", dict(decay_type="cosine", warmup_steps=2)), (".*", None)],
)


@pytest.fixture(autouse=True)
def x64():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = paligemma.abstract_params(MODEL, image_size=8)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def lowered(function, *args):
    """The program of a function whose other arguments stand in a closure, as text."""
    return jax.jit(function).lower(*args).as_text()


def wide_floats(program):
    """Types of arrays of float64 in a lowered program; single numbers, as 1e-6, are no matter."""
    return set(re.findall(r"tensor<\w*x[^>]*f64>", program))


def test_parameters_start_in_float32():
    model = MODEL.clone(lora=LORA["lora"])
    assert {x.dtype for x in jax.tree.leaves(paligemma.abstract_params(model, image_size=8))} == {np.dtype("float32")}


def test_the_search_finds_what_it_searches():
    assert wide_floats(lowered(lambda x: x + jnp.zeros(3), np.zeros(3, np.float32))) == {"tensor<3xf64>"}


@pytest.mark.parametrize(
    "kw",
    [
        dict(num_samples=2, temperature=0.5, top_k=3, top_p=0.9),
        dict(model=MODEL.clone(dtype="bfloat16")),
    ],
)
def test_generate(params, kw):
    kw = dict(model=MODEL, params=params, batch=PROMPT, max_new_tokens=3) | kw
    shapes = jax.eval_shape(lambda: decode.generate(**kw))
    assert [str(x.dtype) for x in shapes] == ["int32", "float32"]
    assert not wide_floats(lowered(lambda: decode.generate(**kw)))


def test_beam_search(params):
    def search():
        return decode.beam_search(MODEL, params, PROMPT, beams=2, max_new_tokens=3, early_stopping="never")

    assert [str(x.dtype) for x in jax.eval_shape(search)] == ["int32", "float32"]
    assert not wide_floats(lowered(search))


def test_options(params):
    def score():
        return decode.score_options(MODEL, params, PROMPT, OPTIONS, OPTIONS > 0)[0]

    assert jax.eval_shape(score).dtype == "float32"
    assert not wide_floats(lowered(score))


@pytest.mark.parametrize(
    "kw",
    [
        dict(optax_name="scale_by_factored_rms", label_smoothing=0.1, loss_norm="token", wd=0.1),
        dict(LORA, frozen_dtype="int8", grad_accum_steps=2, supervised_len=8),
        dict(LORA, frozen_dtype="nf4", loss_chunk=64, dtype="bfloat16", grad_clip_norm=1.0),
    ],
)
def test_train_step(kw):
    """And nothing that it hands to the next step has changed its type, or that one would be compiled anew."""
    step = dry_run.trace_step(TrainingSetup.without_data(tiny.config("/no/such/folder", **kw)))
    assert not wide_floats(step.traced.lower().as_text())
    trained, opt_state, metrics = step.traced.out_info
    assert jax.tree.map(lambda x: x.dtype, (trained, opt_state)) == jax.tree.map(
        lambda x: x.dtype, (step.state.trained, step.state.opt_state)
    )
    assert {str(x.dtype) for x in metrics.values()} == {"float32", "int32", "bool"}


def test_saliency(params):
    seq = sequence.make(MODEL, [3, 4, 5], [6, 7], PROMPT["image"][0])
    batch = {k: seq.batch[k] for k in ("image", "text", "mask_ar")}
    assert not wide_floats(relevancy.lower(MODEL, params, batch, len(seq.tokens)).as_text())
    assert not wide_floats(capture.whole.lower(MODEL, params, batch).as_text())
    assert not wide_floats(capture.stream.lower(MODEL, params, batch, np.asarray(seq.queries, np.int32)).as_text())
    score = occlusion.scorer(MODEL, params, seq)
    assert score(np.zeros((3, 8, 8, 3))).dtype == np.float32


def test_fingerprints_are_the_same(params):
    with jax.enable_x64(False):
        want = fingerprint.of_leaves(params)
    assert fingerprint.of_leaves(params) == want
    wide = np.arange(6.0).reshape(2, 3)
    assert len(set(fingerprint.of_leaves([wide, wide[::-1], wide + 1e-12]))) == 3
