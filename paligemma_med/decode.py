"""Answers from a model: by sampling or greedy (`generate`), by beam search, or by how probable it
finds given options (`score_options`).

All three read a prompt once, however many continuations it gets: `prefill_cache` makes one prefix
cache a prompt, and every continuation keeps only the few positions of its own tokens. Loops end as
soon as no row goes on.

Randomness belongs to a row and not to a batch. The noise of a token is a function of (seed, row id,
number of the sample, number of the token) and of nothing else, so that an answer can be drawn again
alone, in another batch, or with more samples beside it.

Text is cut to the smallest of a few lengths (`bucket`) that holds the batch's longest prompt, so
that little padding is computed and few programs are compiled. Padding is never seen, but sums over
rows of another length may be rounded otherwise, as in a batch of another size: logits of the same
prompt then differ in their last bits, and a token that two candidates tie for may, too.

Axis letters: B prompts, R samples of a prompt, T text positions, V vocabulary, M new tokens,
K beams, C options of a prompt, Q image tokens.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models.loss import token_logprobs
from paligemma_med.parallel import distributed

PAD_TOKEN = 0
MIN_BUCKET = 16  # text tokens
_KEYS = ("text", "mask_ar", "mask_input")


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
):
    """Continues prompts.

    In a run of several processes all of them call it with the same global batch, whose arrays may
    be spread over them; so are those that come back (`distributed.to_host`).

    Compiled once for each model, batch shape, bucket, `max_new_tokens` and `num_samples`, and for
    greedy or sampling; changing temperature, top_k, top_p, seed or eos_token compiles nothing.

    Args:
      model: `paligemma.Model`.
      params: its parameters, wherever they are.
      batch: as big_vision's eval pp makes it; other keys are ignored.
        image: float[B, height, width, 3] in [-1, 1]; or, in its place,
        zimg: float[B, Q, D] from `encode_images`, where several prompts share an image.
        text: int[B, T] the prompt, then padding.
        mask_ar: int[B, T] 0 on tokens that see one another (the prompt), 1 on causal ones.
        mask_input: int or bool[B, T] 1 on the prompt, 0 on the padding after it.
        image_at: optional int[B], how many tokens of the prompt stand before the image; by default 0.
        _mask: optional bool[B], False on rows that only fill up the batch: nothing is generated.
        row_id: optional int[B] >= 0, names a prompt to the random numbers; by default its place in
          the batch. Give something of the example's own to make samples independent of batching.
      max_new_tokens: M; EOS counts.
      num_samples: R. Sample 0 of R = 5 is the sample of R = 1. Greedy samples are equal.
      temperature: 0 takes the most probable token; otherwise logits are divided by it.
      top_k: 0, or sampling from the k most probable tokens alone (arXiv 1805.04833) and those as
        probable as the last of them.
      top_p: in (0, 1], nucleus sampling (arXiv 1904.09751): of the distribution after the
        temperature and top_k, the fewest most probable tokens that hold at least this mass. Tokens
        as probable as the last of them stay in too; the most probable one always does. Both mean
        nothing at temperature 0.
      seed: of the samples, an int in [0, 2**32).
      eos_token: ends a row; it is part of the tokens, and pad (0) follows it.

    Returns:
      (tokens int32[B, R, M], logprobs float32[B, R, M]). A logprob is that of the token chosen
      under the model's own distribution, i.e. at temperature 1 and before top_k and top_p, so that
      answers drawn in different ways can be compared; 0 after EOS.

    Raises:
      ValueError: a bad argument, a missing key, shapes that don't fit one another, a prompt that
        isn't left-aligned or has tokens that the model doesn't know.
    """
    _check_sampling(temperature, top_p)
    counts = dict(max_new_tokens=max_new_tokens, num_samples=num_samples)
    _check_whole(1, **counts)
    _check_whole(0, top_k=top_k, seed=seed)
    arrays, text_len = _check_batch(batch, model)
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
        np.int32(eos_token),
        **{k: int(v) for k, v in counts.items()},
        greedy=float(temperature) == 0.0,
        text_len=text_len,
    )
    return tokens, logprobs


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
):
    """The K best continuations that a search K wide finds.

    As `generate(num_beams=K)` of transformers (5.23) finds and scores them: at each step the 2K
    best continuations of all beams are looked at; those among the first K that end are candidates
    for the result, the K best that don't are the next beams. The score of an ended one is

        (sum of its tokens' log-probabilities, EOS included) / (their number)^length_penalty,

    and what has not ended after max_new_tokens ends there. Each prompt's result is its own,
    whatever else is in the batch. Processes, compiling: as `generate`.

    Args:
      model, params, batch: as for `generate`; row_id means nothing.
      beams: K.
      max_new_tokens: M; EOS counts.
      length_penalty: above 0 it favours long answers, below 0 short ones.
      early_stopping: when a prompt's search is over. True: once K have ended. False: once the best
        beam, if it ended now, would not beat the worst of K that have. "never": the same, but for a
        positive length_penalty a beam is judged as if it kept its sum up to M tokens, so that none
        which might still win is given up.
      eos_token: ends a row; it is part of the tokens, and pad (0) follows it.

    Returns:
      (tokens int32[B, K, M], scores float32[B, K]), best first; 0 where `_mask` is False.

    Raises:
      ValueError: as `generate`; fewer than 2K tokens in the vocabulary.
    """
    _check_whole(1, beams=beams, max_new_tokens=max_new_tokens)
    if not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty is {length_penalty!r}; expected a number.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping is {early_stopping!r}; expected True, False or 'never'.")
    if model.vocab_size < 2 * beams:
        raise ValueError(f"beams is {beams}, but the vocabulary has {model.vocab_size} tokens; expected 2·K.")
    arrays, text_len = _check_batch(batch, model)
    return _beam_search(
        model,
        params,
        arrays,
        np.float32(length_penalty),
        np.int32(eos_token),
        beams=int(beams),
        max_new_tokens=int(max_new_tokens),
        early_stopping=early_stopping,
        text_len=text_len,
    )


def score_options(model, params, batch, options, mask):
    """Log-likelihood of given continuations: log p(option | image, prompt).

    The prompt is read once for all of its options. Processes: as `generate`; `options` and `mask`
    are then the same in all of them. Compiled once for each shape, so pad C and M to few sizes
    (`evaluators.options.encode` does); the padding of M costs nothing.

    Args:
      model, params, batch: as for `generate`; row_id means nothing.
      options: int[B, C, M] tokens, as an answer would be tokenized (with its EOS, unless options
        that begin alike are to be alike).
      mask: bool[B, C, M], True on an option's tokens, False on the padding after them. A row with
        fewer than C options has some that are all padding.

    Returns:
      (sums float32[B, C], lengths int32[B, C]): sum of the tokens' log-probabilities, number of
      tokens. Both are 0 for options without tokens; sums are 0 where `_mask` is False.

    Raises:
      ValueError: as `generate`; options that aren't [B, C, M], left-aligned and of known tokens.
    """
    options, mask = (np.asarray(x) for x in distributed.to_host((options, mask)))
    mask = mask.astype(bool)
    rows = batch["text"].shape[0] if "text" in batch else None
    if options.ndim != 3 or 0 in options.shape or rows not in (None, len(options)):
        raise ValueError(f"options has shape {options.shape}; expected [B = {rows}, C, M].")
    if mask.shape != options.shape:
        raise ValueError(f"mask has shape {mask.shape}, but options {options.shape}.")
    for row in np.argwhere((~mask[..., :-1] & mask[..., 1:]).any(-1))[:1].tolist():
        raise ValueError(f"mask of row and option {row} has a True after a False.")
    _check_tokens(options[mask], model, "options")
    arrays, text_len = _check_batch(batch, model)
    lengths = mask.sum(axis=-1).astype(np.int32)
    options = np.where(mask, options, PAD_TOKEN).astype(np.int32)
    return _score_options(model, params, arrays, options, lengths, text_len=text_len), lengths


@functools.partial(jax.jit, static_argnames="model")
def encode_images(model, params, image):
    """float[B, height, width, 3] in [-1, 1] → float[B, Q, D], to stand as "zimg" in batches in
    place of "image": several questions on one image then cost one pass of the image tower."""
    return model.apply({"params": params}, image, method="embed_image")[0]


# --- What is checked on the host ---


def batch_of(rows) -> dict:
    """Preprocessed rows, as an eval pp makes them one by one, stacked into a batch for `generate`."""
    keys = ("image", *_KEYS, "image_at")
    return {k: np.stack([np.asarray(row[k]) for row in rows]) for k in keys if k in rows[0]}


def bucket(longest, limit):
    """The length that text is cut to: 16, 32, 64, … or `limit`, the first not below `longest`."""
    size = MIN_BUCKET
    while size < longest:
        size *= 2
    return min(size, limit)


def _check_whole(limit, **values):
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not limit <= value < 2**32:
            raise ValueError(f"{name} is {value!r}; expected a whole number, {limit} or more.")


def _check_sampling(temperature, top_p):
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(f"temperature is {temperature!r}; expected a number, 0 or more.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p!r}; expected a number above 0 and up to 1.")


def _check_batch(batch, model):
    """(the arrays that the model reads, the length to cut text to), or ValueError.

    Tokens are looked at on the host: a prompt that isn't left-aligned, or of another tokenizer,
    would give fluent nonsense.
    """
    seen = "zimg" if "zimg" in batch else "image"
    if missing := [k for k in (seen, *_KEYS) if k not in batch]:
        raise ValueError(
            f"the batch has no {', '.join(map(repr, missing))}, found {sorted(batch)}; "
            "the eval pp must keep() image, text, mask_ar and mask_input."
        )
    image, text = batch[seen], batch["text"]
    shape = {"image": "[B, height, width, 3]", "zimg": "[B, Q, D]"}[seen]
    if text.ndim != 2 or image.ndim != shape.count(",") + 1 or image.shape[0] != text.shape[0]:
        raise ValueError(f"text has shape {text.shape} and {seen} {image.shape}; expected [B, T] and {shape}.")
    for key in ("mask_ar", "mask_input"):
        if batch[key].shape != text.shape:
            raise ValueError(f"{key} has shape {batch[key].shape}, but text {text.shape}.")
    for key in ("_mask", "row_id", "image_at"):
        if batch.get(key) is not None and batch[key].shape != text.shape[:1]:
            raise ValueError(f"{key} has shape {batch[key].shape}; expected ({text.shape[0]},).")

    # Every process looks at all rows: should one alone give up, the others would wait for it.
    text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
    mask = _as_bool(mask)
    if np.any(bad := (~mask[:, :-1] & mask[:, 1:]).any(axis=1)):
        raise ValueError(
            f"mask_input of row {bad.argmax()} has a 1 after a 0; expected the prompt first, padding after it."
        )
    _check_tokens(text[mask], model, "text")
    arrays = {k: batch[k] for k in (seen, *_KEYS)}
    if batch.get("image_at") is not None:
        image_at, longest = distributed.to_host(batch["image_at"]), mask.sum(axis=1)
        for row in np.flatnonzero((image_at < 0) | (image_at > longest))[:1]:
            raise ValueError(
                f"image_at of row {row} is {image_at[row]}; expected 0 to {longest[row]}, the length of its prompt."
            )
        arrays["image_at"] = batch["image_at"].astype(np.int32)
    valid = batch.get("_mask")
    arrays["skip"] = np.zeros(text.shape[0], bool) if valid is None else ~_as_bool(valid)
    return arrays, bucket(mask.sum(axis=1).max(initial=0), text.shape[1])


def _check_tokens(tokens, model, what):
    known = model.vocab_size
    if np.any(unknown := (tokens < 0) | (tokens >= known)):
        raise ValueError(
            f"{what} holds token {tokens[unknown][0]}, but the model's vocabulary has {known}: "
            "the tokenizer is not the model's."
        )


def _as_bool(mask):
    return mask.astype(bool)


# --- What is compiled ---


def _read_prompts(model, params, batch, *, text_len, new, copies):
    """Reads the prompts; a part of the jitted functions below.

    Returns:
      (variables with the prefix cache, cache of `new` positions for each of B·copies rows,
      float32[B, V] logits after the prompts).
    """
    variables = {"params": params}
    text, mask_ar, mask_input = (batch[k][:, :text_len] for k in _KEYS)
    mask_input = _as_bool(mask_input)
    text = jnp.where(mask_input, text, PAD_TOKEN).astype(jnp.int32)
    (x, input_mask, mask_ar), _ = model.apply(
        variables,
        batch.get("image"),
        text,
        input_mask=mask_input,
        mask_ar=mask_ar.astype(jnp.int32),
        zimg=batch.get("zimg"),
        image_at=batch.get("image_at"),
        method="embed_image_and_text",
    )
    logits, cache = model.apply(
        variables,
        x,
        input_mask,
        mask_ar,
        # The last token is never read back, but an empty cache would be a case of its own.
        cache_size=x.shape[1] + max(new - 1, 1),
        num_samples=copies,
        method="prefill_cache",
        mutable=["cache", "prefix"],
    )
    # The prefix never changes: kept out of a loop's state, it isn't copied at each step.
    return {**variables, "prefix": cache.pop("prefix")}, cache, logits[:, 0]


def _extend(model, variables, cache, tokens):
    """int32[BR] tokens → (float32[BR, V] logits after them, cache that holds them)."""
    ztxt, _ = model.apply(variables, tokens[:, None], method="embed_text")
    logits, cache = model.apply({**variables, **cache}, ztxt, method="extend_cache", mutable=["cache"])
    return logits[:, 0], cache


@functools.partial(jax.jit, static_argnames=("model", "max_new_tokens", "num_samples", "greedy", "text_len"))
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
    variables, cache, logits = _read_prompts(
        model, params, batch, text_len=text_len, new=max_new_tokens, copies=num_samples
    )
    logits = jnp.repeat(logits, num_samples, axis=0)

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
            z = temper(logits, temperature)
            z = jax.lax.cond(top_k < z.shape[-1], lambda z: most_probable(z, top_k), lambda z: z, z)
            z = jax.lax.cond(top_p < 1, lambda z: nucleus(z, top_p), lambda z: z, z)
            token = jax.vmap(draw)(jax.vmap(jax.random.fold_in, (0, None))(keys, step), z)
        return (
            jnp.where(done, PAD_TOKEN, token).astype(jnp.int32),
            jnp.where(done, 0.0, token_logprobs(logits, token)),
        )

    done = jnp.repeat(batch["skip"], num_samples)
    token, logprob = choose(logits, 0, done)
    tokens = jnp.full((rows, max_new_tokens), PAD_TOKEN, jnp.int32).at[:, 0].set(token)
    logprobs = jnp.zeros((rows, max_new_tokens), jnp.float32).at[:, 0].set(logprob)

    def goes_on(state):
        return (state["step"] < max_new_tokens) & ~jnp.all(state["done"])

    def extend(state):
        step, done = state["step"], state["done"]
        logits, cache = _extend(model, variables, state["cache"], state["tokens"][:, step - 1])
        token, logprob = choose(logits, step, done)
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


_pick = jax.vmap(lambda x, index: x[index])  # x[B, n, …], int[B, m] → [B, m, …]


@functools.partial(jax.jit, static_argnames=("model", "beams", "max_new_tokens", "early_stopping", "text_len"))
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
    variables, cache, logits = _read_prompts(model, params, batch, text_len=text_len, new=max_new_tokens, copies=beams)
    rows, vocab = logits.shape

    def select(state, logits, count):
        """Takes the step to `count` tokens: float32[BK, V] logits → (state, beam that each of the
        next ones goes on from, int[B, K])."""
        logp = jax.nn.log_softmax(logits).reshape(rows, beams, vocab)
        total = (state["score"][..., None] + logp).reshape(rows, -1)
        # At most K of 2K can end here, one for each beam: enough are left to go on with.
        score, place = jax.lax.top_k(total, 2 * beams)
        parent, token = place // vocab, place % vocab
        tokens = _pick(state["tokens"], parent).at[:, :, count - 1].set(token)
        ends = (token == eos_token) | (count == max_new_tokens)

        best = ends & (jnp.arange(2 * beams) < beams) & state["open"][:, None]
        final = jnp.where(best, score / count.astype(jnp.float32) ** length_penalty, -jnp.inf)
        ended_score, place = jax.lax.top_k(jnp.concatenate([state["ended_score"], final], axis=1), beams)
        ended = _pick(jnp.concatenate([state["ended"], tokens], axis=1), place)

        score, place = jax.lax.top_k(jnp.where(ends, -jnp.inf, score), beams)
        judged = count
        if early_stopping == "never":
            judged = jnp.where(length_penalty > 0, max_new_tokens, count)
        hope = score[:, 0] / judged.astype(jnp.float32) ** length_penalty
        still = hope > jnp.min(ended_score, axis=1)  # of fewer than K, the worst is -inf
        if early_stopping is True:
            still = jnp.any(ended_score == -jnp.inf, axis=1)
        return dict(
            score=score,
            tokens=_pick(tokens, place),
            ended_score=ended_score,
            ended=ended,
            open=state["open"] & still,
        ), _pick(parent, place)

    none = jnp.full((rows, beams), -jnp.inf, jnp.float32)
    tokens = jnp.full((rows, beams, max_new_tokens), PAD_TOKEN, jnp.int32)
    # All beams are the bare prompt: but for the first they are left out, or all would be the same.
    state = dict(score=none.at[:, 0].set(0.0), tokens=tokens, ended_score=none, ended=tokens, open=~batch["skip"])
    state, parent = select(state, jnp.repeat(logits, beams, axis=0), jnp.int32(1))

    def goes_on(carry):
        _, _, state, count = carry
        return (count < max_new_tokens) & jnp.any(state["open"])

    def extend(carry):
        cache, parent, state, count = carry
        last = state["tokens"][:, :, count - 1].reshape(-1)
        logits, cache = _extend(model, variables, _follow(cache, parent), last)
        state, parent = select(state, logits, count + 1)
        return cache, parent, state, count + 1

    _, _, state, _ = jax.lax.while_loop(goes_on, extend, (cache, parent, state, jnp.int32(1)))
    skip = batch["skip"][:, None]
    return (
        jnp.where(skip[..., None], PAD_TOKEN, state["ended"]),
        jnp.where(skip, 0.0, state["ended_score"]),
    )


def _follow(cache, parent):
    """The cache whose rows are copies of rows `parent` int[B, K] of each prompt."""

    def pick(path, x):
        if not path[-1].key.endswith("_new"):  # the same for all beams of a prompt
            return x
        return _pick(x.reshape(*parent.shape, *x.shape[1:]), parent).reshape(x.shape)

    return jax.tree_util.tree_map_with_path(pick, cache)


@functools.partial(jax.jit, static_argnames=("model", "text_len"))
def _score_options(model, params, batch, options, lengths, *, text_len):
    """`score_options` without its checks: float32[B, C] sums."""
    rows, count, length = options.shape
    variables, cache, logits = _read_prompts(model, params, batch, text_len=text_len, new=length, copies=count)
    tokens, lengths = options.reshape(-1, length), lengths.reshape(-1)

    def add(sums, logits, step):
        return sums + jnp.where(step < lengths, token_logprobs(logits, tokens[:, step]), 0.0)

    def extend(step, carry):
        cache, sums = carry
        logits, cache = _extend(model, variables, cache, tokens[:, step - 1])
        return cache, add(sums, logits, step)

    sums = add(jnp.zeros(rows * count, jnp.float32), jnp.repeat(logits, count, axis=0), 0)
    _, sums = jax.lax.fori_loop(1, jnp.max(lengths), extend, (cache, sums))
    return jnp.where(batch["skip"][:, None], 0.0, sums.reshape(rows, count))


# --- Distributions ---


def temper(logits, temperature):
    """float32[..., V] over a temperature > 0, shifted so that the largest is 0: however small the
    temperature, nothing overflows."""
    temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
    return (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature


def most_probable(logits, top_k):
    """float32[..., V] with -inf outside of the k largest and their equals."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= _cutoff(logits, jnp.ones_like(logits), top_k), logits, -jnp.inf)


def nucleus(logits, top_p):
    """float32[..., V] with -inf outside of the nucleus, as `generate` defines it."""
    logits = jnp.asarray(logits, jnp.float32)
    return jnp.where(logits >= _cutoff(logits, jax.nn.softmax(logits), top_p), logits, -jnp.inf)


def _cutoff(logits, weights, limit):
    """The least x such that the logits above it weigh less than `limit`, float32[..., 1].

    A token is needed while those before it weigh too little, so it's those from x up that are;
    equals are treated alike. Found by halving the range of floats, which lie in the order of the
    integers that share their bits (below 0, in the reverse order): 32 sums instead of sorting
    257,152 logits.
    """

    def flip(bits):
        return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    order = flip(jax.lax.bitcast_convert_type(logits, jnp.int32))

    def halve(_, bounds):
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # of the two, without overflow
        above = jnp.sum(jnp.where(order > middle, weights, 0.0), axis=-1, keepdims=True)
        return jnp.where(above < limit, low, middle + 1), jnp.where(above < limit, middle, high)

    high = jnp.max(order, axis=-1, keepdims=True)
    low = jnp.full_like(high, flip(jnp.float32(-jnp.inf).view(jnp.int32)))
    _, found = jax.lax.fori_loop(0, 32, halve, (low, high))
    return jax.lax.bitcast_convert_type(flip(found), jnp.float32)


def draw(key, logits):
    """One token of the distribution softmax(float32[V]), int32[].

    The vocabulary is cut into about sqrt(V) groups; first a group is drawn, then a token of it.
    That is the same distribution and needs 2·sqrt(V) random numbers instead of V, whose making
    would take longer than the rest of a step of a model that a CPU can run.
    """
    size = math.isqrt(logits.shape[0] - 1) + 1
    groups = jnp.pad(logits, (0, -logits.shape[0] % size), constant_values=-jnp.inf)
    groups = groups.reshape(-1, size)
    first, second = jax.random.split(key)
    group = jax.random.categorical(first, jax.nn.logsumexp(groups, axis=-1))
    return (group * size + jax.random.categorical(second, groups[group])).astype(jnp.int32)
