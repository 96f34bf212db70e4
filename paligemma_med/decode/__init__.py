"""Answers from a model: by sampling or greedy (`generate`), by beam search (`beam_search`), or by how
probable it finds given options (`score_options`); and how probable it finds the true ones (`answer_losses`).

The first three read a prompt once, however many continuations it gets: `prefill_cache` makes one prefix
cache a prompt, and every continuation keeps only the few positions of its own tokens. Loops end as
soon as every row has ended.

Randomness belongs to a row and not to a batch. The noise of a token only depends on (seed, row id, number
of the sample, number of the token), so that an answer can be reproduced alone, in another batch, or with
more samples at once.

Text is cut to the smallest of a few lengths (`bucket`) that holds the batch's longest prompt, so
that little padding is computed and few programs are compiled. Padding is never seen; but sums over
rows of another length may be rounded differently, as they are in a batch of another size. Logits of
the same prompt then differ in their last bits, and so may the token where two candidates tie.
"""

from paligemma_med.decode.beam import beam_search
from paligemma_med.decode.generate import generate
from paligemma_med.decode.losses import answer_losses
from paligemma_med.decode.options import encode_options, score_choices, score_options
from paligemma_med.decode.prompts import PAD_TOKEN, batch_of, blank_image, bucket, encode_images
from paligemma_med.decode.sampling import draw, most_probable, nucleus

__all__ = [
    "PAD_TOKEN",
    "answer_losses",
    "batch_of",
    "beam_search",
    "blank_image",
    "bucket",
    "draw",
    "encode_images",
    "encode_options",
    "generate",
    "most_probable",
    "nucleus",
    "score_choices",
    "score_options",
]
