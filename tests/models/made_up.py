"""Two families of parts that nobody has: other names, other shapes, other kinds of layers.

The tower mixes patches without attention; the decoder has one kernel for queries, keys and values,
with its projections on an axis in the middle. Both have a table of leaves, and nothing else of the
project knows them.
"""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from paligemma_med.models import leaves
from paligemma_med.models.layers import attention, capture, lora, quantised, stack
from paligemma_med.models.leaves import Leaf

NAMES = dict(img_model="mixer", llm_model="tests.scribe")


class _Mix(nn.Module):
    """Each patch reads the mean of all: tanh between two kernels, around which the patch goes."""

    inner: int
    lora: tuple
    deterministic: bool
    dtype: str

    @nn.compact
    def __call__(self, x, _):
        kw = dict(lora=self.lora, deterministic=self.deterministic, dtype=self.dtype)
        y = x + jnp.mean(x, axis=1, keepdims=True)
        y = nn.tanh(lora.Dense(self.inner, name="wide", **kw)(y))
        return x + lora.Dense(x.shape[-1], name="narrow", **kw)(y), None


class Tower(nn.Module):
    """See `Mixer`."""

    num_classes: int | None = None
    size: int = 12
    inner: int = 20
    depth: int = 3
    side: int = 8
    remat_policy: str = "none"
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()

    num_heads = 1
    probs_path = ""
    class_tokens = (0, 0)

    @property
    def leaves(self):
        return leaves.of_module(Mixer.LEAVES, self)

    def grid(self, height, width):
        return height // self.side, width // self.side

    @nn.compact
    def __call__(self, image, *, train=False, capture_attention=False):
        b, h, w = len(image), *self.grid(*image.shape[1:3])
        cut = image.reshape(b, h, self.side, w, self.side, 3).swapaxes(2, 3).reshape(b, h * w, -1)
        kernel = self.param("pixels", nn.initializers.lecun_normal(), (self.side**2 * 3, self.size))
        x = cut.astype(self.dtype) @ kernel.astype(self.dtype)
        block = stack.repeat(_Mix, self.depth, True, self.remat_policy)
        x, _ = block(self.inner, self.lora, not train, self.dtype, name="mixes")(x, None)
        if self.num_classes:
            x = lora.Dense(self.num_classes, name="bridge", dtype=self.dtype, lora=self.lora)(x)
        return x, {}


class Mixer:
    """The tower's family."""

    LEAVES = (
        Leaf("pixels", "CD", "C", role="patch"),
        *(
            leaf
            for name, letters in (("wide", "DF"), ("narrow", "FD"))
            for leaf in (
                Leaf(f"mixes/{name}/kernel", letters, letters[0], stacked=True),
                Leaf(f"mixes/{name}/bias", letters[1], stacked=True, role="bias"),
            )
        ),
        Leaf("bridge/kernel", "DE", "D", when="num_classes"),
        Leaf("bridge/bias", "E", role="bias", when="num_classes"),
    )
    KEYS = frozenset({"size", "inner", "depth", "side", "dtype", "attn_impl", "remat_policy"})
    DEFAULT_VARIANT = None
    Model = Tower


class Pair(nn.Module):
    """A connector: two neighbouring patches become one image token."""

    width: int
    dtype: str = "float32"
    lora: tuple = ()

    LEAVES = (Leaf("both/kernel", "DE", "D"), Leaf("both/bias", "E", role="bias"))
    READ_TOWER = ()
    leaves = LEAVES

    @staticmethod
    def tokens(kw, patches):
        return patches // 2

    @nn.compact
    def __call__(self, x, *, train=False, capture_attention=False):
        x = x.reshape(len(x), x.shape[1] // 2, -1)
        return lora.Dense(self.width, name="both", dtype=self.dtype, lora=self.lora)(x), {}


class _Line(nn.Module):
    """Attention with three projections in one kernel, then a kernel of its own width."""

    heads: int
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, carry, mask):
        (x, state), d, n = carry, carry[0].shape[-1], self.heads
        h = 6
        kw = dict(lora=self.lora, deterministic=self.deterministic, dtype=x.dtype.name)
        qkv = lora.Dense((n, 3, h), name="read", **kw)(_Gain(name="gain")(x))
        perturb = capture.perturbation(self)
        y, probs = attention.attend(
            *(qkv[:, :, :, i] for i in range(3)), mask, scale=h**-0.5, capture=True, perturb=perturb
        )
        x = x + lora.Dense(d, inputs=2, name="join", **kw)(y)
        w = quantised.param(self, "press", nn.initializers.lecun_normal(), (d, d))
        y = quantised.product(lambda x, w: nn.tanh(x @ w), x, w)
        return (x + lora.add(self, y, x, "press", "whole"), state), probs


class _Gain(nn.Module):
    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones_init(), (x.shape[-1],))
        return x * gain.astype(x.dtype)


class Decoder(nn.Module):
    """See `Scribe`."""

    width: int = 16
    depth: int = 2
    num_heads: int = 4
    vocab_size: int = 1024
    remat_policy: str = "none"
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()

    probs_path = "lines/probs"

    @property
    def leaves(self):
        return leaves.of_module(Scribe.LEAVES, self)

    def setup(self):
        self.table = quantised.param(self, "words", nn.initializers.normal(0.5), (self.vocab_size, self.width))
        self.last = _Gain()

    def embed_tokens(self, tokens):
        return quantised.rows(self.table, tokens, self.dtype)

    def compute_logits(self, pre_logits):
        return quantised.logits(pre_logits, self.table)

    @nn.compact
    def __call__(self, x, mask, *, train=False, capture_attention=False):
        block = stack.repeat(_Line, self.depth, True, self.remat_policy)
        (x, _), probs = block(self.num_heads, self.lora, not train, name="lines")((x, None), mask)
        return self.last(x), probs


class Scribe:
    """The decoder's family."""

    LEAVES = (
        Leaf("words", "VD", "D", role="table"),
        Leaf("lines/gain/gain", "D", stacked=True, role="norm"),
        Leaf("lines/read/kernel", "DN3H", "D", stacked=True),
        Leaf("lines/read/bias", "N3H", stacked=True, role="bias"),
        Leaf("lines/join/kernel", "NHD", "NH", stacked=True),
        Leaf("lines/join/bias", "D", stacked=True, role="bias"),
        Leaf("lines/press", "DZ", "D", parts=("whole",), stacked=True),
        Leaf("last/gain", "D", role="norm"),
    )
    KEYS = frozenset(f.name for f in dataclasses.fields(Decoder)) - {"parent", "name", "lora"}
    DEFAULT_VARIANT = None
    Model = Decoder
