"""The image tower: a vision transformer, with big_vision's parameter names. By default it is SigLIP's.

Shapes and names follow big_vision/models/vit.py (see docs/ for the contract): layers are stacked on
a leading axis under `Transformer/encoderblock`, and the linear projection into the language model is the
tower's own `head`. There is no pooling: every patch is a token.

Arguments make it the tower of CLIP models (BiomedCLIP) or of EVA-CLIP: a class token in front, which takes part and is
dropped at the end or kept; exact or quick GELU; keys or patches without bias; another eps; a norm before the layers; no
final norm. `stem` puts convolutions before the patches ("Early Convolutions Help Transformers See Better", arXiv
2106.14881, in small): two of 3 × 3 with stride 2, each with a norm over channels and GELU. A patch is then read from a
quarter as many rows and columns of features; patch grid and tokens are the same. Whatever mean and deviation a tower
wants its pixels to have, images come in [-1, 1]: the tower itself normalises, so that everybody else has one
convention.

Axis letters: B batch, T tokens (patches, row by row), D width, N heads, H width of a head.
"""

import dataclasses
import functools
import re
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from paligemma_med.models import leaves, presets
from paligemma_med.models.layers import attention, lora, stack
from paligemma_med.models.layers.activations import constrain
from paligemma_med.models.layers.capture import end_folds, fold_layer, perturbation, start_fold

_SIZES = ("width", "depth", "mlp_dim", "num_heads")
# In that order: "Scaling Vision Transformers" (arXiv 2106.04560), table 2, and
# So400m from arXiv 2305.13035.
VARIANTS = {
    "mu": (32, 1, 128, 2),
    "Ti": (192, 12, 768, 3),
    "S": (384, 12, 1536, 6),
    "M": (512, 12, 2048, 8),
    "B": (768, 12, 3072, 12),
    "L": (1024, 24, 4096, 16),
    "So400m": (1152, 27, 4304, 16),
    "H": (1280, 32, 5120, 16),
    "g": (1408, 40, 6144, 16),
}
# Mean and standard deviation of pixels in [0, 1] that CLIP models were trained with (OpenAI's CLIP, clip.py).
_CLIP = dict(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711))
# What else towers have: BiomedCLIP (arXiv 2303.00915; open_clip_config.json of its release) and EVA's ViT-g as BLIP-2
# has it (arXiv 2211.07636; LAVIS, models/eva_vit.py, and its `ln_vision` as the final norm), one layer short.
TOWERS = {
    "biomedclip_b": dict(zip(_SIZES, VARIANTS["B"], strict=True), cls=True, gelu="exact", **_CLIP),
    "eva_g": dict(
        zip(_SIZES, (1408, 39, 6144, 16), strict=True), cls=True, gelu="exact", key_bias=False, final_norm=1e-5, **_CLIP
    ),
}
DEFAULT_VARIANT = presets.DEFAULT["img"]["variant"]
GELUS = {
    "tanh": nn.gelu,
    "exact": functools.partial(nn.gelu, approximate=False),
    "quick": lambda x: x * nn.sigmoid(1.702 * x),  # OpenAI's CLIP
}
# Pixels are in [-1, 1] for every tower; this is the middle, which stands in for a missing image.
MID_GREY = 0.0
STEM = 2  # convolutions of a stem


def _leaves():
    """All parameters that a tower can have, in the order of the computation."""
    for i in range(STEM):
        yield leaves.Leaf(f"stem_{i}/kernel", "YXCS", "YXC", role="stem", when="stem")
        yield leaves.Leaf(f"stem_{i}/bias", "S", role="bias", when="stem")
        yield leaves.Leaf(f"stem_norm_{i}/scale", "S", role="norm", when="stem")
        yield leaves.Leaf(f"stem_norm_{i}/bias", "S", role="bias", when="stem")
    yield leaves.Leaf("embedding/kernel", "YXCD", "YXC", role="patch")
    yield leaves.Leaf("embedding/bias", "D", role="bias", when="patch_bias")
    yield leaves.Leaf("cls", "11D", role="bias", when="cls")
    yield leaves.Leaf("pos_embedding", "1TD", role="positions")
    yield from _norm("pre_norm", when="pre_norm")
    block = "Transformer/encoderblock"
    yield from _norm(f"{block}/LayerNorm_0", stacked=True)
    for name, letters, inputs in (
        ("MultiHeadDotProductAttention_0/query", "DNH", "D"),
        ("MultiHeadDotProductAttention_0/key", "DNH", "D"),
        ("MultiHeadDotProductAttention_0/value", "DNH", "D"),
        ("MultiHeadDotProductAttention_0/out", "NHD", "NH"),
    ):
        bias = "key_bias" if name.endswith("key") else ""
        yield from _dense(f"{block}/{name}", letters, inputs, stacked=True, bias=bias)
    yield from _norm(f"{block}/LayerNorm_1", stacked=True)
    yield from _dense(f"{block}/MlpBlock_0/Dense_0", "DF", "D", stacked=True)
    yield from _dense(f"{block}/MlpBlock_0/Dense_1", "FD", "F", stacked=True)
    yield from _norm("Transformer/encoder_norm", when="final_norm")
    yield from _dense("head", "DE", "D", when="num_classes", bias="num_classes")


