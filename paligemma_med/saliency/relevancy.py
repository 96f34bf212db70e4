"""Relevancy: attention weighted by its gradient, which depends on the token that is explained.

The rule of Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting
Bi-Modal and Encoder-Decoder Transformers" (arXiv 2103.15679), eq. 5 and 6, for self-attention:

    Ā_l = mean over heads of max(∂y/∂A_l ⊙ A_l, 0),    R ← R + Ā_l R,   from R = I, first layer up,

where y is the score of the explained token, and the map is R's row at the token's query. Heads and keys
that speak against the token count as 0; rollout counts all of them as speaking for it.

Without cross-attention between modalities (the paper's eq. 8 and 9) the whole model is one stack:
the image tower's layers mix patches, the language model's the image tokens, the prompt and the
answer. So the tower's R continues the same product: patches = R_llm[query, image] · R_img, through
the connector if there is one.

Axis letters: L layers, N heads, S positions, P patches, T text positions, P + T columns of a map
(`trace`), R tokens, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import lean, vlm
from paligemma_med.saliency import trace

SCORES = ("logit", "logprob")


class Relevancy(NamedTuple):
    """rows float32[R, P + T], down to the language model's input; patches float32[R, P], carried on
    through the image tower to its input."""

    rows: np.ndarray
    patches: np.ndarray


def relevancy(model, params, batch, queries, tokens, *, score="logit", own=True) -> Relevancy:
    """Relevancy of every position, and of every input patch, for each of R tokens.

    One forward pass, and for each token one backward pass down to the probabilities of all layers.
    Heads are fused layer by layer: at 448 px and the shapes of the 3B model in float32, temporary
    memory is 1.4 GiB instead of 8.3.

    A row starts as a 1 at its own query, to which attention adds. Rows don't sum to 1; only ratios
    within a row have a meaning.

    Args:
      model: `vlm.Model`, not under attn_impl "cudnn", whose kernel holds no probabilities.
      params: its parameters.
      batch: image float[1, H, W, 3], text int[1, T], mask_ar int[1, T] (`sequence.make`).
      queries: int[R] positions of the sequence that predict the tokens.
      tokens: int[R]: the answer's, or others, to see what speaks for those.
      score: what is differentiated. "logit", the paper's and the default: its gradient doesn't
        vanish when the model is sure, so a sure token's map is as deep as an unsure one's.
        "logprob" counts only what speaks more for the token than for its rivals, but its gradient
        shrinks with 1 - p, and near p = 1 only paths through a single layer are left.
      own: False leaves out the 1 that a row starts with.

    Returns:
      `Relevancy`.

    Raises:
      ValueError: attn_impl "cudnn", a batch of several rows, queries outside the text, tokens outside
        the vocabulary, an unknown score.
    """
    if score not in SCORES:
        raise ValueError(f"score is {score!r}; expected one of {SCORES}.")
    arrays = trace.inputs(batch)
    queries, tokens = (np.asarray(x, np.int32).reshape(-1) for x in (queries, tokens))
    if not queries.size or queries.size != tokens.size:
        raise ValueError(f"{queries.size} queries and {tokens.size} tokens; expected as many.")
    queries = trace.of(model, arrays).check_queries(queries)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(f"Tokens {tokens.tolist()} are not in the vocabulary of {model.vocab_size}.")
    padded = (trace.padded(x) for x in (queries, tokens))
    out = _relevancy(_lean(model), params, arrays, *padded, queries.size, score=score, own=own)
    return Relevancy(*(x[: queries.size] for x in jax.device_get(out)))


def lower(model, params, batch, count) -> jax.stages.Lowered:
    """The program for `count` tokens, lowered by `jax.jit` from arrays or their shapes, so that
    tools/bench/saliency_memory.py can ask how much memory it takes."""
    tokens = jax.ShapeDtypeStruct((count + -count % trace.MULTIPLE,), jnp.int32)
    return _relevancy.lower(_lean(model), params, batch, tokens, tokens, count, score="logit", own=True)


def _lean(model):
    """The same model with its layers in a loop that keeps only their inputs for the backward pass, which
    needs the least memory and compiles fastest."""
    how = dict(scan=True, remat_policy="nothing_saveable")
    return model.clone(img={**model.img, **how}, llm={**model.llm, **how})


@functools.partial(lean.jit, static_argnames=("model", "score", "own"))
def _relevancy(model, params, batch, queries, tokens, count, *, score, own):
    """`relevancy` of the first `count` tokens; the other rows are 0, and cost no backward pass."""
    example = trace.of(model, batch)
    patches, length = example.patches, example.layout.length

    def scores(slots):
        """float32[R], whose gradient with respect to the slots is each layer's Ā (`capture.weigh`)."""
        variables = {"params": params, "perturbations": vlm.perturbations(model, **slots)}
        logits, _ = model.apply(variables, **batch, logit_positions=(example.predicted(queries) - 1)[None])
        if score == "logprob":
            logits = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(logits[0], tokens[:, None], axis=-1)[:, 0]

    sizes = {"img": patches, "llm": length}
    slots = {name: jnp.zeros((model.parts[name].depth, 1, n, n), jnp.float32) for name, n in sizes.items()}
    _, pull = jax.vjp(scores, slots)

    def one(i, out):
        (weights,) = pull(jax.nn.one_hot(i, len(tokens), dtype=jnp.float32))
        start = jax.nn.one_hot(queries[i], length, dtype=jnp.float32)
        row = carry_down(start, weights["llm"][:, 0])
        row = example.map(row if own else row - start, rule="relevancy")
        image = carry_down(row[:patches], weights["img"][:, 0])
        return out[0].at[i].set(row), out[1].at[i].set(image)

    columns = patches + example.layout.num_text
    empty = tuple(jnp.zeros((len(tokens), n), jnp.float32) for n in (columns, patches))
    return jax.lax.fori_loop(0, count, one, empty)


def carry_down(row, weights) -> jnp.ndarray:
    """A single row of R: row · (I + Ā_L) · … · (I + Ā_1), from the last layer down.

    The same product as R ← R + Ā_l R from the first layer up, but each layer multiplies a vector and a
    matrix instead of two matrices. float32[S], float32[L, S, S] → float32[S].
    """
    row, _ = jax.lax.scan(lambda r, w: (r + r @ w, None), row, weights, reverse=True)
    return row
