"""The language model: Gemma 1 and Gemma 2 decoders, with big_vision's parameter names.

Shapes and names follow big_vision/models/ppp/gemma.py (`q_einsum/w`, `gating_einsum`, …), layers
stacked on a leading axis. Numerics follow the published model: RMSNorm with (1 + scale), RoPE and
softmax in float32, tanh-GELU, embeddings scaled by sqrt(width), output tied to the embedding.
Gemma 2 adds norms after each sublayer and soft-caps; its sliding window of 4,096 tokens is left out, as
in big_vision, since PaliGemma's sequences up to 448 px are much shorter.

Axis letters: B batch, T and S positions, D width, N query heads, K key/value heads, H width of a
head, F width of the MLP, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models import leaves, presets
from paligemma_med.models.layers import attention, lora, quantised, stack
from paligemma_med.models.layers.activations import constrain
from paligemma_med.models.layers.capture import end_folds, fold_layer, perturbation, start_fold
from paligemma_med.models.layers.embedder import Embedder
from paligemma_med.models.layers.norms import RMSNorm
from paligemma_med.models.layers.positions import apply_rope, rope_angles

_GEMMA2 = dict(post_norms=True, attn_logits_softcap=50.0, final_logits_softcap=30.0)

# gemma_*: arXiv 2403.08295, table 1; gemma2_*: arXiv 2408.00118, table 1. The last two are ours, for
# laptops and tests.
VARIANTS = {
    "gemma_2b": dict(width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256),
    "gemma_7b": dict(width=3072, depth=28, mlp_dim=24_576, num_heads=16, num_kv_heads=16, head_dim=256),
    "gemma2_2b": dict(width=2304, depth=26, mlp_dim=9_216, num_heads=8, num_kv_heads=4, head_dim=256, **_GEMMA2),
    "gemma2_9b": dict(width=3584, depth=42, mlp_dim=14_336, num_heads=16, num_kv_heads=8, head_dim=256, **_GEMMA2),
    "gemma2_27b": dict(
        width=4608,
        depth=46,
        mlp_dim=36_864,
        num_heads=32,
        num_kv_heads=16,
        head_dim=128,
        query_pre_attn_norm="rsqrt_emb_per_head",
        **_GEMMA2,
    ),
    "gemma_mini": dict(width=192, depth=6, mlp_dim=768, num_heads=4, num_kv_heads=1, head_dim=48, vocab_size=1024),
    "gemma_mu": dict(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=1024),
}
DEFAULT_VARIANT = presets.DEFAULT["llm"]["variant"]

VOCAB_SIZE = presets.DEFAULT["llm"]["vocab_size"]


def _leaves():
    """All parameters that a decoder can have, in the order of the computation."""
    yield leaves.Leaf("embedder/input_embedding", "VD", "D", role="table")
    for path, letters, kw in (
        ("pre_attention_norm/scale", "D", dict(role="norm")),
        ("attn/q_einsum/w", "NDH", dict(inputs="D", when="grouped")),
        ("attn/kv_einsum/w", "KDH", dict(inputs="D", parts=("k", "v"), when="grouped")),
        ("attn/qkv_einsum/w", "NDH", dict(inputs="D", parts=("q", "k", "v"), when="ungrouped")),
        ("attn/attn_vec_einsum/w", "NHD", dict(inputs="NH")),
        ("post_attention_norm/scale", "D", dict(role="norm", when="post_norms")),
        ("pre_ffw_norm/scale", "D", dict(role="norm")),
        ("mlp/gating_einsum", "DF", dict(inputs="D", parts=("gate", "up"))),
        ("mlp/linear", "FD", dict(inputs="F", parts=("down",))),
        ("post_ffw_norm/scale", "D", dict(role="norm", when="post_norms")),
    ):
        yield leaves.Leaf(f"layers/{path}", letters, stacked=True, **kw)
    yield leaves.Leaf("final_norm/scale", "D", role="norm")


LEAVES = tuple(_leaves())
# Exactly one of the two is true (see `Leaf.when`): they keep the same projections, in this order, in
# different kernels.
ALTERNATIVES = (("grouped", "ungrouped"),)


def _init(fan_in_axes, fan_out_axes):
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=fan_in_axes, out_axis=fan_out_axes
    )


class Attention(nn.Module):
    """Grouped-query attention with RoPE; in modes "prefill" and "extend" it keeps a cache.

    Cache (collection "cache", batch first): k_prefix, v_prefix [B, S, K, H], written once by prefill, and
    k_new, v_new [B·samples, M, K, H], to which each extend appends one position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    attn_impl: str
    mode: str
    capture: bool | object
    cache_dtype: str | None
    new_len: int
    num_samples: int
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x, angles, mask, step):
        n, k_heads, d, h = self.num_heads, self.num_kv_heads, x.shape[-1], self.head_dim
        kw = dict(lora=self.lora, deterministic=self.deterministic)
        if n == k_heads:
            q, k, v = lora.Einsum((3, n, d, h), _init(2, (0, 1, 3)), parts="qkv", name="qkv_einsum", **kw)(
                "BTD,3NDH->BT3NH", x
            )
        else:
            q = lora.Einsum((n, d, h), _init(1, (0, 2)), name="q_einsum", **kw)("BTD,NDH->BTNH", x)
            k, v = lora.Einsum((2, k_heads, d, h), _init(2, (0, 1, 3)), parts="kv", name="kv_einsum", **kw)(
                "BTD,2KDH->BT2KH", x
            )
        q, k = apply_rope(q, angles), apply_rope(k, angles)
        q, k, v = (constrain(a, "act_batch", "act_len", "act_heads", None) for a in (q, k, v))

        probs = None
        if self.mode == "extend":
            y = self._extend(q, k, v, mask, step)
        else:
            if self.mode == "prefill":
                self._prefill(k, v)
            y, probs = attention.attend(
                q,
                k,
                v,
                mask,
                scale=self.scale,
                softcap=self.softcap,
                impl=self.attn_impl,
                capture=self.capture is not False,
                perturb=perturbation(self),
            )
        out = lora.Einsum((n, h, d), _init((0, 1), 2), inputs=2, name="attn_vec_einsum", **kw)
        return out("BTNH,NHD->BTD", y), probs

    def _prefill(self, k, v):
        dtype = self.cache_dtype or k.dtype
        new = (k.shape[0] * self.num_samples, self.new_len, *k.shape[2:])
        for name, x in (("k", k), ("v", v)):
            self.put_variable(self._prefix(), f"{name}_prefix", x.astype(dtype))
            self.put_variable("cache", f"{name}_new", jnp.zeros(new, dtype))

    def _prefix(self):
        """The collection of k_prefix and v_prefix. A decoding loop that makes "prefix" mutable only in
        prefill_cache, and "cache" in extend_cache, doesn't copy the prefix at each step."""
        return "prefix" if self.is_mutable_collection("prefix") else "cache"

    def _extend(self, q, k, v, prefix_mask, step):
        prefix = "prefix" if self.has_variable("prefix", "k_prefix") else "cache"
        new = []
        for name, x in (("k", k), ("v", v)):
            cache = self.get_variable("cache", f"{name}_new")
            cache = jax.lax.dynamic_update_slice_in_dim(cache, x.astype(cache.dtype), step, axis=1)
            self.put_variable("cache", f"{name}_new", cache)
            new.append(cache)
        return attention.attend_cached(
            q,
            (*(self.get_variable(prefix, f"{name}_prefix") for name in "kv"), prefix_mask),
            (*new, jnp.arange(new[0].shape[1]) <= step),
            scale=self.scale,
            softcap=self.softcap,
        )


