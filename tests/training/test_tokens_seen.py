"""Tokens trained on: what counts, and that a resumed run goes on counting."""

import numpy as np

from paligemma_med.training import tokens_seen
from tests import tiny


def test_a_batchs_tokens_end_with_the_last_one_that_has_a_loss():
    batch = tiny.batch(rows=8)
    found = tokens_seen.of_batch(batch["mask_loss"])
    # Its texts have no token 0 but padding.
    assert int(found["tokens_seen"]) == np.count_nonzero(batch["text"])
    assert int(found["answer_tokens_seen"]) == batch["mask_loss"].sum()
    none = tokens_seen.of_batch(np.zeros((2, 5), np.int32))  # all of an answer was cut off
    assert [int(x) for x in none.values()] == [0, 0]


def test_counts_go_on_from_where_they_were():
    tokens = tokens_seen.TokensSeen(dict(tokens_seen=2**40, answer_tokens_seen=3))
    for n in (1, 2):
        tokens.add(dict(tokens_seen=np.int32(10 * n), answer_tokens_seen=np.int32(n), loss=0.0))
    assert tokens.read() == tokens.read() == dict(tokens_seen=2**40 + 30, answer_tokens_seen=6)
    unknown = tokens_seen.TokensSeen(None)
    unknown.add({})
    assert unknown.read() is None
