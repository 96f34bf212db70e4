"""Relevancy: attention weighted by its gradient, which depends on the token that is explained.

The rule of Chefer, Gur and Wolf, "Generic Attention-model Explainability for Interpreting
Bi-Modal and Encoder-Decoder Transformers" (arXiv 2103.15679), eq. 5 and 6, for self-attention:

    Ā_l = mean over heads of max(∂y/∂A_l ⊙ A_l, 0),    R ← R + Ā_l R,   from R = I, first layer up,

where y is the score of the explained token, and the map is R's row at the token's query. Heads and keys
that speak against the token count as 0; rollout counts all of them as speaking for it.

Without cross-attention between modalities (the paper's eq. 8 and 9) the whole model is one stack:
the image tower's layers mix patches, the language model's the image tokens, the prompt and the
answer. So the tower's R continues the same product: patches = R_llm[query, image] · R_img, through
the connector if there is one. A connector's cross-attention, from learned queries to the image, is a layer whose keys
are the tower's tokens: what it adds to them comes from the queries, which keep theirs.

Axis letters: L layers, N heads, S positions, P patches, T text positions, P + T columns of a map
(`trace`), R tokens, V vocabulary.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import connector as connectors
from paligemma_med.models import lean, vlm
from paligemma_med.saliency import trace

SCORES = ("logit", "logprob")
TOGETHER = 4  # tokens in a backward pass, at most
_HELD = 2**30  # bytes that a backward pass may hold of fused attention


class Relevancy(NamedTuple):
    """rows float32[R, P + T], down to the language model's input; patches float32[R, P], carried on
    through the image tower to its input."""

    rows: np.ndarray
    patches: np.ndarray


def relevancy(
    model, params, batch, queries, tokens, *, score="logit", own=True, together=None, least=0, progress=None
) -> Relevancy:
    """Relevancy of every position, and of every input patch, for each of R tokens.

    One forward pass, and backward passes down to the probabilities of all layers, each for a few tokens, which share
    what a backward pass computes again of the forward pass: on a CPU a third less time than one by one. Heads are
    fused layer by layer: at 448 px and the shapes of the 3B model in float32, one token's temporary memory is 1.4 GiB
    instead of 8.3.

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
      together: tokens in a backward pass; by default up to TOGETHER, as memory allows.
      least: as of `sequence.Sequence`; the same programs then do for fewer tokens, too.
      progress: called after each backward pass with how many of the tokens are done, and R.

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
    count = queries.size
    if not count or count != tokens.size:
        raise ValueError(f"{queries.size} queries and {tokens.size} tokens; expected as many.")
    queries = trace.of(model, arrays).check_queries(queries)
    if tokens.min() < 0 or tokens.max() >= model.vocab_size:
        raise ValueError(f"Tokens {tokens.tolist()} are not in the vocabulary of {model.vocab_size}.")
    queries, tokens = (trace.padded(x, least) for x in (queries, tokens))
    model, found = _lean(model), []
    pull = _forward(model, params, arrays, queries, tokens, score=score)
    for chosen in _chunks(count, together or _together(model, arrays), least):
        rows = _backward(model, params, pull, arrays, queries, chosen, own=own)
        found.append(jax.device_get(rows))
        if progress is not None:
            progress(min(count, int(chosen[-1]) + 1), count)
    return Relevancy(*(np.concatenate(x)[:count] for x in zip(*found)))


def lower(model, params, batch, count, together=None) -> jax.stages.Lowered:
    """One program that does what `relevancy` does for its first tokens of `count`, lowered by `jax.jit` from arrays or
    their shapes, so that tools/bench/saliency_memory.py can ask how much memory it takes."""
    tokens = jax.ShapeDtypeStruct((count + -count % trace.MULTIPLE,), jnp.int32)
    model, chosen = _lean(model), next(_chunks(count, together or _together(model, batch)))

    def both(params, arrays, queries, tokens):
        pull = _forward(model, params, arrays, queries, tokens, score="logit")
        return _backward(model, params, pull, arrays, queries, chosen, own=True)

    return lean.jit(both).lower(params, batch, tokens, tokens)


