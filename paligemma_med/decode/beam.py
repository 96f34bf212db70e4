"""Beam search: the best continuations that a search K beams wide finds.

Axis letters: B prompts, K beams, T text positions, V vocabulary, M new tokens, Q image tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.decode.prompts import (
    PAD_TOKEN,
    check_batch,
    check_whole,
    is_stop,
    next_logits,
    read_prompts,
    stop_tokens,
)
from paligemma_med.models import lean


def beam_search(
    model,
    params,
    batch,
    *,
    beams,
    max_new_tokens,
    length_penalty=1.0,
    early_stopping=False,
    eos_token=1,
) -> tuple[jax.Array, jax.Array]:
    """The K best continuations that a search K wide finds.

    They are found and scored as by `generate(num_beams=K)` of transformers (5.23): at each step the
    2K best continuations of all beams are compared; those among the first K that end are candidates
    for the result, and the K best that don't are the next beams. The score of an ended one is

        (sum of its tokens' log-probabilities, EOS included) / (their number)^length_penalty,

    and beams that haven't ended after max_new_tokens end there. Each prompt's result doesn't depend on
    the rest of the batch. Processes and compiling: as in `generate`.

    Args:
      model, params, batch: as for `generate`; row_id has no effect.
      beams: K.
      max_new_tokens: M; EOS counts.
      length_penalty: above 0 it favours long answers, below 0 short ones.
      early_stopping: when a prompt's search is over. True: once K have ended. False: once the best
        beam, if it ended now, would not beat the worst of K that have. "never": the same, but for a
        positive length_penalty a beam is judged as if it kept its sum up to M tokens, so that none
        which might still win is given up.
      eos_token: ends a row; it is part of the tokens, and pad (0) follows it. Several of them: any one does.

    Returns:
      (tokens int32[B, K, M], scores float32[B, K]), best first; 0 where `_mask` is False.

    Raises:
      ValueError: as `generate`; fewer than 2K tokens in the vocabulary.
    """
    check_whole(1, beams=beams, max_new_tokens=max_new_tokens)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}; expected a number.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is {early_stopping!r}; expected True, False or 'never'.")
    if model.vocab_size < 2 * beams:
        raise ValueError(f"beams is {beams}, but the vocabulary has {model.vocab_size} tokens; expected 2·K.")
    arrays, text_len = check_batch(batch, model)
    return _beam_search(
        model,
        params,
        arrays,
        np.float32(length_penalty),
        stop_tokens(eos_token),
        beams=int(beams),
        max_new_tokens=int(max_new_tokens),
        early_stopping=early_stopping,
        text_len=text_len,
    )


_pick = jax.vmap(lambda x, index: x[index])  # x[B, n, …], int[B, m] → [B, m, …]


@functools.partial(lean.jit, static_argnames=("model", "beams", "max_new_tokens", "early_stopping", "text_len"))
def _beam_search(
    model,
    params,
    batch,
    length_penalty,
    eos_token,
    *,
    beams,
    max_new_tokens,
    early_stopping,
    text_len,
):
    """`beam_search` without its checks."""
    variables, cache, logits = read_prompts(model, params, batch, text_len=text_len, new=max_new_tokens, copies=beams)
    select = functools.partial(
        _select,
        length_penalty=length_penalty,
        eos_token=eos_token,
        max_new_tokens=max_new_tokens,
        early_stopping=early_stopping,
    )
    none = jnp.full((logits.shape[0], beams), -jnp.inf, jnp.float32)
    tokens = jnp.full((*none.shape, max_new_tokens), PAD_TOKEN, jnp.int32)
    # All beams are the bare prompt: only the first one counts, or all would be the same.
    state = dict(score=none.at[:, 0].set(0.0), tokens=tokens, ended_score=none, ended=tokens, open=~batch["skip"])
    state, parent = select(state, jnp.repeat(logits, beams, axis=0), jnp.int32(1))

    def is_open(carry):
        _, _, state, count = carry
        return (count < max_new_tokens) & jnp.any(state["open"])

    def extend(carry):
        cache, parent, state, count = carry
        last = state["tokens"][:, :, count - 1].reshape(-1)
        logits, cache = next_logits(model, variables, _follow(cache, parent), last)
        state, parent = select(state, logits, count + 1)
        return cache, parent, state, count + 1

    _, _, state, _ = jax.lax.while_loop(is_open, extend, (cache, parent, state, jnp.int32(1)))
    skip = batch["skip"][:, None]
    return (
        jnp.where(skip[..., None], PAD_TOKEN, state["ended"]),
        jnp.where(skip, 0.0, state["ended_score"]),
    )


def _select(state, logits, count, *, length_penalty, eos_token, max_new_tokens, early_stopping):
    """Takes the step to `count` tokens.

    Args:
      state: score float32[B, K] and tokens int32[B, K, M] of the beams, ended_score and ended of the
        best that have ended, open bool[B].
      logits: float32[BK, V] after the beams.
      count: int32[], how many tokens each beam has after this step.

    Returns:
      (state, int[B, K] which beam each of the next ones continues).
    """
    rows, beams = state["score"].shape
    vocab = logits.shape[-1]
    logp = jax.nn.log_softmax(logits).reshape(rows, beams, vocab)
    total = (state["score"][..., None] + logp).reshape(rows, -1)
    # At most K of 2K can end here, one for each beam, which leaves enough to continue with.
    score, place = jax.lax.top_k(total, 2 * beams)
    parent, token = place // vocab, place % vocab
    tokens = _pick(state["tokens"], parent).at[:, :, count - 1].set(token)
    ends = is_stop(token, eos_token) | (count == max_new_tokens)

    best = ends & (jnp.arange(2 * beams) < beams) & state["open"][:, None]
    final = jnp.where(best, score / count.astype(jnp.float32) ** length_penalty, -jnp.inf)
    ended_score, place = jax.lax.top_k(jnp.concatenate([state["ended_score"], final], axis=1), beams)
    ended = _pick(jnp.concatenate([state["ended"], tokens], axis=1), place)

    score, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), beams)
    judged = count
    if early_stopping == "never":
        judged = jnp.where(length_penalty > 0, max_new_tokens, count)
    hope = score[:, 0] / judged.astype(jnp.float32) ** length_penalty
    still = hope > jnp.min(ended_score, axis=1)  # with fewer than K, the worst is -inf
    if early_stopping is True:
        still = jnp.any(ended_score == -jnp.inf, axis=1)
    return dict(
        score=score,
        tokens=_pick(tokens, place),
        ended_score=ended_score,
        ended=ended,
        open=state["open"] & still,
    ), _pick(parent, place)


def _follow(cache, parent):
    """The cache whose rows are copies of rows `parent` int[B, K] of each prompt."""

    def pick(path, x):
        if not path[-1].key.endswith("_new"):  # the same for all beams of a prompt
            return x
        return _pick(x.reshape(*parent.shape, *x.shape[1:]), parent).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(pick, cache)
