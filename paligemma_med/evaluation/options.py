"""Multiple choice by likelihood: which of a question's options the model finds most probable.

Nothing is generated and so nothing needs to be read out of an answer: each option is scored as
the continuation of the prompt, tokenized as a training answer would be, EOS included.
"""

import numpy as np

from paligemma_med import decode
from paligemma_med.parallel import distributed


def encode(tokenizer, choices, *, eos=True, rows=None):
    """Options as `decode.score_options` takes them.

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


def score(model, params, batch, choices, tokenizer, *, eos=True):
    """Log-likelihoods of each question's options.

    Args:
      model, params, batch: as for `decode.generate`.
      choices: [question][option] texts, of the batch's first rows.
      tokenizer, eos: as for `encode`.

    Returns:
      (logprobs, lengths), each [question][option]: sums over the option's tokens, and how many
      those are. The model's choice is the largest sum, or the largest mean (sum over length), under
      which long options lose less.
    """
    tokens, mask = encode(tokenizer, choices, eos=eos, rows=batch["text"].shape[0])
    sums, lengths = decode.score_options(model, params, batch, tokens, mask)
    sums = distributed.to_host(sums)
    cut = [len(options) for options in choices]
    return tuple([x[i, :n].tolist() for i, n in enumerate(cut)] for x in (sums, lengths))