def _norm(path, **kw):
    yield leaves.Leaf(f"{path}/scale", "D", role="norm", **kw)
    yield leaves.Leaf(f"{path}/bias", "D", role="bias", **kw)


def _dense(path, letters, inputs, *, stacked=False, when="", bias=""):
    outputs = "".join(c for c in letters if c not in inputs)
    yield leaves.Leaf(f"{path}/kernel", letters, inputs, stacked=stacked, when=when)
    yield leaves.Leaf(f"{path}/bias", outputs, role="bias", stacked=stacked, when=bias)


LEAVES = tuple(_leaves())


def decode_variant(variant: str) -> dict[str, Any]:
    """From "So400m/14" to dict(width=…, depth=…, mlp_dim=…, num_heads=…, patch_size=(14, 14))."""
    name, _, patch = variant.partition("/")
    if name not in (*VARIANTS, *TOWERS) or (patch and not re.fullmatch("[0-9]{1,4}", patch)):
        raise ValueError(
            f"Image variant {variant!r} is unknown; expected NAME or NAME/PATCH with NAME one of "
            f"{sorted((*VARIANTS, *TOWERS))}."
        )
    out = TOWERS[name].copy() if name in TOWERS else dict(zip(_SIZES, VARIANTS[name], strict=True))
    if patch:
        out["patch_size"] = (int(patch), int(patch))
    return out


class MlpBlock(nn.Module):
    """Two dense layers with a GELU between. float[B, T, D] → float[B, T, D]."""

    mlp_dim: int
    gelu: str
    dtype: str
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        kw = dict(
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.normal(stddev=1e-6),
            lora=self.lora,
            deterministic=self.deterministic,
        )
        y = GELUS[self.gelu](lora.Dense(self.mlp_dim, name="Dense_0", **kw)(x))
        y = constrain(y, "act_batch", "act_len", "act_mlp")
        return lora.Dense(x.shape[-1], name="Dense_1", **kw)(y)


class MultiHeadDotProductAttention(nn.Module):
    """Self-attention over all tokens. float[B, T, D] → (float[B, T, D], probabilities or None)."""

    num_heads: int
    key_bias: bool
    dtype: str
    attn_impl: str
    capture: bool | object
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        if width % self.num_heads:
            raise ValueError(f"The image tower's width={width} is no multiple of num_heads={self.num_heads}.")
        head = width // self.num_heads
        kw = dict(
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            lora=self.lora,
            deterministic=self.deterministic,
        )
        q, k, v = (
            constrain(
                lora.Dense((self.num_heads, head), bias=name != "key" or self.key_bias, name=name, **kw)(x),
                "act_batch",
                "act_len",
                "act_heads",
                None,
            )
            for name in ("query", "key", "value")
        )
        y, probs = attention.attend(
            q,
            k,
            v,
            scale=head**-0.5,
            impl=self.attn_impl,
            capture=self.capture is not False,
            perturb=perturbation(self),
        )
        return lora.Dense(width, inputs=2, name="out", **kw)(y), probs


class EncoderBlock(nn.Module):
    """One pre-norm layer. As a scan body: (carry, None) → (carry, probabilities or a fold's out), where the
    carry is (float[B, T, D], a fold's state or None)."""

    mlp_dim: int
    num_heads: int
    gelu: str
    key_bias: bool
    norm_eps: float
    dropout: float
    dtype: str
    attn_impl: str
    capture: bool | object
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, carry, _):
        x, state = carry
        # Submodules have the names that linen gives them in big_vision: LayerNorm_0, MlpBlock_0, …
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        y = nn.LayerNorm(self.norm_eps, dtype=self.dtype)(x)
        y, probs = MultiHeadDotProductAttention(
            self.num_heads, self.key_bias, self.dtype, self.attn_impl, self.capture, self.lora, self.deterministic
        )(y)
        state, probs = fold_layer(self.capture, state, probs)
        x = constrain(x + drop(y), "act_batch", "act_len", "act_emb")
        y = nn.LayerNorm(self.norm_eps, dtype=self.dtype)(x)
        y = MlpBlock(self.mlp_dim, self.gelu, self.dtype, self.lora, self.deterministic)(y)
        return (constrain(x + drop(y), "act_batch", "act_len", "act_emb"), state), probs


