"""What streamed capture of attention adds to the memory of a forward pass, as compiled.

    python -m tools.bench saliency_memory --res=448
    python -m tools.bench saliency_memory --preset=medgemma_4b --res=896

Compiles three passes over one sequence and reads XLA's `memory_analysis`; nothing is allocated, so a
laptop can ask about the 3B model. What a pass adds is its temporary and output bytes minus those of the
same pass without capture. On a CPU, bfloat16 products use float32 copies on both sides; these can hide
what capture adds, so float32 is compiled as well. Relevancy's figure is everything that its passes hold,
forward and backward, in float32.
"""

import functools

import jax
import jax.numpy as jnp

from paligemma_med.models import lean, presets, vlm
from paligemma_med.models.loss import token_logprobs
from paligemma_med.saliency import capture, passes, relevancy, trace


def run(res, text_len, tokens, img, llm, preset=None, dtypes=("bfloat16", "float32"), gradients=True) -> dict:
    """Figures in MiB.

    Args:
      res: pixels.
      text_len: T, prompt and answer.
      tokens: R, tokens of the answer.
      img, llm: variants of the tower and of the language model. preset: in place of both, one of `presets.PRESETS`.
      dtypes: types of weights and activations.
      gradients: also compile relevancy.
    """
    out = {dtype: added(res, text_len, tokens, img, llm, dtype, preset) for dtype in dtypes}
    model, params, batch, _ = _abstract(res, text_len, tokens, img, llm, "float32", preset)
    *probs, _ = jax.eval_shape(functools.partial(capture.whole, model), params, batch)
    out["all probabilities"] = sum(4 * x.size for x in probs) / 2**20
    if gradients:
        out["relevancy"] = _mib(relevancy.lower(model, params, batch, tokens))
    return out


def added(*shapes, **kw) -> dict:
    """dict(without, streamed, added, added_by_page) in MiB, the last for a report's pass with its four
    rollouts; shapes as for `_abstract`, kw as for `stream`."""
    model, params, batch, queries = _abstract(*shapes)
    without = _mib(_plain.lower(model, params, batch, queries))
    streamed = _mib(capture.stream.lower(model, params, batch, queries, **kw))
    page = _mib(passes.lower(model, params, batch, queries))
    return dict(without=without, streamed=streamed, added=streamed - without, added_by_page=page - without)


def _abstract(res, text_len, tokens, img, llm, dtype, preset=None):
    """(model, params, batch, queries) without values. The image of a causal model is somewhere in the text."""
    if preset is not None and preset not in presets.PRESETS:
        raise ValueError(f"preset is {preset!r}; expected one of {sorted(presets.PRESETS)}.")
    parts = presets.PRESETS[preset] if preset else dict(img=dict(variant=img), llm=dict(variant=llm))
    model = vlm.Model(**parts, dtype=dtype)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        vlm.abstract_params(model, image_size=res),
    )
    text = jax.ShapeDtypeStruct((1, text_len), jnp.int32)
    image = jax.ShapeDtypeStruct((1, res, res, 3), jnp.float32)
    queries = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    batch = dict(image=image, text=text, mask_ar=text)
    if model.image_ar != "prefix":
        batch["image_at"] = jax.ShapeDtypeStruct((1,), jnp.int32)
    return model, params, batch, queries


@functools.partial(lean.jit, static_argnums=0)
def _plain(model, params, batch, queries):
    """The same log-probabilities without capture."""
    tokens = trace.of(model, batch).predicted(queries)
    logits, _ = model.apply({"params": params}, **batch, logit_positions=(tokens - 1)[None])
    return token_logprobs(logits, batch["text"][:, tokens])


def _mib(lowered):
    found = lowered.compile().memory_analysis()
    return (found.temp_size_in_bytes + found.output_size_in_bytes) / 2**20
