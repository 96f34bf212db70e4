"""What streamed capture of attention adds to the memory of a forward pass, as compiled.

    python -m tools.bench saliency_memory --res=448

Compiles three passes over one sequence and reads XLA's `memory_analysis`; nothing is allocated, so
a laptop can ask about the 3B model. What a pass adds is its temporary and output bytes less those
of the same pass without capture. On a CPU, bfloat16 products are made of float32 copies, which both
sides hold; they can hide what capture adds, so float32 is compiled as well. Relevancy's figure is
all that its passes hold, forward and backward, in float32.
"""

import functools

import jax
import jax.numpy as jnp

from paligemma_med.models import vlm
from paligemma_med.models.loss import token_logprobs
from paligemma_med.saliency import capture, passes, relevancy, trace


def run(res, text_len, tokens, img, llm, dtypes=("bfloat16", "float32"), gradients=True):
    """Figures in MiB.

    Args:
      res: pixels.
      text_len: T, prompt and answer.
      tokens: R, of the answer.
      img, llm: variants of the tower and of the language model.
      dtypes: of weights and activations.
      gradients: compile relevancy, too.
    """
    out = {dtype: added(res, text_len, tokens, img, llm, dtype) for dtype in dtypes}
    model, params, batch, _ = _abstract(res, text_len, tokens, img, llm, "float32")
    *probs, _ = jax.eval_shape(functools.partial(capture.whole, model), params, batch)
    out["all probabilities"] = sum(4 * x.size for x in probs) / 2**20
    if gradients:
        out["relevancy"] = _mib(relevancy.lower(model, params, batch, tokens))
    return out


def added(*shapes, **kw):
    """dict(without, streamed, added, added_by_page) in MiB, the last being a report's pass with its
    four rollouts; shapes as `_abstract` takes them, kw as `stream`."""
    model, params, batch, queries = _abstract(*shapes)
    without = _mib(_plain.lower(model, params, batch, queries))
    streamed = _mib(capture.stream.lower(model, params, batch, queries, **kw))
    page = _mib(passes.lower(model, params, batch, queries))
    return dict(without=without, streamed=streamed, added=streamed - without, added_by_page=page - without)


def _abstract(res, text_len, tokens, img, llm, dtype):
    """(model, params, batch, queries) without values."""
    model = vlm.Model(img=dict(variant=img), llm=dict(variant=llm), dtype=dtype)
    params = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype),
        vlm.abstract_params(model, image_size=res),
    )
    text = jax.ShapeDtypeStruct((1, text_len), jnp.int32)
    image = jax.ShapeDtypeStruct((1, res, res, 3), jnp.float32)
    queries = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    return model, params, dict(image=image, text=text, mask_ar=text), queries


@functools.partial(jax.jit, static_argnums=0)
def _plain(model, params, batch, queries):
    """The same log-probabilities without capture."""
    tokens = trace.of(model, batch).predicted(queries)
    logits, _ = model.apply({"params": params}, **batch, logit_positions=(tokens - 1)[None])
    return token_logprobs(logits, batch["text"][:, tokens])


def _mib(lowered):
    found = lowered.compile().memory_analysis()
    return (found.temp_size_in_bytes + found.output_size_in_bytes) / 2**20
