"""Answers from a model: one jitted prefill and a while loop, greedy or by sampling.

A prompt is read once, however many samples are drawn from it: `prefill_cache` makes one prefix
cache a prompt, and every sample keeps only the few positions of its own tokens. The loop ends as
soon as every row has said EOS.

Randomness belongs to a row and not to a batch. The noise of a token is a function of (seed, row id,
number of the sample, number of the token) and of nothing else, so that an answer can be drawn again
alone, in another batch, or with more samples beside it.

Axis letters: B prompts, R samples of a prompt, T text positions, V vocabulary, M new tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med import distributed

PAD_TOKEN = 0
_KEYS = ("image", "text", "mask_ar", "mask_input")


def generate(
    model,
    params,
    batch,
    *,
    max_new_tokens,
    num_samples=1,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    eos_token=1,
):
    """Continues prompts.

    In a run of several processes all of them call it with the same global batch, whose arrays may
    be spread over them; so are those that come back (`distributed.to_host`).

    Compiled once for each model, batch shape, `max_new_tokens` and `num_samples`, and for greedy or
    sampling; changing temperature, top_p, seed or eos_token compiles nothing.

    Args:
      model: `paligemma.Model`.
      params: its parameters, wherever they are.
      batch: as big_vision's eval pp makes it; other keys are ignored.
        image: float[B, height, width, 3] in [-1, 1].
        text: int[B, T] the prompt, then padding.
        mask_ar: int[B, T] 0 on tokens that see one another (the prompt), 1 on causal ones.
        mask_input: int or bool[B, T] 1 on the prompt, 0 on the padding after it.
        _mask: optional bool[B], False on rows that only fill up the batch: nothing is generated.
        row_id: optional int[B] >= 0, names a prompt to the random numbers; by default its place in
          the batch. Give something of the example's own to make samples independent of batching.
      max_new_tokens: M; EOS counts.
      num_samples: R. Sample 0 of R = 5 is the sample of R = 1. Greedy samples are equal.
      temperature: 0 takes the most probable token; otherwise logits are divided by it.
      top_p: in (0, 1], nucleus sampling (arXiv 1904.09751): of the distribution after the
        temperature, the fewest most probable tokens that hold at least this mass. Tokens as
        probable as the last of them stay in too; the most probable one always does. Means nothing
        at temperature 0.
      seed: of the samples, an int in [0, 2**32).
      eos_token: ends a row; it is part of the tokens, and pad (0) follows it.

    Returns:
      (tokens int32[B, R, M], logprobs float32[B, R, M]). A logprob is that of the token chosen
      under the model's own distribution, i.e. at temperature 1 and before top_p, so that answers
      drawn in different ways can be compared; 0 after EOS.

    Raises:
      ValueError: a bad argument, a missing key, shapes that don't fit one another, a prompt that
        isn't left-aligned or has tokens that the model doesn't know.
    """
    _check_arguments(max_new_tokens, num_samples, temperature, top_p, seed)
    arrays = _check_batch(batch, params)
    rows = arrays["text"].shape[0]
    valid = batch.get("_mask")
    arrays["skip"] = np.zeros(rows, bool) if valid is None else ~_as_bool(valid)
    row_id = batch.get("row_id")
    row_id = np.arange(rows) if row_id is None else row_id
    arrays["row_id"] = row_id.astype(np.uint32)
    tokens, logprobs, _ = _generate(
        model,
        params,
        arrays,
        jax.random.key(np.uint32(seed)),
        np.float32(temperature),
        np.float32(top_p),
        np.int32(eos_token),
        max_new_tokens=int(max_new_tokens),
        num_samples=int(num_samples),
        greedy=float(temperature) == 0.0,
    )
    return tokens, logprobs


def _check_arguments(max_new_tokens, num_samples, temperature, top_p, seed):
    for name, value, limit in (
        ("max_new_tokens", max_new_tokens, 1),
        ("num_samples", num_samples, 1),
        ("seed", seed, 0),
    ):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not limit <= value < 2**32:
            raise ValueError(f"{name} is {value!r}; expected a whole number, {limit} or more.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}; expected a number, 0 or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; expected a number above 0 and up to 1.")


def _check_batch(batch, params):
    """The arrays that the model reads, or ValueError. Tokens are looked at on the host: a prompt
    that isn't left-aligned, or of another tokenizer, would give fluent nonsense."""
    if missing := [k for k in _KEYS if k not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(map(repr, missing))}, found {sorted(batch)}; "
            "the eval pp must keep() image, text, mask_ar and mask_input."
        )
    image, text = batch["image"], batch["text"]
    if text.ndim != 2 or image.ndim != 4 or image.shape[0] != text.shape[0]:
        raise ValueError(
            f"text has shape {text.shape} and image {image.shape}; "
            "expected [B, T] and [B, height, width, 3]."
        )
    for key in ("mask_ar", "mask_input"):
        if batch[key].shape != text.shape:
            raise ValueError(f"{key} has shape {batch[key].shape}, but text {text.shape}.")
    for key in ("_mask", "row_id"):
        if batch.get(key) is not None and batch[key].shape != text.shape[:1]:
            raise ValueError(f"{key} has shape {batch[key].shape}; expected ({text.shape[0]},).")

    # Every process looks at all rows: should one alone give up, the others would wait for it.
    text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
    mask = _as_bool(mask)
    if np.any(bad := (~mask[:, :-1] & mask[:, 1:]).any(axis=1)):
        raise ValueError(
            f"mask_input of row {bad.argmax()} has a 1 after a 0; "
            "expected the prompt first, padding after it."
        )
    tokens, known = text[mask], vocab_size(params)
    if known and np.any(unknown := (tokens < 0) | (tokens >= known)):
        raise ValueError(
            f"text holds token {tokens[unknown][0]}, but the model's vocabulary has {known}: "
            "the tokenizer is not the model's."
        )
    return {k: batch[k] for k in _KEYS}


