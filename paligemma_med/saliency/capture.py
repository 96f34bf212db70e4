"""The attention of an answer in one teacher-forced pass: all of it, or only what maps need.

`attention` returns every layer's probabilities: 2.4 GB at 448 px and the shapes of the 3B model.
`streamed` reduces each layer's to the answer's rows and the rollout, and never holds more than one
layer's probabilities.

Axis letters: B batch, L layers, N heads, S positions, P patches, T text positions, P + T columns of
a map (`trace`), R tokens of the answer, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import lean, vlm
from paligemma_med.models.loss import token_logprobs
from paligemma_med.saliency import raw, rollout, trace


class Attention(NamedTuple):
    """llm float32[L, B, N, S, S]; img float32[layers, B, heads, P, P]; logprobs float32[B, T]."""

    llm: np.ndarray
    img: np.ndarray
    logprobs: np.ndarray


class Streamed(NamedTuple):
    """rows float32[L, N, R, P + T]; rollout float32[R, P + T]; img_rollout float32[P, P], class tokens of the tower
    included; mass float32[L, N, R, 3] on image, prompt and answer; logprobs float32[R]."""

    rows: np.ndarray
    rollout: np.ndarray
    img_rollout: np.ndarray
    mass: np.ndarray
    logprobs: np.ndarray


def capturable(model) -> vlm.Model:
    """The same model, set up for capturing: attn_impl "xla" throughout, since a fused kernel exposes no
    probabilities, and its layers in a loop, which compiles faster than unrolled layers and can't hold
    more than one layer's probabilities."""

    def plain(section):
        return {k: v for k, v in section.items() if k != "attn_impl"} | {"scan": True}

    return model.clone(attn_impl="xla", img=plain(model.img), llm=plain(model.llm))


def attention(model, params, batch) -> Attention:
    """All probabilities of both towers.

    Args:
      model: `vlm.Model`, not under attn_impl "cudnn", whose kernel exposes no probabilities
        (`capturable`).
      params: its parameters.
      batch: image float[B, H, W, 3], text int[B, T], mask_ar int[B, T], image_at int[B] if there is
        one; other keys are ignored.

    Returns:
      `Attention`. logprobs at t is log p(text[t] | image, text before t), 0 at t = 0.

    Raises:
      ValueError: attn_impl "cudnn".
    """
    arrays = {k: batch[k] for k in trace.INPUTS if k in batch}
    return Attention(*jax.device_get(whole(model, params, arrays)))


@functools.partial(lean.jit, static_argnames="model")
def whole(model, params, batch) -> tuple:
    """`attention` left on the device: (llm, img, logprobs)."""
    logits, out = model.apply({"params": params}, **batch, capture_attention=True)
    logprobs = token_logprobs(logits[:, :-1], batch["text"][:, 1:])
    return out["llm/attn"], out["img/attn"], jnp.pad(logprobs, ((0, 0), (1, 0)))


class Rows:
    """A fold (see `layers.capture`) that keeps the rows of some queries and computes the rollout.

    State: dict(layer int32[], rolled float32[S, S], queries). Outs: float32[N, R, S]. Batch of one.
    """

    def __init__(self, queries=None, *, fuse="mean", discard=0.0, start_layer=0):
        self.queries, self.kw = queries, dict(fuse=fuse, discard=discard)
        self.start_layer = start_layer

    def init(self, batch, heads, length) -> dict:
        if batch != 1:
            raise ValueError(f"The batch has {batch} rows; expected one.")
        rolled = jnp.eye(length, dtype=jnp.float32)
        return dict(layer=jnp.int32(0), rolled=rolled, queries=self.queries)

    def step(self, state, probs) -> tuple:
        probs, rolled = probs[0], state["rolled"]
        counts = state["layer"] >= self.start_layer
        rolled = jnp.where(counts, rollout.step(rolled, probs, **self.kw), rolled)
        rows = None if state["queries"] is None else probs[:, state["queries"]]
        return {**state, "layer": state["layer"] + 1, "rolled": rolled}, rows


def streamed(model, params, batch, queries, *, fuse="mean", discard=0.0, start_layer=0) -> Streamed:
    """The answer's attention and the rollout of both towers, in little memory.

    Args:
      model, params, batch: as `attention` takes them; B = 1 (`sequence.make`).
      queries: int[R] positions that predict the answer's tokens, in order. The prompt is everything
        before the token that the first of them predicts.
      fuse, discard: as `rollout.fused` takes them, for both towers.
      start_layer: first layer of the language model in the rollout; the image tower's is 0.

    Returns:
      `Streamed`.

    Raises:
      ValueError: attn_impl "cudnn", B other than 1, queries outside the text, bad arguments of the
        rollout.
    """
    arrays = trace.inputs(batch)
    example = trace.of(model, arrays)
    queries = example.check_queries(queries, last=1)
    kw = dict(fuse=fuse, discard=float(discard), start_layer=int(start_layer))
    found = jax.device_get(stream(model, params, arrays, trace.padded(queries), **kw))
    rows, rolled, img_rolled, logprobs = found
    rows = rows[:, :, : queries.size]
    prompt = slice(example.patches, example.patches + int(example.predicted(queries)[0]))
    mass = raw.mass(rows, example.patches, prompt)
    return Streamed(rows, rolled[: queries.size], img_rolled, mass, logprobs[: queries.size])


@functools.partial(lean.jit, static_argnames=("model", "fuse", "discard", "start_layer"))
def stream(model, params, batch, queries, *, fuse="mean", discard=0.0, start_layer=0) -> tuple:
    """The jitted part of `streamed`: (rows, rollout, img_rollout, logprobs)."""
    kw = dict(fuse=fuse, discard=discard)
    folds = Rows(**kw), Rows(queries, start_layer=start_layer, **kw)
    example = trace.of(model, batch)
    tokens = example.predicted(queries)
    logits, out = model.apply({"params": params}, **batch, logit_positions=(tokens - 1)[None], capture_attention=folds)
    state, rows = out["llm/attn"]
    rollout.check_start_layer(start_layer, len(rows))
    logprobs = token_logprobs(logits, batch["text"][:, tokens])[0]
    rolled = example.map(state["rolled"][queries], out, rule="rollout").values
    return example.map(rows, out, rule="raw").values, rolled, out["img/attn"][0]["rolled"], logprobs
