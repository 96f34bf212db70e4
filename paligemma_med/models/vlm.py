"""The composite: image tokens and text, read by a language model as one sequence.

The composite asks the tower for tokens and the decoder for embeddings, and does not reach inside
either. Methods are named as in big_vision/models/proj/paligemma/paligemma.py; PaliGemma is arXiv
2407.07726, PaliGemma 2 arXiv 2412.03555.

Axis letters: B batch, T text positions, S positions of the whole sequence, D width of the language
model, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from paligemma_med.models import decoder, splice, vit
from paligemma_med.models.layers import lora


class Model(nn.Module):
    """The composite.

    Attributes:
      img: image tower's arguments (`vit.Model`); `variant` defaults to "So400m/14".
      llm: language model's arguments (`decoder.Model`); `variant` defaults to "gemma_2b".
      dtype: type of activations in both, unless one of them says otherwise.
      attn_impl: "xla" or "cudnn", likewise.
      lora: adapters, [(regex, dict(rank=…, …)), …] as `lora.as_rules` takes it.
    """

    img: dict | None = None
    llm: dict | None = None
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()

    def __post_init__(self):
        # A model is an argument of jitted functions and must therefore be hashable.
        self.img, self.llm = _frozen(self.img or {}), _frozen(self.llm or {})
        self.lora = lora.as_rules(self.lora)
        super().__post_init__()

    def setup(self):
        both = dict(dtype=self.dtype, attn_impl=self.attn_impl, lora=self.lora)
        self._llm = decoder.Model(**{"variant": "gemma_2b", **both, **self.llm}, name="llm")
        img = {"variant": "So400m/14", "num_classes": self._llm.width, **both, **self.img}
        self._img = vit.Model(**img, name="img")

    def embed_image(self, image, train=False, capture_attention=False):
        """float[B, height, width, 3] in [-1, 1] → (float[B, tokens, D] unscaled, out-dict)."""
        zimg, out = self._img(image, train=train, capture_attention=capture_attention)
        return zimg, {"img/zimg": zimg, **{f"img/{k}": v for k, v in out.items()}}

    def embed_text(self, tokens, train=False):
        """int32[B, T] → (float[B, T, D] scaled by sqrt(D), out-dict)."""
        ztxt = self._llm.embed_tokens(tokens)
        return ztxt, {"llm/ztxt": ztxt}

    def embed_image_and_text(
        self,
        image,
        text,
        *,
        input_mask=None,
        mask_ar=None,
        zimg=None,
        train=False,
        capture_attention=False,
    ):
        """Image tokens followed by text, as one embedded sequence.

        Args:
          image: float[B, height, width, 3] in [-1, 1].
          text: int32[B, T].
          input_mask: bool[B, T], False on padding; by default all text is valid.
          mask_ar: int32[B, T] as in `splice.make_attn_mask`; by default all text is causal.
          zimg: float[B, tokens, D] from `embed_image`, in place of `image`.
          train: switches dropout on.

        Returns:
          ((x float[B, S, D], input_mask bool[B, S], mask_ar int32[B, S]), out-dict).
        """
        out_img = {}
        if zimg is None:
            zimg, out_img = self.embed_image(image, train, capture_attention)
        ztxt, out_txt = self.embed_text(text, train)
        if input_mask is None:
            input_mask = jnp.ones(text.shape, bool)
        if mask_ar is None:
            mask_ar = jnp.ones(text.shape, jnp.int32)
        # The language model computes in the type of its input, which is therefore its own.
        x = jnp.concatenate([zimg.astype(ztxt.dtype), ztxt], axis=1)
        before = ((0, 0), (zimg.shape[1], 0))
        input_mask = jnp.pad(input_mask.astype(bool), before, constant_values=True)
        mask_ar = jnp.pad(mask_ar.astype(jnp.int32), before)
        return (x, input_mask, mask_ar), {**out_img, **out_txt}

    def __call__(
        self,
        image,
        text,
        mask_ar,
        train=False,
        *,
        logit_positions=None,
        pre_logits=False,
        capture_attention=False,
    ):
        """Logits for text given the image and the text before.

        Args:
          image: float[B, height, width, 3] in [-1, 1].
          text: int32[B, T].
          mask_ar: int32[B, T], 0 on the prompt (bidirectional), 1 on the answer (causal).
          train: switches dropout on (needs a "dropout" rng).
          logit_positions: int32[B, P] text positions to compute logits at; by default all. Only
            the supervised ones are needed in training, and T × V floats are a step's largest array.
          pre_logits: give float[B, T or P, D], of which `compute_logits` makes logits, in their
            place: for a loss that wants few of them at a time.
          capture_attention: add "img/attn" float32[layers, B, heads, patches, patches] and
            "llm/attn" float32[layers, B, heads, S, S] to the out-dict. A fold (see `layers.capture`)
            adds (last state, stacked outs) instead; a pair is for the image tower and the language
            model, each of them False, True or a fold.

        Returns:
          (float32[B, T or P, V] logits, out-dict). Logits at t predict the token at t + 1.

        To differentiate by the probabilities, give `apply` the collection of `perturbations`.
        """
        of_img, of_llm = (
            capture_attention if isinstance(capture_attention, tuple) else (capture_attention, capture_attention)
        )
        (x, input_mask, mask_ar), out = self.embed_image_and_text(
            image, text, mask_ar=mask_ar, train=train, capture_attention=of_img
        )
        out["attn_mask"] = mask = splice.make_attn_mask(input_mask, mask_ar)
        if self._llm.attn_impl == "cudnn":
            mask = splice.split_mask(mask, x.shape[1] - text.shape[1])
        y, probs = self._llm(x, mask, train=train, capture_attention=of_llm)
        out["llm/pre_logits"] = y
        if of_llm is not False:
            out["llm/attn"] = probs
        of_text = y[:, x.shape[1] - text.shape[1] :]
        if logit_positions is not None:
            of_text = jnp.take_along_axis(of_text, logit_positions[..., None], axis=1)
        return (of_text if pre_logits else self._llm.compute_logits(of_text)), out

    def compute_logits(self, pre_logits):
        """float[B, P, D] of the call with `pre_logits` → float32[B, P, V]."""
        return self._llm.compute_logits(pre_logits)

    def prefill_cache(self, x, input_mask, mask_ar, *, cache_size, num_samples=1):
        """Reads prompts from `embed_image_and_text`; see `decoder._Model.prefill_cache`."""
        mask = splice.make_attn_mask(input_mask, mask_ar)
        return self._llm.prefill_cache(x, input_mask, mask, cache_size=cache_size, num_samples=num_samples)

    def extend_cache(self, x):
        """One step for every sample: float[B·samples, 1, D] → logits float32[B·samples, 1, V]."""
        return self._llm.extend_cache(x)


def _frozen(value):
    if hasattr(value, "items"):
        return FrozenDict({k: _frozen(v) for k, v in value.items()})
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value


def perturbations(img=None, llm=None):
    """The collection whose arrays are added to the attention's probabilities of all layers.

    Zeros change nothing; the gradient by them is the gradient by the probabilities:

        model.apply({"params": params, "perturbations": perturbations(llm=zeros)}, …)

    Args:
      img: float32[layers, B, heads, patches, patches], or None for none. Without the axis of heads,
        their gradients come weighted and fused (`capture.weigh`).
      llm: float32[layers, B, heads, S, S], likewise, or None.
    """
    out = {}
    if img is not None:
        attn = {"MultiHeadDotProductAttention_0": {"probs": img}}
        out["img"] = {"Transformer": {"encoderblock": attn}}
    if llm is not None:
        out["llm"] = {"layers": {"attn": {"probs": llm}}}
    return out


def patch_grid(model, image):
    """(rows, columns) of patches of float[…, height, width, 3]."""
    patch = vit.Model(**{"variant": "So400m/14", **model.img}).patch_size
    return tuple(side // p for side, p in zip(image.shape[-3:-1], patch, strict=True))


def init_params(model, rng, *, image_size):
    """Random parameters in float32: {"img": …, "llm": …} for square images of `image_size` px."""
    image = jnp.zeros((1, image_size, image_size, 3), jnp.float32)
    text = jnp.zeros((1, 2), jnp.int32)
    return model.init(rng, image, text, text)["params"]


def abstract_params(model, *, image_size):
    """The tree of `init_params` as jax.ShapeDtypeStruct; nothing is allocated."""
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0), image_size=image_size))
