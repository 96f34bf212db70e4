"""Masks of a sequence against their definition."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.models import splice


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_make_attn_mask_equals_its_definition(data):
    length = data.draw(st.integers(1, 7))
    row = st.lists(st.booleans(), min_size=length, max_size=length)
    valid = np.array([data.draw(row), data.draw(row)], bool)
    ar = np.array([data.draw(row), data.draw(row)], np.int32)
    want = np.zeros((2, length, length), bool)
    for b in range(2):
        for query in range(length):
            for key in range(length):
                # A key is hidden if a new block opens after the query, up to the key.
                opens = any(ar[b, i] for i in range(query + 1, key + 1))
                want[b, query, key] = valid[b, query] and valid[b, key] and not opens
    np.testing.assert_array_equal(splice.make_attn_mask(valid, ar), want)
