"""Options by likelihood: how probable the model finds given continuations of a prompt.

Nothing is generated, so no answer has to be parsed: each option of a multiple-choice question is scored as
the continuation of the prompt, tokenized like a training answer, EOS included.

Axis letters: B prompts, C options of a prompt, M tokens of an option, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.decode.prompts import PAD_TOKEN, check_batch, check_tokens, next_logits, read_prompts
from paligemma_med.models import lean
from paligemma_med.models.loss import token_logprobs
from paligemma_med.parallel import distributed


def encode_options(tokenizer, choices, *, eos=True, rows=None) -> tuple[np.ndarray, np.ndarray]:
    """Options in the form that `score_options` takes.

    Args:
      tokenizer: of the model.
      choices: [question][option] texts; numbers of options may differ.
      eos: whether an option ends with EOS. Without, options that begin alike ("lung", "lung base")
        are compared by their beginnings alone.
      rows: B, if more than the questions: the size of a batch whose last rows are empty.

    Returns:
      (tokens int32[B, C, M], mask bool[B, C, M]). C is the largest number of options, M the
      smallest of 4, 8, 16, … that holds the longest: few shapes, and so few programs to compile.

    Raises:
      ValueError: a question without options, an option without tokens.
    """
    ids = [[tokenizer.to_int(text, eos=eos) for text in options] for options in choices]
    for row, options in enumerate(ids):
        if not options or not all(options):
            raise ValueError(f"row {row} has the options {choices[row]}; expected texts.")
    longest = max(len(tokens) for options in ids for tokens in options)
    shape = (rows or len(ids), max(map(len, ids)), 1 << max(2, (longest - 1).bit_length()))
    tokens, mask = np.zeros(shape, np.int32), np.zeros(shape, bool)
    for i, options in enumerate(ids):
        for j, option in enumerate(options):
            tokens[i, j, : len(option)], mask[i, j, : len(option)] = option, True
    return tokens, mask


def score_choices(model, params, batch, choices, tokenizer, *, eos=True) -> tuple[list[list[float]], list[list[int]]]:
    """Log-likelihoods of each question's options.

    Args:
      model, params, batch: as for `decode.generate`.
      choices: a list of texts for each of the batch's first rows.
      tokenizer, eos: as for `encode_options`.

    Returns:
      (logprobs, lengths), both lists like `choices`: sums over an option's tokens, and how many
      tokens it has. The model's choice is the largest sum, or the largest mean (sum over length), under
      which long options lose less.
    """
    tokens, mask = encode_options(tokenizer, choices, eos=eos, rows=batch["text"].shape[0])
    sums, lengths = score_options(model, params, batch, tokens, mask)
    sums = distributed.to_host(sums)
    cut = [len(options) for options in choices]
    return tuple([x[i, :n].tolist() for i, n in enumerate(cut)] for x in (sums, lengths))


def score_options(model, params, batch, options, mask) -> tuple[jax.Array, np.ndarray]:
    """Log-likelihood of given continuations: log p(option | image, prompt).

    The prompt is read once for all of its options. Processes: as `generate`; `options` and `mask`
    are then the same in all of them. It compiles once for each shape, so pad C and M to few sizes
    (`encode_options` does); the padding of M costs nothing.

    Args:
      model, params, batch: as for `generate`; row_id has no effect.
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
    check_tokens(options[mask], model, "options")
    arrays, text_len = check_batch(batch, model)
    lengths = mask.sum(axis=-1).astype(np.int32)
    options = np.where(mask, options, PAD_TOKEN).astype(np.int32)
    return _score_options(model, params, arrays, options, lengths, text_len=text_len), lengths


def lower(model, params, arrays, count, length, *, text_len) -> jax.stages.Lowered:
    """The program that `score_options` runs for `count` options of `length` tokens each, from shapes alone; arrays as
    of `generate.lower`."""
    rows = arrays["text"].shape[0]
    options, lengths = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((rows, count, length), (rows, count)))
    return _score_options.lower(model, params, arrays, options, lengths, text_len=text_len)


@functools.partial(lean.jit, static_argnames=("model", "text_len"))
def _score_options(model, params, batch, options, lengths, *, text_len):
    """`score_options` without its checks: float32[B, C] sums."""
    rows, count, length = options.shape
    variables, cache, logits = read_prompts(model, params, batch, text_len=text_len, new=length, copies=count)
    tokens, lengths = options.reshape(-1, length), lengths.reshape(-1)

    def add(sums, logits, step):
        return sums + jnp.where(step < lengths, token_logprobs(logits, tokens[:, step]), 0.0)

    def extend(step, carry):
        cache, sums = carry
        logits, cache = next_logits(model, variables, cache, tokens[:, step - 1])
        return cache, add(sums, logits, step)

    sums = add(jnp.zeros(rows * count, jnp.float32), jnp.repeat(logits, count, axis=0), 0)
    _, sums = jax.lax.fori_loop(1, jnp.max(lengths), extend, (cache, sums))
    return jnp.where(batch["skip"][:, None], 0.0, sums.reshape(rows, count))