class Encoder(nn.Module):
    """The stack of layers and the final norm. float[B, T, D] → (float[B, T, D], probabilities)."""

    depth: int
    mlp_dim: int
    num_heads: int
    gelu: str
    key_bias: bool
    norm_eps: float
    final_norm: float | None
    dropout: float
    scan: bool
    remat_policy: str
    dtype: str
    attn_impl: str
    lora: tuple

    @nn.compact
    def __call__(self, x, *, deterministic, capture):
        block = stack.repeat(EncoderBlock, self.depth, self.scan, self.remat_policy)
        state = start_fold(capture, x.shape[0], self.num_heads, x.shape[1])
        (x, state), probs = block(
            name="encoderblock",
            mlp_dim=self.mlp_dim,
            num_heads=self.num_heads,
            gelu=self.gelu,
            key_bias=self.key_bias,
            norm_eps=self.norm_eps,
            dropout=self.dropout,
            dtype=self.dtype,
            attn_impl=self.attn_impl,
            capture=capture,
            lora=self.lora,
            deterministic=deterministic,
        )((x, state), None)
        probs = end_folds(capture, state, probs)
        if self.final_norm is not None:
            x = nn.LayerNorm(self.final_norm, dtype=self.dtype, name="encoder_norm")(x)
        return x, probs


