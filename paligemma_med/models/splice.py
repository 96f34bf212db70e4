"""How image tokens and text become one sequence: where each stands, and who sees whom.

Text arrays stay text-only everywhere else. `splice` puts the image's Q tokens before text token
`image_at` of each row, and the `Layout` that it gives translates between positions of the text and
of the whole sequence; nobody else computes them.

What the image's tokens see of one another is the model's `image_ar`:

  "prefix"  they join the block before them: in front of a prompt, image and prompt see each other
            (PaliGemma)
  "block"   they are a block of their own: bidirectional inside, and among causal text nothing else
            changes (Gemma 3)
  "causal"  each opens its own block, as causal text does (LLaMA, BLOOM)

Axis letters: B batch, T text positions, Q image tokens, S = Q + T positions of the whole sequence,
P tokens asked for, D width.
"""

import dataclasses

import jax
import jax.numpy as jnp

IMAGE_AR = ("prefix", "block", "causal")


def make_attn_mask(input_mask, mask_ar) -> jax.Array:
    """Who sees whom.

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of one batch of sequences stand.

    A *slot* is a position of the whole sequence, 0…S − 1; a *token* is one of the text, 0…T − 1.
    Methods work on numpy arrays as well as on traced ones.

    Attributes:
      num_image: Q.
      num_text: T.
      image_at: int32[B], text tokens before the image; None: it stands in front in every row.
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
        """How many queries at the start of every row see the same keys, namely the row's first
        ones: what `split_mask` needs; 0 if that isn't so."""
        return 0 if self.image_ar == "causal" or self.image_at is not None else self.num_image

    def slot(self, token):
        """int[B, P] tokens of the text → int[B, P] slots."""
        if self.image_at is None:
            return token + self.num_image
        return token + self.num_image * (token >= self.image_at[:, None])

    def query(self, token):
        """int[B, P] tokens of the text → int[B, P] the slots that predict them: one before their own.
        That of the first token after the image is the image's last slot, which has seen the image
        and all text before it."""
        return self.slot(token) - 1

    def predicted(self, slot):
        """The reverse of `query`: int[B, P] slots → int[B, P] tokens."""
        if self.image_at is None:
            return slot + 1 - self.num_image
        return slot + 1 - self.num_image * (slot + 1 >= self.image_at[:, None] + self.num_image)

    def image_slots(self):
        """int[B, Q] slots of the image; int[1, Q] where they are the same in all rows."""
        start = 0 if self.image_at is None else self.image_at[:, None]
        return start + jnp.arange(self.num_image)[None]

    def of_image(self, x):
        """float[…, S] of the only row → float[…, Q], its columns at the image."""
        if self.image_at is None:
            return x[..., : self.num_image]
        return jax.lax.dynamic_slice_in_dim(x, self.image_at[0], self.num_image, axis=-1)

    def outputs(self, y, token=None):
        """What predicts the token after each token of the text: float[B, S, D] → float[B, P, D].

        Args:
          y: the language model's outputs.
          token: int[B, P]; by default all T.
        """
        if self.image_at is None:
            y = y[:, self.num_image :]
            return y if token is None else jnp.take_along_axis(y, token[..., None], axis=1)
        token = jnp.arange(self.num_text)[None] if token is None else token
        return jnp.take_along_axis(y, self.query(token + 1)[..., None], axis=1)

    def in_order(self, x):
        """[B, S, …], the image's part and then the text's → [B, S, …] in the order of the slots."""
        if self.image_at is None:
            return x
        at, slot = self.image_at[:, None], jnp.arange(self.length)[None]
        source = jnp.where(slot < at, slot + self.num_image, slot)
        source = jnp.where((slot >= at) & (slot < at + self.num_image), slot - at, source)
        return jnp.take_along_axis(x, source.reshape(*source.shape, *(1,) * (x.ndim - 2)), axis=1)

    def masks(self, input_mask, mask_ar):
        """(bool[B, S], int32[B, S]) from those of the text, input_mask [B, T] and mask_ar [B, T]."""
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
      ztxt: float[B, T, D]. The language model computes in the type of its input, which is its own:
        the image takes the type of the text.
      image_at: int32[B] in 0…T, text tokens before the image; None: the image is in front.
      image_ar: one of IMAGE_AR.

    Returns:
      (float[B, S, D], Layout).
    """
    layout = Layout(zimg.shape[1], ztxt.shape[1], image_at, image_ar)
    return layout.in_order(jnp.concatenate([zimg.astype(ztxt.dtype), ztxt], axis=1)), layout


def split_mask(mask, first) -> tuple[jax.Array, jax.Array]:
    """A mask as fused kernels like it, of sequences whose first queries all see the same keys.

    A kernel that is given a mask reads it for every head, and its backward pass makes a gradient of
    it; one that is given lengths does neither, and skips what lies beyond them. Image tokens in
    front, most of a sequence, all see the same: themselves and perhaps the prompt, whose length
    differs by row.

    Args:
      mask: bool[B, T, S] whose first queries of a row all see the same keys, the first ones.
      first: how many queries those are, 1 or more (`Layout.first`).

    Returns:
      (int32[B] how many keys they see, bool[B, T − first, S] what the other queries see).
    """
    return jnp.sum(mask[:, 0], axis=-1, dtype=jnp.int32), mask[:, first:]
