"""Our ops and tokenizers that big_vision lacks, in TensorFlow.

pp_modules = [..., "paligemma_med"] registers them. Ops that both have stay big_vision's own;
tests/upstream/test_pp.py checks that they agree with ours.

    inception_crop      takes aspect_min and aspect_max too, like ours; a call without them is left to
                        big_vision's own op if that can read it
    brightness, contrast   as ours; big_vision has none
    tokenizer `tiny`    ours
    tokenizer `gemma`   from the file that model= or $PALIGEMMA_TOKENIZER names, .model or .json; without
                        either, big_vision's own, which is read from gs://big_vision

Random numbers are TensorFlow's: the same ranges and distributions as ours, but other draws.
"""

import math
import os
from collections.abc import Callable

import tensorflow as tf
from big_vision.pp import ops_image, ops_text, utils
from big_vision.pp.proj.paligemma import ops as paligemma_ops
from big_vision.pp.registry import Registry

from paligemma_med.pp import tokenizer as own_tokenizer

_TRIES = 10  # to find a crop that fits, before the whole image is taken


def random_box(height, width, area, aspect, place) -> tuple:
    """The first box that fits, of several tries; the whole image if none does.

    Like `paligemma_med.pp.ops_image.inception_crop`: a box of `area` and `aspect` has sides
    sqrt(area / aspect) and sqrt(area * aspect), rounded.

    Args:
      height, width: int32 scalars, the image's.
      area: float32[n], in pixels.
      aspect: float32[n], width over height.
      place: float32[2] in [0, 1): where the box lies in the remaining room (y, x).

    Returns:
      int32 scalars y, x, h, w.
    """
    h = tf.concat([tf.cast(tf.round(tf.sqrt(area / aspect)), tf.int32), [height]], 0)
    w = tf.concat([tf.cast(tf.round(tf.sqrt(area * aspect)), tf.int32), [width]], 0)
    fits = (h > 0) & (h <= height) & (w > 0) & (w <= width)
    first = tf.argmax(tf.cast(fits, tf.int32))
    h, w = h[first], w[first]
    room = tf.cast(tf.stack([height - h, width - w]) + 1, tf.float32)
    y, x = tf.unstack(tf.cast(place * room, tf.int32))
    # Rounding in float32 may reach the end of the range.
    return tf.minimum(y, height - h), tf.minimum(x, width - w), h, w


@Registry.register("preprocess_ops.inception_crop", replace=True)
def get_inception_crop(*args, key=None, inkey=None, outkey=None, **kw) -> Callable:
    """Takes our arguments (size, area_min, area_max, aspect_min, aspect_max, method, antialias) or
    big_vision's, which lack the aspect."""
    keys = dict(inkey=inkey or key or "image", outkey=outkey or key or "image")
    numbers = len(args) > 3 and not isinstance(args[3], str)
    if numbers or {"aspect_min", "aspect_max"} & set(kw):
        return _inception_crop(*args, **keys, **kw)
    return _their_inception_crop(*args, **keys, **kw)


# big_vision's own op, registered by its ops_image.
_their_inception_crop = ops_image.get_inception_crop


@utils.InKeyOutKey()
def _inception_crop(
    size=None,
    area_min=5,
    area_max=100,
    aspect_min=0.75,
    aspect_max=1.33,
    method="bilinear",
    antialias=False,
):
    to_size = ops_image.get_resize(size, method, antialias) if size else None

    def fn(image):
        height, width = tf.shape(image)[0], tf.shape(image)[1]
        share = tf.random.uniform([_TRIES], area_min, area_max) / 100
        area = tf.cast(height * width, tf.float32) * share
        aspect = tf.exp(tf.random.uniform([_TRIES], math.log(aspect_min), math.log(aspect_max)))
        y, x, h, w = random_box(height, width, area, aspect, tf.random.uniform([2]))
        crop = tf.slice(image, [y, x, 0], [h, w, -1])
        crop.set_shape([None, None, image.shape[-1]])
        return crop if to_size is None else to_size({"image": crop})["image"]

    return fn


def shifted(image, change) -> tf.Tensor:
    """Applies `change` to an image of values 0..255 in float32, clips, restores the dtype."""
    out = tf.clip_by_value(change(tf.cast(image, tf.float32)), 0.0, 255.0)
    return tf.cast(tf.round(out) if image.dtype == tf.uint8 else out, image.dtype)


def scaled_from_mean(image, factor) -> tf.Tensor:
    """float32[H, W, C] with each channel's distance from its mean multiplied by `factor`."""
    mean = tf.reduce_mean(image, axis=(0, 1), keepdims=True)
    return (image - mean) * factor + mean


@Registry.register("preprocess_ops.brightness")
@utils.InKeyOutKey()
def get_brightness(max_delta) -> Callable:
    """Adds one random number in ±max_delta * 255 to an image of values 0..255."""

    def fn(image):
        delta = tf.random.uniform([], -max_delta, max_delta) * 255
        return shifted(image, lambda x: x + delta)

    return fn


@Registry.register("preprocess_ops.contrast")
@utils.InKeyOutKey()
def get_contrast(lower, upper) -> Callable:
    """Scales each channel's distance from its mean by a random factor in [lower, upper)."""

    def fn(image):
        factor = tf.random.uniform([], lower, upper)
        return shifted(image, lambda x: scaled_from_mean(x, factor))

    return fn


class Tokenizer(ops_text.SentencepieceTokenizer):
    """One of our tokenizers with big_vision's interface.

    The base class handles lists and tensors of texts; single texts are tokenised by ours.
    """

    def __init__(self, spec):
        self._own = own_tokenizer.get_tokenizer(spec)

    def to_int(self, text, *, bos=False, eos=False) -> list | tuple:
        """Token ids of a text, or of each text of a list."""
        if isinstance(text, str):
            # As big_vision reads them: token sets in any text.
            return self._own.to_int(text, bos=bos, eos=eos, special=self._own.tokensets)
        return type(text)(self.to_int(t, bos=bos, eos=eos) for t in text)

    def to_str(self, tokens, *, stop_at_eos=True) -> str | list[str]:
        """The text of tokens, or of each row of them."""
        if ops_text._iterable(tokens):
            return [self._own.to_str(row, stop_at_eos=stop_at_eos) for row in tokens]
        return self._own.to_str(tokens, stop_at_eos=stop_at_eos)

    def to_piece(self, idx) -> str:
        """The text of one token."""
        return self._own.to_str([idx], stop_at_eos=False)

    @property
    def pad_token(self) -> int:
        return self._own.pad_token

    @property
    def eos_token(self) -> int:
        return self._own.eos_token

    @property
    def bos_token(self) -> int:
        return self._own.bos_token

    @property
    def vocab_size(self) -> int:
        return self._own.vocab_size


@Registry.register("tokenizers.tiny")
def get_tokenizer_tiny(tokensets=()) -> Tokenizer:
    """The tokenizer that ships with paligemma_med."""
    return Tokenizer(f"tiny(tokensets={tuple(tokensets)!r})")


@Registry.register("tokenizers.gemma", replace=True)
def get_tokenizer_gemma(tokensets=(), model=None) -> ops_text.SentencepieceTokenizer:
    """Gemma's tokenizer, from a file if one is named."""
    if model or os.environ.get(own_tokenizer.ENV):
        named = f", model={model!r}" if model else ""
        return Tokenizer(f"gemma(tokensets={tuple(tokensets)!r}{named})")
    return paligemma_ops.get_tokenizer_gemma(tokensets)
