"""Answers by sampling, or greedy: the most probable token each time.

Axis letters: B prompts, R samples of a prompt, T text positions, V vocabulary, M new tokens,
Q image tokens.
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
from paligemma_med.decode.sampling import draw, least_of_most_probable, least_of_nucleus, temper
from paligemma_med.models import lean
from paligemma_med.models.loss import token_logprobs


def generate(
    model,
    params,
    batch,
    *,
    max_new_tokens,
    num_samples=1,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=0,
    eos_token=1,
    whole_text=False,
) -> tuple[jax.Array, jax.Array]:
    """Continues prompts.

    In a run of several processes all of them call it with the same global batch, whose arrays may
    be spread over them; so are those that come back (`distributed.to_host`).

    It compiles once for each model, batch shape, bucket, `max_new_tokens` and `num_samples`, and for
    greedy or sampling; changing temperature, top_k, top_p, seed or eos_token compiles nothing.

    Args:
      model: `paligemma.Model`.
      params: its parameters, wherever they are.
      batch: as big_vision's eval pp makes it; other keys are ignored.
        image: float[B, height, width, 3] in [-1, 1]; or instead
        zimg: float[B, Q, D] from `encode_images`, if several prompts share an image.
        text: int[B, T] the prompt, then padding.
        mask_ar: int[B, T] 0 on tokens that see one another (the prompt), 1 on causal ones.
        mask_input: int or bool[B, T] 1 on the prompt, 0 on the padding after it.
        image_at: optional int[B], how many tokens of the prompt stand before the image; by default 0.
        _mask: optional bool[B], False on rows that only fill up the batch: nothing is generated.
        row_id: optional int[B] >= 0, identifies a prompt for the random numbers; by default its index in
          the batch. Pass an example's own number to make samples independent of batching.
      max_new_tokens: M; EOS counts.
      num_samples: R. Sample 0 of R = 5 is the sample of R = 1. Greedy samples are equal.
      temperature: 0 takes the most probable token; otherwise logits are divided by it.
      top_k: 0, or sample only from the k most probable tokens (arXiv 1805.04833) and those as probable as
        the last of them.
      top_p: in (0, 1], nucleus sampling (arXiv 1904.09751): of the distribution after temperature
        and top_k, the fewest most probable tokens that hold at least this mass. Tokens as probable
        as the last of them stay in too; the most probable one always does. At temperature 0 top_k
        and top_p have no effect.
      seed: of the samples, an int in [0, 2**32).
      eos_token: ends a row; it is part of the tokens, and pad (0) follows it. Several of them: any one does.
      whole_text: all T positions are read, where otherwise they are cut to a bucket around the longest prompt: so one
        program does for prompts of any length.

    Returns:
      (tokens int32[B, R, M], logprobs float32[B, R, M]). A logprob is that of the token chosen
      under the model's own distribution, i.e. at temperature 1 and before top_k and top_p, so that
      answers drawn in different ways can be compared; 0 after EOS.

    Raises:
      ValueError: a bad argument, a missing key, shapes that don't fit together, a prompt that isn't
        left-aligned or has unknown tokens.
    """
    _check_sampling(temperature, top_p)
    counts = dict(max_new_tokens=max_new_tokens, num_samples=num_samples)
    check_whole(1, **counts)
    check_whole(0, top_k=top_k, seed=seed)
    arrays, text_len = check_batch(batch, model)
    text_len = arrays["text"].shape[1] if whole_text else text_len
    row_id = batch.get("row_id")
    row_id = np.arange(arrays["text"].shape[0]) if row_id is None else row_id
    arrays["row_id"] = row_id.astype(np.uint32)
    tokens, logprobs, _ = _generate(
        model,
        params,
        arrays,
        jax.random.key(np.uint32(seed)),
        np.float32(temperature),
        # No vocabulary has more, and float32 counts exactly up to there.
        np.float32(min(top_k or np.inf, 2**24)),
        np.float32(top_p),
        stop_tokens(eos_token),
        **{k: int(v) for k, v in counts.items()},
        greedy=float(temperature) == 0.0,
        text_len=text_len,
    )
    return tokens, logprobs


def lower(model, params, arrays, *, max_new_tokens, num_samples=1, temperature=0.0, text_len) -> jax.stages.Lowered:
    """The program that `generate` runs, from shapes alone.

    Args:
      arrays: those of a batch that the model reads: image or zimg, text, mask_ar, mask_input and perhaps image_at, also
        skip bool[B] and row_id uint32[B].
      text_len: the length that text is cut to.
    """
    key, number = jax.eval_shape(lambda: jax.random.key(0)), jax.ShapeDtypeStruct((), jnp.float32)
    kw = dict(max_new_tokens=max_new_tokens, num_samples=num_samples, greedy=temperature == 0, text_len=text_len)
    return _generate.lower(model, params, arrays, key, number, number, number, stop_tokens(1), **kw)


def _check_sampling(temperature, top_p):
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}; expected a number, 0 or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; expected a number above 0 and up to 1.")


@functools.partial(lean.jit, static_argnames=("model", "max_new_tokens", "num_samples", "greedy", "text_len"))
def _generate(
    model,
    params,
    batch,
    key,
    temperature,
    top_k,
    top_p,
    eos_token,
    *,
    max_new_tokens,
    num_samples,
    greedy,
    text_len,
):
    """`generate` without its checks; also gives the number of tokens it took, int32[]."""
    variables, cache, logits = read_prompts(
        model, params, batch, text_len=text_len, new=max_new_tokens, copies=num_samples
    )
    keys = _sample_keys(key, batch["row_id"], num_samples)

    def choose(logits, step, done):
        """float32[BR, V] → the next token and its logprob, [BR] each; pad and 0 where done."""
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            token = _sample(keys, step, logits, temperature, top_k, top_p)
        return (
            jnp.where(done, PAD_TOKEN, token).astype(jnp.int32),
            jnp.where(done, 0.0, token_logprobs(logits, token)),
        )

    def is_open(state):
        return (state["step"] < max_new_tokens) & ~jnp.all(state["done"])

    def extend(state):
        step, done = state["step"], state["done"]
        logits, cache = next_logits(model, variables, state["cache"], state["tokens"][:, step - 1])
        token, logprob = choose(logits, step, done)
        return dict(
            step=step + 1,
            done=done | is_stop(token, eos_token),
            cache=cache,
            tokens=state["tokens"].at[:, step].set(token),
            logprobs=state["logprobs"].at[:, step].set(logprob),
        )

    done = jnp.repeat(batch["skip"], num_samples)
    token, logprob = choose(jnp.repeat(logits, num_samples, axis=0), 0, done)
    rows = token.shape[0]
    start = dict(
        step=jnp.int32(1),
        done=done | is_stop(token, eos_token),
        cache=cache,
        tokens=jnp.full((rows, max_new_tokens), PAD_TOKEN, jnp.int32).at[:, 0].set(token),
        logprobs=jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprob),
    )
    state = jax.lax.while_loop(is_open, extend, start)
    shape = (-1, num_samples, max_new_tokens)
    return state["tokens"].reshape(shape), state["logprobs"].reshape(shape), state["step"]


def _sample_keys(key, row_id, num_samples):
    """A random key for each sample of each prompt, [BR], that depends on no other row."""
    rows = jax.vmap(jax.random.fold_in, (None, 0))(key, row_id)
    numbers = jnp.tile(jnp.arange(num_samples), row_id.shape[0])
    return jax.vmap(jax.random.fold_in)(jnp.repeat(rows, num_samples, axis=0), numbers)


def _sample(keys, step, logits, temperature, top_k, top_p):
    """One token of each row's filtered distribution: float32[BR, V] → int32[BR]."""
    z = temper(logits, temperature)
    # What keeps everything is left out when it runs: it would cost several passes over the logits.
    everything = jnp.full((z.shape[0], 1), -jnp.inf, jnp.float32)
    least = jax.lax.cond(top_k < z.shape[-1], lambda: least_of_most_probable(z, top_k), lambda: everything)
    least = jax.lax.cond(top_p < 1, lambda: least_of_nucleus(z, top_p, least), lambda: least)
    z = jnp.where(z >= least, z, -jnp.inf)
    return jax.vmap(draw)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), z)