class FeedForward(nn.Module):
    """Gated MLP: linear(gelu(gate(x)) · up(x)). float[B, T, D] → float[B, T, D]."""

    mlp_dim: int
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        d, f = x.shape[-1], self.mlp_dim
        gating = quantised.param(self, "gating_einsum", _init(1, (0, 2)), (2, d, f))
        linear = quantised.param(self, "linear", _init(0, 1), (f, d))
        gate, up = quantised.product(lambda x, w: (x @ w[0], x @ w[1]), x, gating)
        gate = lora.add(self, gate, x, "gating_einsum", "gate")
        up = lora.add(self, up, x, "gating_einsum", "up")
        y = constrain(nn.gelu(gate) * up, "act_batch", "act_len", "act_mlp")
        return lora.add(self, quantised.product(jnp.matmul, y, linear), y, "linear", "down")


class Block(nn.Module):
    """One decoder layer. As a scan body: (carry, …) → (carry, probabilities or a fold's out), where the
    carry is (float[B, T, D], a fold's state or None)."""

    mlp_dim: int
    post_norms: bool
    dropout: float
    deterministic: bool
    attn: dict
    lora: tuple

    @nn.compact
    def __call__(self, carry, angles, mask, step):
        x, state = carry
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        y = RMSNorm(name="pre_attention_norm")(x)
        adapters = dict(lora=self.lora, deterministic=self.deterministic)
        y, probs = Attention(**self.attn, **adapters, name="attn")(y, angles, mask, step)
        state, probs = fold_layer(self.attn["capture"], state, probs)
        if self.post_norms:
            y = RMSNorm(name="post_attention_norm")(y)
        x = constrain(x + drop(y), "act_batch", "act_len", "act_emb")
        y = RMSNorm(name="pre_ffw_norm")(x)
        y = FeedForward(self.mlp_dim, **adapters, name="mlp")(y)
        if self.post_norms:
            y = RMSNorm(name="post_ffw_norm")(y)
        return (constrain(x + drop(y), "act_batch", "act_len", "act_emb"), state), probs


