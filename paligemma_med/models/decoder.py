"""The language model: Gemma, LLaMA and BLOOM decoders, with big_vision's parameter names where it has such models.

Shapes and names follow big_vision/models/ppp/gemma.py (`q_einsum/w`, `gating_einsum`, …), layers
stacked on a leading axis. Numerics follow the published models: norms, RoPE and softmax in float32. By default it is
Gemma 1: RMSNorm with (1 + scale), tanh-GELU, embeddings scaled by sqrt(width), output tied to the embedding.

- Gemma 2 adds norms after each sublayer and soft-caps; its sliding window of 4,096 tokens is left out, as
  in big_vision, since PaliGemma's sequences up to 448 px are much shorter.
- Gemma 3 has no soft-caps but norms of queries and keys, and of six layers five that see a window only, with RoPE of
  another base.
- LLaMA has RMSNorm without 1, SiLU, and a table of its own for logits.
- BLOOM has LayerNorm, also of the embeddings, biases, ALiBi in place of RoPE, and q, k and v in one kernel that has one
  adapter.

Axis letters: B batch, T and S positions, D width, N query heads, K key/value heads, H width of a
head, F width of the MLP, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from paligemma_med.models import leaves, presets
from paligemma_med.models.decoder_layer import ACTIVATIONS, Block, Places
from paligemma_med.models.layers import norms, stack
from paligemma_med.models.layers.activations import constrain
from paligemma_med.models.layers.capture import end_folds, start_fold
from paligemma_med.models.layers.embedder import Embedder
from paligemma_med.models.layers.positions import alibi_bias, rope_angles

_GEMMA2 = dict(post_norms=True, attn_logits_softcap=50.0, final_logits_softcap=30.0)
_GEMMA3 = dict(post_norms=True, qk_norm=True, rope_theta=1e6, window=1024, vocab_size=262_144)
_LLAMA = dict(norm="rms", norm_eps=1e-5, act="silu", embed_scale=False)
_BLOOM = dict(norm="layer", norm_eps=1e-5, fused=True, position="alibi", embed_norm=True, embed_scale=False)

# gemma_*: arXiv 2403.08295, table 1; gemma2_*: arXiv 2408.00118, table 1; gemma3_*: arXiv 2503.19786, table 1, and
# google-deepmind/gemma, gm/nn/_gemma.py; llama2_7b: arXiv 2307.09288; llama3_8b: arXiv 2407.21783, table 3; bloom_7b1:
# arXiv 2211.05100, table 3; the last three and smollm2_135m also their config.json. gemma_mini and gemma_mu are ours,
# for laptops and tests.
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
    "gemma3_270m": dict(
        width=640, depth=18, mlp_dim=2048, num_heads=4, num_kv_heads=1, head_dim=256, **{**_GEMMA3, "window": 512}
    ),
    "gemma3_4b": dict(
        width=2560, depth=34, mlp_dim=10_240, num_heads=8, num_kv_heads=4, head_dim=256, rope_scale=8.0, **_GEMMA3
    ),
    "llama2_7b": dict(
        width=4096,
        depth=32,
        mlp_dim=11_008,
        num_heads=32,
        num_kv_heads=32,
        head_dim=128,
        tie=False,
        vocab_size=32_000,
        **_LLAMA,
    ),
    "llama3_8b": dict(
        width=4096,
        depth=32,
        mlp_dim=14_336,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope_theta=5e5,
        tie=False,
        vocab_size=128_256,
        **_LLAMA,
    ),
    "smollm2_135m": dict(
        width=576,
        depth=30,
        mlp_dim=1536,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        rope_theta=1e5,
        vocab_size=49_152,
        **_LLAMA,
    ),
    "bloom_7b1": dict(
        width=4096, depth=30, mlp_dim=16_384, num_heads=32, num_kv_heads=32, head_dim=128, vocab_size=250_880, **_BLOOM
    ),
    "gemma_mini": dict(width=192, depth=6, mlp_dim=768, num_heads=4, num_kv_heads=1, head_dim=48, vocab_size=1024),
    "gemma_mu": dict(width=64, depth=2, mlp_dim=128, num_heads=4, num_kv_heads=1, head_dim=16, vocab_size=1024),
}
DEFAULT_VARIANT = presets.DEFAULT["llm"]["variant"]

VOCAB_SIZE = presets.DEFAULT["llm"]["vocab_size"]


POSITIONS = ("rope", "alibi")


def _leaves():
    """All parameters that a decoder can have, in the order of the computation."""
    yield leaves.Leaf("embedder/input_embedding", "VD", "D", role="table")
    yield from _norm("embed_norm", bias="embed_norm", when="embed_norm")
    for part in (_attention_leaves(), _mlp_leaves()):
        for leaf in part:
            yield leaf._replace(path=f"layers/{leaf.path}", stacked=True)
    yield from _norm("final_norm")
    yield leaves.Leaf("embedder/output_embedding", "VD", "D", role="table", when="untied")


def _norm(path, *, when="", bias="layer_norms", letters="D"):
    yield leaves.Leaf(f"{path}/scale", letters, role="norm", when=when)
    yield leaves.Leaf(f"{path}/bias", letters, role="bias", when=bias)


def _attention_leaves():
    yield from _norm("pre_attention_norm")
    yield leaves.Leaf("attn/q_einsum/w", "NDH", inputs="D", when="grouped")
    yield leaves.Leaf("attn/kv_einsum/w", "KDH", inputs="D", parts=("k", "v"), when="grouped")
    yield leaves.Leaf("attn/qkv_einsum/w", "NDH", inputs="D", parts=("q", "k", "v"), when="ungrouped")
    yield leaves.Leaf("attn/qkv/kernel", "DNPH", inputs="D", when="fused")
    yield leaves.Leaf("attn/qkv/bias", "NPH", role="bias", when="fused")
    for name in ("q_norm", "k_norm"):
        yield leaves.Leaf(f"attn/{name}/scale", "H", role="norm", when="qk_norm")
    yield leaves.Leaf("attn/attn_vec_einsum/w", "NHD", inputs="NH", when="gated")
    yield leaves.Leaf("attn/out/kernel", "NHD", inputs="NH", when="fused")
    yield leaves.Leaf("attn/out/bias", "D", role="bias", when="fused")
    yield leaves.Leaf("post_attention_norm/scale", "D", role="norm", when="post_norms")


def _mlp_leaves():
    yield from _norm("pre_ffw_norm")
    yield leaves.Leaf("mlp/gating_einsum", "DF", inputs="D", parts=("gate", "up"), when="gated")
    yield leaves.Leaf("mlp/linear", "FD", inputs="F", parts=("down",), when="gated")
    yield leaves.Leaf("mlp/up/kernel", "DF", inputs="D", when="fused")
    yield leaves.Leaf("mlp/up/bias", "F", role="bias", when="fused")
    yield leaves.Leaf("mlp/down/kernel", "FD", inputs="F", when="fused")
    yield leaves.Leaf("mlp/down/bias", "D", role="bias", when="fused")
    yield leaves.Leaf("post_ffw_norm/scale", "D", role="norm", when="post_norms")


LEAVES = tuple(_leaves())
# Exactly one of the two is true, unless `fused` is (see `Leaf.when`): they keep the same projections, in this order, in
# different kernels.
ALTERNATIVES = (("grouped", "ungrouped"),)


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
    norm: str = "rms_plus_one"
    norm_eps: float = 1e-6
    act: str = "gelu_tanh"
    fused: bool = False
    qk_norm: bool = False
    position: str = "rope"
    rope_theta: float = 1e4
    rope_scale: float = 1.0
    window: int | None = None
    window_every: int = 6
    local_rope_theta: float = 1e4
    embed_scale: bool = True
    embed_norm: bool = False
    tie: bool = True
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
        return self.num_heads != self.num_kv_heads and not self.fused

    @property
    def ungrouped(self) -> bool:
        """Whether every query head has its own keys and values, all in one kernel."""
        return not self.grouped and not self.fused

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a gate, and no kernel a bias."""
        return not self.fused

    @property
    def layer_norms(self) -> bool:
        """Whether norms have biases."""
        return self.norm == "layer"

    @property
    def untied(self) -> bool:
        """Whether logits have a table of their own."""
        return not self.tie

    @property
    def leaves(self) -> tuple[leaves.Leaf, ...]:
        """This decoder's parameters as a tuple of `leaves.Leaf`, without adapters."""
        return leaves.of_module(LEAVES, self)

    @property
    def probs_path(self) -> str:
        """Where a layer's attention looks for the perturbation of its probabilities."""
        return "layers/attn/probs"

    def setup(self):
        self.embedder = Embedder(self.vocab_size, self.width, self.dtype, self.embed_scale, self.tie)
        if self.embed_norm:
            self.input_norm = norms.make("layer", self.norm_eps, name="embed_norm")
        self.final_norm = norms.make(self.norm, self.norm_eps)

    def embed_tokens(self, tokens) -> jax.Array:
        """int32[B, T] → float[B, T, D], scaled by sqrt(D) with `embed_scale`."""
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
        return self._layers(x, *self._places(mask, x.shape[1]), train=train, capture=capture_attention)

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
        seq_len = jnp.sum(input_mask, axis=1, dtype=jnp.int32)
        self.put_variable("cache", "prefix_mask", input_mask)
        self.put_variable("cache", "seq_len", jnp.repeat(seq_len, num_samples))
        # The same number for every row, but stored per row so that all cache leaves shard by batch.
        self.put_variable("cache", "step", jnp.zeros(x.shape[0] * num_samples, jnp.int32))
        y, _ = self._layers(
            x,
            *self._places(attn_mask, x.shape[1]),
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
        places = self._places_of_step(prefix_mask, seq_len, step)
        y, _ = self._layers(x, *places, mode="extend", step=step[0])
        self.put_variable("cache", "step", step + 1)
        return self.compute_logits(y)

    def _places(self, mask, length):
        """(`Places` in a pass over `length` tokens, those that differ in layers with a window or None)."""
        positions = jnp.arange(length)[None]
        if self.position == "alibi":
            return Places(None, mask, key_bias=alibi_bias(positions, length - 1, self.num_heads)), None
        places = Places(rope_angles(positions, self.head_dim, self.rope_theta, self.rope_scale), mask)
        if self.window is None:
            return places, None
        near = None
        if length > self.window:
            if isinstance(mask, tuple):
                raise ValueError(
                    f"attn_impl='cudnn' has no window of {self.window} tokens, and the sequence has {length}: use "
                    "attn_impl='xla'."
                )
            near = mask & (positions[:, None] > positions[:, :, None] - self.window)
        return places, Places(rope_angles(positions, self.head_dim, self.local_rope_theta), near)

    def _places_of_step(self, prefix_mask, seq_len, step):
        """The same for one more token of each sample: bool[B, S], int32[B·R], int32[B·R].

        They need the number M of positions kept for new tokens, which the cache's shapes have.
        """
        position = (seq_len + step)[:, None]
        keys, new = jnp.arange(prefix_mask.shape[1])[None], jnp.arange(self._new_len())
        seen = new <= step[0]
        if self.position == "alibi":
            bias = alibi_bias(keys, position, self.num_heads), alibi_bias(new[None], step[:, None], self.num_heads)
            return Places(None, prefix_mask, seen, bias), None
        places = Places(rope_angles(position, self.head_dim, self.rope_theta, self.rope_scale), prefix_mask, seen)
        if self.window is None:
            return places, None
        near = near_new = None
        if keys.size + new.size > self.window:
            # The samples of a prompt are at the same position.
            first = position.reshape(prefix_mask.shape[0], -1)[:, :1] - self.window
            near, near_new = prefix_mask & (keys > first), seen & (new > step[0] - self.window)
        return places, Places(rope_angles(position, self.head_dim, self.local_rope_theta), near, near_new)

    def _new_len(self):
        cached = self.variables["cache"]["layers"]["attn"]["k_new"]
        return cached.shape[2]  # layers, samples, positions, …

    @nn.compact
    def _layers(
        self, x, places, local, *, mode="full", step=None, train=False, capture=False, new_len=0, num_samples=1
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
        if self.embed_norm:
            # XLA's compiler for GPUs (0.10.2) fails on a norm fused with what puts image and text together.
            x = jax.lax.optimization_barrier(x)
            x = self.input_norm(x)
        is_local = None if local is None else (np.arange(self.depth) + 1) % self.window_every != 0
        block = stack.repeat(
            Block,
            self.depth,
            self.scan,
            self.remat_policy,
            {"cache": 1, "prefix": 0},
            in_axes=(0 if local else nn.broadcast, *(nn.broadcast,) * 3),
        )
        norm = (self.norm, self.norm_eps)
        state = start_fold(capture, x.shape[0], self.num_heads, x.shape[1])
        (x, state), probs = block(
            name="layers",
            mlp_dim=self.mlp_dim,
            act=self.act,
            fused=self.fused,
            norm=norm,
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
                qk_norm=norm if self.qk_norm else None,
                attn_impl=self.attn_impl,
                mode=mode,
                capture=capture,
                cache_dtype=self.cache_dtype,
                new_len=new_len,
                num_samples=num_samples,
            ),
        )((x, state), is_local, places, local, step)
        return self.final_norm(x), end_folds(capture, state, probs)


KEYS = frozenset(f.name for f in dataclasses.fields(_Model)) - {"parent", "name", "lora"} | {"variant"}


def Model(*, variant: str | None = None, **kw) -> _Model:  # noqa: N802 (a factory, named as in big_vision)
    """The language model.

    Args:
      variant: a key of VARIANTS; the keywords below override it.
      **kw: width, depth, mlp_dim, num_heads, num_kv_heads, head_dim, vocab_size,
        query_pre_attn_norm, post_norms, attn_logits_softcap, final_logits_softcap, dropout,
        cache_dtype (None: the activations' type), scan, remat_policy, dtype, attn_impl, lora (of
        `lora.as_rules`, over paths that begin with "llm/"), and
        norm ("rms_plus_one", "rms", "layer") and norm_eps; act ("gelu_tanh", "silu");
        fused: kernels with biases, q, k and v in one, no gate;
        qk_norm: norms of queries and keys;
        position ("rope", "alibi"), rope_theta, rope_scale (positions are divided by it);
        window: tokens that a layer sees, itself included, except every `window_every`-th layer, which sees all; RoPE
        of the former has the base local_rope_theta and no scale;
        embed_scale: embeddings times sqrt(width); embed_norm: LayerNorm of all inputs; tie: logits by the
        embeddings' table.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(f"LLM variant {variant!r} is unknown; expected one of {sorted(VARIANTS)}.")
    kw = {**VARIANTS.get(variant, {}), **kw}
    sizes = ("width", "depth", "mlp_dim", "num_heads", "num_kv_heads", "head_dim")
    if missing := [name for name in sizes if name not in kw]:
        raise ValueError(f"The LLM has no variant and lacks {missing}: give either.")
    if kw["num_heads"] % kw["num_kv_heads"]:
        raise ValueError(f"num_heads={kw['num_heads']} is no multiple of num_kv_heads={kw['num_kv_heads']}.")
    if kw.get("fused") and kw["num_heads"] != kw["num_kv_heads"]:
        raise ValueError(f"fused kernels have as many key/value heads as heads, {kw['num_heads']}.")
    if kw.get("norm") == "layer" and (kw.get("qk_norm") or kw.get("post_norms")):
        raise ValueError("norm='layer' goes with neither qk_norm nor post_norms.")
    for name, known in (("norm", norms.KINDS), ("act", ACTIVATIONS), ("position", POSITIONS)):
        if name in kw and kw[name] not in known:
            raise ValueError(f"The LLM's {name} is {kw[name]!r}; expected one of {sorted(known)}.")
    return _Model(**kw)