def vocab_size(params):
    """Rows of the embedding table, or None for a language model that has none of that name."""
    table = params.get("llm", {}).get("embedder", {}).get("input_embedding")
    return None if table is None else table.shape[0]


def _as_bool(mask):
    return mask.astype(bool)


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "num_samples", "greedy"))
def _generate(
    model, params, batch, key, temperature, top_p, eos_token, *, max_new_tokens, num_samples, greedy
):
    """`generate` without its checks; also gives the number of tokens it took, int32[]."""
    variables = {"params": params}
    mask_input = _as_bool(batch["mask_input"])
    text = jnp.where(mask_input, batch["text"], PAD_TOKEN).astype(jnp.int32)
    (x, input_mask, mask_ar), _ = model.apply(
        variables, batch["image"], text, input_mask=mask_input,
        mask_ar=batch["mask_ar"].astype(jnp.int32), method="embed_image_and_text",
    )  # fmt: skip
    logits, cache = model.apply(
        variables, x, input_mask, mask_ar,
        # The last token is never read back, but an empty cache would be a case of its own.
        cache_size=x.shape[1] + max(max_new_tokens - 1, 1), num_samples=num_samples,
        method="prefill_cache", mutable=["cache", "prefix"],
    )  # fmt: skip
    # The prefix never changes: kept out of the loop's state, it isn't copied at each step.
    variables = {**variables, "prefix": cache.pop("prefix")}
    logits = jnp.repeat(logits[:, 0], num_samples, axis=0)

    rows = logits.shape[0]
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["row_id"])
    keys = fold(
        jnp.repeat(keys, num_samples, axis=0),
        jnp.tile(jnp.arange(num_samples), rows // num_samples),
    )

    def choose(logits, step, done):
        """float32[BR, V] → the next token and its logprob, [BR] each; pad and 0 where done."""
        if greedy:
            token = jnp.argmax(logits, axis=-1)
        else:
            scaled = temper(logits, temperature)
            scaled = jax.lax.cond(top_p < 1, lambda z: nucleus(z, top_p), lambda z: z, scaled)
            at_step = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
            token = jax.vmap(jax.random.categorical)(at_step, scaled)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        return (
            jnp.where(done, PAD_TOKEN, token).astype(jnp.int32),
            jnp.where(done, 0.0, logprob),
        )

    done = jnp.repeat(batch["skip"], num_samples)
    token, logprob = choose(logits, 0, done)
    tokens = jnp.full((rows, max_new_tokens), PAD_TOKEN, jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprob)

    def goes_on(state):
        return (state["step"] < max_new_tokens) & ~jnp.all(state["done"])

    def extend(state):
        step, done = state["step"], state["done"]
        last = jax.lax.dynamic_slice_in_dim(state["tokens"], step - 1, 1, axis=1)
        ztxt, _ = model.apply(variables, last, method="embed_text")
        logits, cache = model.apply(
            {**variables, **state["cache"]}, ztxt, method="extend_cache", mutable=["cache"]
        )
        token, logprob = choose(logits[:, 0], step, done)
        return dict(
            step=step + 1,
            done=done | (token == eos_token),
            cache=cache,
            tokens=state["tokens"].at[:, step].set(token),
            logprobs=state["logprobs"].at[:, step].set(logprob),
        )

    state = jax.lax.while_loop(
        goes_on,
        extend,
        dict(
            step=jnp.int32(1),
            done=done | (token == eos_token),
            cache=cache,
            tokens=tokens,
            logprobs=logprobs,
        ),
    )
    shape = (-1, num_samples, max_new_tokens)
    return state["tokens"].reshape(shape), state["logprobs"].reshape(shape), state["step"]


def temper(logits, temperature):
    """float32[..., V] over a temperature > 0, shifted so that the largest is 0: however small the
    temperature, nothing overflows."""
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def nucleus(logits, top_p):
    """float32[..., V] with -inf outside of the nucleus, as `generate` defines it."""
    ranked = jnp.sort(logits, axis=-1, descending=True)
    mass = jnp.cumsum(jax.nn.softmax(ranked, axis=-1), axis=-1)
    # A token is needed while those before it hold too little; the first one always is. The others
    # are compared by logit, so that equals are treated alike whichever way they were sorted.
    before = jnp.pad(mass[..., :-1], [(0, 0)] * (logits.ndim - 1) + [(1, 0)])
    count = jnp.sum(before < top_p, axis=-1, keepdims=True)
    cutoff = jnp.take_along_axis(ranked, count - 1, axis=-1)
    return jnp.where(logits >= cutoff, logits, -jnp.inf)