class _Model(nn.Module):
    """See `Model`."""

    num_classes: int | None = None
    patch_size: tuple[int, int] = (16, 16)
    width: int = 768
    depth: int = 12
    mlp_dim: int | None = None
    num_heads: int = 12
    cls: bool = False
    keep_cls: bool = False
    gelu: str = "tanh"
    patch_bias: bool = True
    stem: int = 0
    key_bias: bool = True
    norm_eps: float = 1e-6
    pre_norm: float | None = None
    final_norm: float | None = 1e-6
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    dropout: float = 0.0
    pool_type: str = "none"
    scan: bool = True
    remat_policy: str = "nothing_saveable"
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()

    @property
    def leaves(self) -> tuple[leaves.Leaf, ...]:
        """This tower's parameters as a tuple of `leaves.Leaf`, without adapters."""
        return leaves.of_module(LEAVES, self)

    @property
    def probs_path(self) -> str:
        """Where a layer's attention looks for the perturbation of its probabilities."""
        return "Transformer/encoderblock/MultiHeadDotProductAttention_0/probs"

    @property
    def class_tokens(self) -> tuple[int, int]:
        """How many tokens stand in front of the patches in its layers, and how many of them are returned."""
        return int(self.cls), int(self.cls and self.keep_cls)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of the patches of an image of that many pixels."""
        return height // self.patch_size[0], width // self.patch_size[1]

    @nn.compact
    def __call__(self, image, *, train=False, capture_attention=False):
        if self.pool_type != "none":
            raise ValueError(f"pool_type is {self.pool_type!r}; PaliGemma's tower has 'none' only.")
        for side, patch in zip(image.shape[1:3], self.patch_size, strict=True):
            if side % patch:
                raise ValueError(
                    f"Image is {image.shape[1]}×{image.shape[2]} px, which patches of "
                    f"{self.patch_size[0]}×{self.patch_size[1]} px don't tile."
                )
        if self.mean is not None:
            image = ((image + 1) / 2 - jnp.asarray(self.mean, image.dtype)) / jnp.asarray(self.std, image.dtype)
        x, patch = image, self.patch_size
        for i in range(STEM if self.stem else 0):
            x = nn.Conv(self.stem, (3, 3), strides=(2, 2), dtype=self.dtype, name=f"stem_{i}")(x)
            x = nn.gelu(nn.LayerNorm(self.norm_eps, dtype=self.dtype, name=f"stem_norm_{i}")(x))
            patch = tuple(n // 2 for n in patch)
        x = nn.Conv(
            self.width,
            patch,
            strides=patch,
            padding="VALID",
            name="embedding",
            use_bias=self.patch_bias,
            dtype=self.dtype,
        )(x)
        x = x.reshape(x.shape[0], -1, self.width)
        if self.cls:
            cls = self.param("cls", nn.initializers.zeros_init(), (1, 1, self.width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(cls.astype(x.dtype), (x.shape[0], 1, self.width)), x], axis=1)
        pos = self.param(
            "pos_embedding",
            nn.initializers.normal(stddev=self.width**-0.5),
            (1, x.shape[1], self.width),
            jnp.float32,
        )
        x = constrain(x + pos.astype(x.dtype), "act_batch", "act_len", "act_emb")
        if self.pre_norm is not None:
            x = nn.LayerNorm(self.pre_norm, dtype=self.dtype, name="pre_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        x, probs = Encoder(
            depth=self.depth,
            mlp_dim=self.mlp_dim or 4 * self.width,
            num_heads=self.num_heads,
            gelu=self.gelu,
            key_bias=self.key_bias,
            norm_eps=self.norm_eps,
            final_norm=self.final_norm,
            dropout=self.dropout,
            scan=self.scan,
            remat_policy=self.remat_policy,
            dtype=self.dtype,
            attn_impl=self.attn_impl,
            lora=self.lora,
            name="Transformer",
        )(x, deterministic=not train, capture=capture_attention)
        if self.cls and not self.keep_cls:
            x = x[:, 1:]
        # The same under the name that big_vision's image_avg_repr reads.
        out = {"encoded": x, "pre_logits": x}
        if capture_attention is not False:
            out["attn"] = probs
        if self.num_classes:
            x = lora.Dense(
                self.num_classes,
                dtype=self.dtype,
                lora=self.lora,
                deterministic=not train,
                name="head",
            )(x)
        return x, out


KEYS = frozenset(f.name for f in dataclasses.fields(_Model)) - {"parent", "name", "lora"} | {"variant"}


def Model(num_classes: int | None = None, *, variant: str | None = None, **kw) -> _Model:  # noqa: N802 (a factory, named as in big_vision)
    """The image tower.

    Args:
      num_classes: width of the `head` that projects each token; None leaves it out.
      variant: e.g. "So400m/14"; the keywords below override it.
      **kw: width, depth, mlp_dim, num_heads, patch_size (int or pair); cls (a class token), keep_cls (it is the first
        of the tokens returned; only for a connector), gelu (of GELUS), stem (channels of its convolutions; 0: none;
        parameters stem_0, stem_norm_0, stem_1, stem_norm_1), patch_bias, key_bias, norm_eps, pre_norm and
        final_norm (before and after the layers: their eps; None: no norm), mean and std (of the three colours of pixels
        in [0, 1]); dropout, scan (False unrolls the loop over layers; parameters stay stacked), remat_policy ("none" or
        a name in jax.checkpoint_policies), dtype of activations, attn_impl, lora (of `lora.as_rules`, over paths that
        begin with "img/").

    Returns:
      A module that maps float[B, height, width, 3] in [-1, 1] to (float[B, T, num_classes],
      dict(encoded=float[B, T, D], attn=float32[layers, B, N, T, T] if capture_attention, or a fold's
      results: see `layers.capture`)).
    """
    kw = {**(decode_variant(variant) if variant else {}), **kw}
    if isinstance(kw.get("patch_size"), int):
        kw["patch_size"] = (kw["patch_size"],) * 2
    kw |= {name: tuple(kw[name]) for name in ("patch_size", "mean", "std") if kw.get(name) is not None}
    if kw.get("gelu", "tanh") not in GELUS:
        raise ValueError(f"The image tower's gelu is {kw['gelu']!r}; expected one of {tuple(GELUS)}.")
    if kw.get("stem") and any(n % 2**STEM for n in kw.get("patch_size", (16, 16))):
        raise ValueError(
            f"The image tower's stem goes with patches of a multiple of {2**STEM} px, found {kw['patch_size']}."
        )
    if any(len(kw.get(name) or (0, 0, 0)) != 3 for name in ("mean", "std")) or ("mean" in kw) != ("std" in kw):
        raise ValueError("The image tower's mean and std are three numbers each, or neither is given.")
    if kw.get("keep_cls") and (num_classes or not kw.get("cls")):
        raise ValueError(
            "The image tower's keep_cls goes with cls=True and with a connector that reads the class token."
        )
    return _Model(num_classes, **kw)