class _Model(nn.Module):
    """See `Model`."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int = VOCAB_SIZE
    query_pre_attn_norm: str = "rsqrt_head_dim"
    post_norms: bool = False
    attn_logits_softcap: float | None = None
    final_logits_softcap: float | None = None
    dropout: float = 0.0
    cache_dtype: str | None = None
    scan: bool = True
    remat_policy: str = "nothing_saveable"
    dtype: str = "float32"
    attn_impl: str = "xla"
    lora: tuple = ()

    @property
    def grouped(self) -> bool:
        """Whether several query heads share keys and values, which then have a separate kernel."""
        return self.num_heads != self.num_kv_heads

    @property
    def ungrouped(self) -> bool:
        """Whether every query head has its own keys and values, all in one kernel."""
        return not self.grouped

    @property
    def leaves(self) -> tuple[leaves.Leaf, ...]:
        """This decoder's parameters as a tuple of `leaves.Leaf`, without adapters."""
        return leaves.of_module(LEAVES, self)

    @property
    def probs_path(self) -> str:
        """Where a layer's attention looks for the perturbation of its probabilities."""
        return "layers/attn/probs"

    def setup(self):
        self.embedder = Embedder(self.vocab_size, self.width, self.dtype)
        self.final_norm = RMSNorm()

    def embed_tokens(self, tokens) -> jax.Array:
        """int32[B, T] → float[B, T, D], scaled by sqrt(D)."""
        return self.embedder.encode(tokens)

    def compute_logits(self, pre_logits) -> jax.Array:
        """float[B, T, D] after the final norm → float32[B, T, V]."""
        logits = self.embedder.decode(pre_logits)
        logits = constrain(logits, "act_batch", "act_len", "act_vocab")
        if cap := self.final_logits_softcap:
            logits = cap * jnp.tanh(logits / cap)
        return logits

    def __call__(self, x, mask, *, train=False, capture_attention=False):
        """Runs the decoder on an embedded sequence.

        Args:
          x: float[B, T, D] from `embed_tokens` or the image tower.
          mask: bool[B, T, T], True where a query (rows) may see a key; under attn_impl="cudnn" also the
            form of `splice.split_mask`.
          train: switches dropout on (needs a "dropout" rng).
          capture_attention: return the probabilities of every layer and head (True), or what a fold
            computes from them (`layers.capture`).

        Returns:
          (float[B, T, D] after the final norm, float32[layers, B, N, T, T], or (last state, stacked
          outs) of a fold, or None).
        """
        positions = jnp.arange(x.shape[1])[None]
        return self._layers(x, positions, mask, train=train, capture=capture_attention)

    def prefill_cache(self, x, input_mask, attn_mask, *, cache_size: int, num_samples: int = 1) -> jax.Array:
        """Reads the prompts and makes the cache.

        Args:
          x: float[B, S, D] embedded prompts, valid tokens first (left-aligned).
          input_mask: bool[B, S], True on valid tokens.
          attn_mask: bool[B, S, S], already False towards padding.
          cache_size: total of positions: S for the prompt, the rest for new tokens.
          num_samples: continuations per prompt that will extend the cache.

        Returns:
          float32[B, 1, V] logits after the last valid token.
        """
        if cache_size < x.shape[1]:
            raise ValueError(f"cache_size is {cache_size}, less than the prompt's {x.shape[1]}.")
        positions = jnp.arange(x.shape[1])[None]
        seq_len = jnp.sum(input_mask, axis=1, dtype=jnp.int32)
        self.put_variable("cache", "prefix_mask", input_mask)
        self.put_variable("cache", "seq_len", jnp.repeat(seq_len, num_samples))
        # The same number for every row, but stored per row so that all cache leaves shard by batch.
        self.put_variable("cache", "step", jnp.zeros(x.shape[0] * num_samples, jnp.int32))
        y, _ = self._layers(
            x,
            positions,
            attn_mask,
            mode="prefill",
            new_len=cache_size - x.shape[1],
            num_samples=num_samples,
        )
        return self.compute_logits(jnp.take_along_axis(y, seq_len[:, None, None] - 1, axis=1))

    def extend_cache(self, x) -> jax.Array:
        """Advances every sample by one token: float[B·samples, 1, D] → float32[B·samples, 1, V]."""
        step = self.get_variable("cache", "step")
        seq_len = self.get_variable("cache", "seq_len")
        prefix_mask = self.get_variable("cache", "prefix_mask")
        y, _ = self._layers(x, (seq_len + step)[:, None], prefix_mask, mode="extend", step=step[0])
        self.put_variable("cache", "step", step + 1)
        return self.compute_logits(y)

    @nn.compact
    def _layers(
        self,
        x,
        positions,
        mask,
        *,
        mode="full",
        step=None,
        train=False,
        capture=False,
        new_len=0,
        num_samples=1,
    ):
        if self.query_pre_attn_norm == "rsqrt_head_dim":
            scale = self.head_dim**-0.5
        elif self.query_pre_attn_norm == "rsqrt_emb_per_head":
            scale = (self.width // self.num_heads) ** -0.5
        else:
            raise ValueError(
                f"query_pre_attn_norm is {self.query_pre_attn_norm!r}; expected "
                "'rsqrt_head_dim' or 'rsqrt_emb_per_head'."
            )
        block = stack.repeat(Block, self.depth, self.scan, self.remat_policy, {"cache": 1, "prefix": 0})
        state = start_fold(capture, x.shape[0], self.num_heads, x.shape[1])
        (x, state), probs = block(
            name="layers",
            mlp_dim=self.mlp_dim,
            post_norms=self.post_norms,
            dropout=self.dropout,
            deterministic=not train,
            lora=self.lora,
            attn=dict(
                num_heads=self.num_heads,
                num_kv_heads=self.num_kv_heads,
                head_dim=self.head_dim,
                scale=scale,
                softcap=self.attn_logits_softcap,
                attn_impl=self.attn_impl,
                mode=mode,
                capture=capture,
                cache_dtype=self.cache_dtype,
                new_len=new_len,
                num_samples=num_samples,
            ),
        )((x, state), rope_angles(positions, self.head_dim), mask, step)
        return self.final_norm(x), end_folds(capture, state, probs)


KEYS = frozenset(f.name for f in dataclasses.fields(_Model)) - {"parent", "name", "lora"} | {"variant"}


def Model(*, variant: str | None = None, **kw) -> _Model:  # noqa: N802 (a factory, named as in big_vision)
    """The language model.

    Args:
      variant: a key of VARIANTS; the keywords below override it.
      **kw: width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, vocab_size,
        query_pre_attn_norm, post_norms, attn_logits_softcap, final_logits_softcap, dropout,
        cache_dtype (None: the activations' type), scan, remat_policy, dtype, attn_impl, lora (of
        `lora.as_rules`, over paths that begin with "llm/").
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"LLM variant {variant!r} is unknown; expected one of {sorted(VARIANTS)}.")
    kw = {**VARIANTS.get(variant, {}), **kw}
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    if missing := [name for name in sizes if name not in kw]:
        raise ValueError(f"The LLM has no variant and lacks {missing}: give either.")
    if kw["num_heads"] % kw["num_kv_heads"]:
        raise ValueError(f"num_heads={kw['num_heads']} is no multiple of num_kv_heads={kw['num_kv_heads']}.")
    return _Model(**kw)
