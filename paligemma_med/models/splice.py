"""How image tokens and text become one sequence: where each token is, and which tokens see which.

Everywhere else, text arrays contain only text. `splice` puts the image's Q tokens before text token
`image_at` of each row and returns a `Layout`, which translates between positions of the text and of the
whole sequence; no other code computes them.

The model's `image_ar` says how image tokens see each other:

  "prefix"  they join the block before them: in front of a prompt, image and prompt see each other
            (PaliGemma)
  "block"   they are a separate block, bidirectional inside; causal text around it isn't changed (Gemma 3)
  "causal"  each opens its own block, as causal text does (LLaMA, BLOOM)

Axis letters: B batch, T text positions, Q image tokens, S = Q + T positions of the whole sequence,
P requested tokens, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp

IMAGE_AR = ("prefix", "block", "causal")


def make_attn_mask(input_mask, mask_ar) -> jax.Array:
    """Which tokens see which.

    Tokens fall into blocks: one with mask_ar = 1 opens a new block, one with 0 joins the block
    before it. A query sees its own block and all earlier ones, so that a run of zeros is
    bidirectional and a run of ones is causal.

    Args:
      input_mask: bool[B, S], False on padding, which no token sees and which sees no token.
      mask_ar: int32[B, S].

    Returns:
      bool[B, S, S], rows are queries.
    """
    block = jnp.cumsum(mask_ar, axis=1)
    visible = block[:, None, :] <= block[:, :, None]
    return visible & input_mask[:, None, :] & input_mask[:, :, None]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of one batch of sequences are.

    A *slot* is a position in the whole sequence, 0…S − 1; a *token* is a position in the text, 0…T − 1.
    Methods work on numpy arrays and on traced ones.

    Attributes:
      num_image: Q.
      num_text: T.
      image_at: int32[B], text tokens before the image; None: it is in front in every row.
      image_ar: one of IMAGE_AR.
    """

    num_image: int
    num_text: int
    image_at: jax.Array | None = None
    image_ar: str = "prefix"

    @property
    def length(self) -> int:
        """S."""
        return self.num_image + self.num_text

    @property
    def first(self) -> int:
        """How many queries at the start of every row see the same keys, namely the row's first ones, as
        `split_mask` requires; 0 if there are none."""
        return 0 if self.image_ar == "causal" or self.image_at is not None else self.num_image

    def slot(self, token) -> jax.Array:
        """int[B, P] tokens of the text → int[B, P] slots."""
        if self.image_at is None:
            return token + self.num_image
        return token + self.num_image * (token >= self.image_at[:, None])

    def query(self, token) -> jax.Array:
        """int[B, P] tokens of the text → int[B, P] the slots that predict them: one before their own. The
        first token after the image is predicted by the image's last slot, which has seen the image and all
        text before it."""
        return self.slot(token) - 1

    def predicted(self, slot) -> jax.Array:
        """The reverse of `query`: int[B, P] slots → int[B, P] tokens."""
        if self.image_at is None:
            return slot + 1 - self.num_image
        return slot + 1 - self.num_image * (slot + 1 >= self.image_at[:, None] + self.num_image)

    def image_slots(self) -> jax.Array:
        """int[B, Q] slots of the image; int[1, Q] if they are the same in all rows."""
        start = 0 if self.image_at is None else self.image_at[:, None]
        return start + jnp.arange(self.num_image)[None]

    def of_image(self, x) -> jax.Array:
        """float[…, S] for the only row → float[…, Q], the image's columns."""
        if self.image_at is None:
            return x[..., : self.num_image]
        return jax.lax.dynamic_slice_in_dim(x, self.image_at[0], self.num_image, axis=-1)

    def outputs(self, y, token=None) -> jax.Array:
        """The outputs that predict the token after each token of the text: float[B, S, D] → float[B, P, D].

        Args:
          y: the language model's outputs.
          token: int[B, P]; by default all T.
        """
        if self.image_at is None:
            y = y[:, self.num_image :]
            return y if token is None else jnp.take_along_axis(y, token[..., None], axis=1)
        token = jnp.arange(self.num_text)[None] if token is None else token
        return jnp.take_along_axis(y, self.query(token + 1)[..., None], axis=1)

    def in_order(self, x) -> jax.Array:
        """[B, S, …] with the image's part before the text's → [B, S, …] in the order of the slots."""
        if self.image_at is None:
            return x
        at, slot = self.image_at[:, None], jnp.arange(self.length)[None]
        source = jnp.where(slot < at, slot + self.num_image, slot)
        source = jnp.where((slot >= at) & (slot < at + self.num_image), slot - at, source)
        return jnp.take_along_axis(x, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), axis=1)

    def masks(self, input_mask, mask_ar) -> tuple[jax.Array, jax.Array]:
        """(bool[B, S], int32[B, S]) from the text's input_mask [B, T] and mask_ar [B, T]."""
        before = ((0, 0), (self.num_image, 0))
        input_mask = jnp.pad(input_mask.astype(bool), before, constant_values=True)
        mask_ar = jnp.pad(mask_ar.astype(jnp.int32), before, constant_values=int(self.image_ar == "causal"))
        if self.image_ar == "block":
            mask_ar = mask_ar.at[:, 0].set(1)
        return self.in_order(input_mask), self.in_order(mask_ar)


def splice(zimg, ztxt, *, image_at=None, image_ar="prefix") -> tuple[jax.Array, Layout]:
    """Image tokens and embedded text as one sequence.

    Args:
      zimg: float[B, Q, D].
      ztxt: float[B, T, D]. The image is cast to the text's type, since the language model computes in the
        type of its input.
      image_at: int32[B] in 0…T, text tokens before the image; None: the image is in front.
      image_ar: one of IMAGE_AR.

    Returns:
      (float[B, S, D], Layout).
    """
    layout = Layout(zimg.shape[1], ztxt.shape[1], image_at, image_ar)
    return layout.in_order(jnp.concatenate([zimg.astype(ztxt.dtype), ztxt], axis=1)), layout


def split_mask(mask, first) -> tuple[jax.Array, jax.Array]:
    """A mask in a form that is fast for fused kernels, if the first queries all see the same keys.

    With a mask, a kernel reads it for every head, and its backward pass computes the mask's gradient; with
    lengths it does neither, and skips what lies beyond them. Image tokens in front, most of a sequence, all
    see the same keys: themselves and perhaps the prompt, whose length differs by row.

    Args:
      mask: bool[B, T, S] whose first queries of a row all see the same keys, the first ones.
      first: how many queries those are, 1 or more (`Layout.first`).

    Returns:
      (int32[B] how many keys they see, bool[B, T − first, S] what the other queries see).
    """
    return jnp.sum(mask[:, 0], axis=-1, dtype=jnp.int32), mask[:, first:]
