"""What all methods of saliency share for one answer: the model, the sequence, and one forward pass.

Axis letters: P, T, S, R, L, N as in `paligemma_med.saliency`; C = P + prompt + R columns of a map
(`trace`) without padding; K alternatives.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import lean
from paligemma_med.models.loss import token_logprobs
from paligemma_med.saliency import capture, rollout, trace
from paligemma_med.saliency.sequence import Sequence

# How heads are fused, and which share of each row's keys is left out, the weakest first.
ROLLOUTS = {
    "mean of heads": dict(fuse="mean"),
    "maximum of heads": dict(fuse="max"),
    "minimum of heads": dict(fuse="min"),
    "mean of heads, weakest 90 % of each row left out": dict(fuse="mean", discard=0.9),
}
RIVALS = 5  # alternatives to a token


class Map(NamedTuple):
    """One method's map; variant is a choice within the method, "" if there is only one."""

    method: str
    variant: str
    values: np.ndarray  # float32[R, C], or float32[R, P] of the image alone
    constants: np.ndarray | None = None  # float32[R] of each row on learned constants, by which it was scaled (`trace`)


class Attention(NamedTuple):
    """What one pass without gradients gives; shares have no padding, and `trace.Shares` says what their constants are.

    Attributes:
      raw: `trace.Shares` of float32[L, N, R, C], constants float32[L, N, R].
      rollouts: {variant: (`trace.Shares` of float32[R, C], the same carried on through the image tower)}, constants
        float32[R].
      logprobs: float32[R] of the answer's tokens.
      rivals: (tokens int32[R, K], their probabilities float32[R, K]).
    """

    raw: trace.Shares
    rollouts: dict[str, tuple[trace.Shares, trace.Shares]]
    logprobs: np.ndarray
    rivals: tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Passes:
    """One answer, as the functions of `methods.METHODS` use it.

    Attributes:
      model, params: a `vlm.Model` that can be captured (`capture.capturable`), and its parameters.
      seq: `sequence.make`.
      score: `occlusion.scorer` of seq.
      variants: which of ROLLOUTS are computed.
      cell: patches along the side of an occluded cell. fill: what replaces it (`occlusion.FILLS`).
      batch_size: images a pass of occlusion.
    """

    model: Any
    params: Any
    seq: Sequence
    score: Callable
    variants: Mapping[str, dict]
    cell: int = 1
    fill: str = "blur"
    batch_size: int = 32

    @functools.cached_property
    def attention(self) -> Attention:
        """One pass without gradients."""
        seq, count = self.seq, len(self.seq.queries)
        arrays, queries = trace.inputs(seq.batch), trace.padded(seq.queries, seq.least)
        found = _streamed(self.model, self.params, arrays, queries, tuple(self.variants))
        rows, rolled, *rest = jax.device_get(found)
        logprobs, tokens, p = (x[:count] for x in rest)

        def cut(shares, end=seq.response.stop):  # padding follows
            values, constants = shares
            return trace.Shares(values[..., :count, :end], None if constants is None else constants[..., :count])

        # In the order of `variants`, which jit doesn't keep.
        return Attention(cut(rows), {v: tuple(map(cut, rolled[v])) for v in self.variants}, logprobs, (tokens, p))


class _Folds:
    """Several folds (`layers.capture`) as one, with the outs of the first."""

    def __init__(self, folds):
        self.folds = folds

    def init(self, batch, heads, length):
        return [f.init(batch, heads, length) for f in self.folds]

    def step(self, states, probs):
        states, outs = zip(*(f.step(s, probs) for f, s in zip(self.folds, states)))
        return list(states), outs[0]


def lower(model, params, arrays, queries) -> jax.stages.Lowered:
    """The pass for attention and all rollouts, lowered by `jax.jit` from arrays or their shapes, so that
    tools/bench/saliency_memory.py can ask how much memory it takes."""
    return _streamed.lower(model, params, arrays, queries, tuple(ROLLOUTS))


@functools.partial(lean.jit, static_argnames=("model", "variants"))
def _streamed(model, params, arrays, queries, variants):
    """One pass for all variants (names of ROLLOUTS); holds one layer's probabilities and the rollouts."""
    rollouts = [ROLLOUTS[v] for v in variants] or [{}]
    img = _Folds([capture.Rows(**kw) for kw in rollouts])
    llm = _Folds([capture.Rows(queries, **kw) for kw in rollouts])
    example = trace.of(model, arrays)
    tokens = example.predicted(queries)
    logits, out = model.apply(
        {"params": params}, **arrays, logit_positions=(tokens - 1)[None], capture_attention=(img, llm)
    )
    states, rows = out["llm/attn"]
    rolled = {}
    for variant, of_llm, of_img in zip(variants, states, out["img/attn"][0]):
        row = of_llm["rolled"][queries]
        through = functools.partial(rollout.to_patches, img_rollout=of_img["rolled"])
        rolled[variant] = (
            example.map(row, out, rule="rollout"),
            example.map(row, out, rule="rollout", through=through),
        )
    logprobs = token_logprobs(logits[0], arrays["text"][0, tokens])
    top, rivals = jax.lax.top_k(jax.nn.log_softmax(logits[0]), min(RIVALS, logits.shape[-1]))
    return example.map(rows, out, rule="raw"), rolled, logprobs, rivals, jnp.exp(top)