def _lean(model):
    """The same model with its layers in a loop that keeps only their inputs for the backward pass, which
    needs the least memory and compiles fastest."""
    how = dict(scan=True, remat_policy="nothing_saveable")
    return model.clone(img={**model.img, **how}, llm={**model.llm, **how})


def _sizes(model, batch):
    """{part: shape of its layers' fused attention}."""
    example = trace.of(model, batch)
    lengths = {"img": example.tower_tokens, "llm": example.layout.length}
    return {name: (model.parts[name].depth, 1, n, n) for name, n in lengths.items()}


def _together(model, batch):
    """How many tokens to follow in one backward pass, which holds the fused attention of all layers for each."""
    held = sum(4 * math.prod(shape) for shape in _sizes(model, batch).values())
    return max(1, min(TOGETHER, _HELD // held))


def _chunks(count, size, least=0):
    """Yields int32[size] numbers of tokens below `count`; the last is filled up by repeating the last token. A size
    that is larger than `count`, or `least`, is the next power of two, so that few programs are compiled."""
    size = min(size, 1 << (max(count, least) - 1).bit_length())
    for start in range(0, count, size):
        yield np.minimum(np.arange(start, start + size, dtype=np.int32), count - 1)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Weight:
    """Stands for a leaf of the parameters."""

    number: int


@functools.partial(lean.jit, static_argnames=("model", "score"))
def _forward(model, params, batch, queries, tokens, *, score):
    """The forward pass: a function from weights of the tokens' scores, float32[R], to their gradient with respect to
    the slots, which is each layer's Ā (`capture.weigh`). It holds `_Weight` in place of weights, which as results of a
    program would be copies."""
    example = trace.of(model, batch)

    def scores(slots):
        variables = {"params": params, "perturbations": vlm.perturbations(model, **slots)}
        logits, _ = model.apply(variables, **batch, logit_positions=(example.predicted(queries) - 1)[None])
        if score == "logprob":
            logits = jax.nn.log_softmax(logits, axis=-1)
        return jnp.take_along_axis(logits[0], tokens[:, None], axis=-1)[:, 0]

    slots = {name: jnp.zeros(shape, jnp.float32) for name, shape in _sizes(model, batch).items()}
    slots["connector"] = {name: jnp.zeros(shape, jnp.float32) for name, shape in example.slots.items()}
    weights = {id(x): _Weight(i) for i, x in enumerate(jax.tree.leaves(params))}
    return jax.tree.map(lambda x: weights.get(id(x), x), jax.vjp(scores, slots)[1])


@functools.partial(lean.jit, static_argnames=("model", "own"))
def _backward(model, params, pull, batch, queries, chosen, *, own):
    """(rows float32[k, P + T], patches float32[k, P]) of the tokens with the numbers int32[k]; pull of `_forward`."""
    example = trace.of(model, batch)
    weights = jax.tree.leaves(params)
    pull = jax.tree.map(
        lambda x: weights[x.number] if isinstance(x, _Weight) else x, pull, is_leaf=lambda x: isinstance(x, _Weight)
    )

    def one(i):
        (weights,) = pull(jax.nn.one_hot(i, len(queries), dtype=jnp.float32))
        start = jax.nn.one_hot(queries[i], example.layout.length, dtype=jnp.float32)
        row = carry_down(start, weights["llm"][:, 0])
        row = row if own else row - start
        between = connectors.weighted(model.connector, weights["connector"])
        kw = dict(out={f"connector/{k}": x for k, x in between.items()}, rule="relevancy")
        image = example.map(row, through=lambda x: carry_down(x, weights["img"][:, 0]), **kw)
        return example.map(row, **kw).values, image.values[: example.patches]

    return jax.vmap(one)(chosen)


def carry_down(row, weights) -> jnp.ndarray:
    """A single row of R: row · (I + Ā_L) · … · (I + Ā_1), from the last layer down.

    The same product as R ← R + Ā_l R from the first layer up, but each layer multiplies a vector and a
    matrix instead of two matrices. float32[S], float32[L, S, S] → float32[S].
    """
    row, _ = jax.lax.scan(lambda r, w: (r + r @ w, None), row, weights, reverse=True)
    return row
