"""How image tokens and text become one sequence, and who sees whom in it.

Axis letters: B batch, T query positions, S key positions of the whole sequence.
"""

import jax.numpy as jnp


def make_attn_mask(input_mask, mask_ar):
    """Who sees whom in a prefix-LM sequence.

    Tokens fall into blocks: one with mask_ar = 1 opens a new block, one with 0 joins the block
    before it. A query sees its own block and all earlier ones, so that a run of zeros is
    bidirectional and a run of ones is causal.

    Args:
      input_mask: bool[B, S], False on padding, which nobody sees and which sees nobody.
      mask_ar: int32[B, S].

    Returns:
      bool[B, S, S], rows are queries.
    """
    block = jnp.cumsum(mask_ar, axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & input_mask[:, None, :] & input_mask[:, :, None]


def split_mask(mask, first):
    """The mask of a prefix-LM sequence as fused kernels like it.

    A kernel that is given a mask reads it for every head, and its backward pass makes a gradient of
    it; one that is given lengths does neither, and skips what lies beyond them. Image tokens, most
    of a sequence, all see the same: themselves and the prompt, whose length differs by row.

    Args:
      mask: bool[B, T, S] whose first queries of a row all see the same keys, the first ones.
      first: how many queries those are, 1 or more.

    Returns:
      (int32[B] how many keys they see, bool[B, T − first, S] what the other queries see).
    """
    return jnp.sum(mask[:, 0], axis=-1, dtype=jnp.int32), mask[:, first:]
