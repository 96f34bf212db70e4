"""What all ways of decoding share: checking a batch of prompts, and reading it once into a cache.

Axis letters: B prompts, R samples of a prompt, T text positions, V vocabulary, Q image tokens.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import lean
from paligemma_med.models.vit import MID_GREY
from paligemma_med.parallel import distributed

PAD_TOKEN = 0
MIN_BUCKET = 16  # text tokens
KEYS = ("text", "mask_ar", "mask_input")


@functools.partial(lean.jit, static_argnames="model")
def encode_images(model, params, image) -> jax.Array:
    """float[B, height, width, 3] in [-1, 1] → float[B, Q, D], to be passed as "zimg" instead of "image":
    several questions on one image then cost one pass of the image tower."""
    return model.apply({"params": params}, image, method="embed_image")[0]


def stop_tokens(eos_token) -> np.ndarray:
    """A token's number, or several, as int32[E]."""
    return np.atleast_1d(np.asarray(eos_token, np.int32))


def is_stop(token, stops) -> jax.Array:
    """Which tokens int32[…] are one of int32[E]: bool[…]."""
    return jnp.any(token[..., None] == stops, axis=-1)


def blank_image(shape) -> np.ndarray:
    """float32[shape] of mid-grey: the image of a prompt that is to be answered without one."""
    return np.full(shape, MID_GREY, np.float32)


def batch_of(rows) -> dict:
    """Preprocessed rows, as an eval pp makes them one by one, stacked into a batch for `generate`.

    ValueError without rows.
    """
    if not rows:
        raise ValueError("no rows to make a batch of; expected one at least.")
    keys = ("image", *KEYS, "image_at")
    return {k: np.stack([np.asarray(row[k]) for row in rows]) for k in keys if k in rows[0]}


def bucket(longest, limit) -> int:
    """The length that text is cut to: 16, 32, 64, … or `limit`, the first not below `longest`."""
    size = MIN_BUCKET
    while size < longest:
        size *= 2
    return min(size, limit)


def check_whole(limit, **values) -> None:
    """Raises ValueError unless each is a whole number, `limit` or more."""
    for name, value in values.items():
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or not limit <= value < 2**32:
            raise ValueError(f"{name} is {value!r}; expected a whole number, {limit} or more.")


def check_batch(batch, model) -> tuple[dict, int]:
    """(the arrays that the model reads, the length to cut text to); ValueError for a bad batch.

    Tokens are checked on the host: a prompt that isn't left-aligned, or is from another tokenizer, would
    give fluent nonsense.
    """
    seen = "zimg" if "zimg" in batch else "image"
    if missing := [k for k in (seen, *KEYS) if k not in batch]:
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

    # Every process checks all rows: if only one failed, the others would wait for it.
    text, mask = distributed.to_host((batch["text"], batch["mask_input"]))
    mask = _as_bool(mask)
    if np.any(bad := (~mask[:, :-1] & mask[:, 1:]).any(axis=1)):
        raise ValueError(
            f"mask_input of row {bad.argmax()} has a 1 after a 0; expected the prompt first, padding after it."
        )
    check_tokens(text[mask], model, "text")
    arrays = {k: batch[k] for k in (seen, *KEYS)}
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


def check_tokens(tokens, model, what) -> None:
    """Raises ValueError if the model has no embedding for one of int[…] tokens."""
    known = model.vocab_size
    if np.any(unknown := (tokens < 0) | (tokens >= known)):
        raise ValueError(
            f"{what} holds token {tokens[unknown][0]}, but the model's vocabulary has {known}: "
            "the tokenizer is not the model's."
        )


def _as_bool(mask):
    return mask.astype(bool)


def read_prompts(model, params, batch, *, text_len, new, copies) -> tuple[dict, dict, jax.Array]:
    """Reads the prompts; traced as a part of each jitted way of decoding.

    Returns:
      (variables with the prefix cache, cache of `new` positions for each of B·copies rows,
      float32[B, V] logits after the prompts).
    """
    variables = {"params": params}
    text, mask_ar, mask_input = (batch[k][:, :text_len] for k in KEYS)
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
        # The last token is never read back, but an empty cache would be a special case.
        cache_size=x.shape[1] + max(new - 1, 1),
        num_samples=copies,
        method="prefill_cache",
        mutable=["cache", "prefix"],
    )
    # The prefix never changes: outside the loop's state, it isn't copied at each step.
    return {**variables, "prefix": cache.pop("prefix")}, cache, logits[:, 0]


def next_logits(model, variables, cache, tokens) -> tuple[jax.Array, dict]:
    """int32[BR] tokens → (float32[BR, V] logits after them, cache that holds them)."""
    ztxt, _ = model.apply(variables, tokens[:, None], method="embed_text")
    logits, cache = model.apply({**variables, **cache}, ztxt, method="extend_cache", mutable=["cache"])
    return logits[:, 0], cache
