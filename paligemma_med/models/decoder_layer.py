"""One layer of the language model: attention, feed-forward network, norms and residual stream.

What families differ in is said by arguments (`decoder` has the published values): norms, activation, heads, RoPE or
ALiBi, windows, kernels with biases. Parameter names of gated layers are those of big_vision/models/ppp/gemma.py.

Axis letters: B batch, T and S positions, D width, N query heads, K key/value heads, H width of a
head, F width of the MLP, M positions of a sample's own tokens.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models.layers import attention, lora, norms, quantised
from paligemma_med.models.layers.activations import constrain
from paligemma_med.models.layers.capture import fold_layer, perturbation
from paligemma_med.models.layers.positions import apply_rope


def _init(fan_in_axes, fan_out_axes):
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=fan_in_axes, out_axis=fan_out_axes
    )


class Places(NamedTuple):
    """What attention must know about where tokens are. In a mode with a cache, keys are those of the prefix.

    Attributes:
      angles: of `rope_angles`, for queries and the keys computed with them; None without RoPE.
      mask: which keys are visible: bool[B, T, S], the form of `splice.split_mask`, or bool[B, S] in mode "extend".
      new_mask: bool[M], likewise for a sample's own positions in mode "extend".
      key_bias: float32[B or 1, N, S] of `alibi_bias`, in mode "extend" a pair for prefix and new positions; None
        without ALiBi.
    """

    angles: tuple[jax.Array, jax.Array] | None
    mask: Any
    new_mask: jax.Array | None = None
    key_bias: Any = None


def _choose(places, local, is_local):
    """The `Places` of a layer: `local`, whose fields are None where they are those of all layers, if `is_local`."""
    if local is None:
        return places
    return Places(
        *(
            whole if near is None else jax.tree.map(lambda a, b: jnp.where(is_local, a, b), near, whole)
            for near, whole in zip(local, places, strict=True)
        )
    )


class Attention(nn.Module):
    """Attention of a decoder, its heads grouped or not; in modes "prefill" and "extend" it keeps a cache.

    Cache (collection "cache", batch first): k_prefix, v_prefix [B, S, K, H], written once by prefill, and
    k_new, v_new [B·samples, M, K, H], to which each extend appends one position.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float | None
    qk_norm: tuple | None
    fused: bool
    attn_impl: str
    mode: str
    capture: bool | object
    cache_dtype: str | None
    new_len: int
    num_samples: int
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x, places, step):
        kw = dict(lora=self.lora, deterministic=self.deterministic)
        q, k, v = self._project(x, kw)
        if self.qk_norm:
            q, k = norms.make(*self.qk_norm, name="q_norm")(q), norms.make(*self.qk_norm, name="k_norm")(k)
        if places.angles is not None:
            q, k = apply_rope(q, places.angles), apply_rope(k, places.angles)
        q, k, v = (constrain(a, "act_batch", "act_len", "act_heads", None) for a in (q, k, v))

        probs = None
        if self.mode == "extend":
            y = self._extend(q, k, v, places, step)
        else:
            if self.mode == "prefill":
                self._prefill(k, v)
            y, probs = attention.attend(
                q,
                k,
                v,
                places.mask,
                scale=self.scale,
                softcap=self.softcap,
                key_bias=places.key_bias,
                impl=self.attn_impl,
                capture=self.capture is not False,
                perturb=perturbation(self),
            )
        if self.fused:
            return lora.Dense(x.shape[-1], inputs=2, dtype=y.dtype, name="out", **kw)(y), probs
        shape = (self.num_heads, self.head_dim, x.shape[-1])
        out = lora.Einsum(shape, _init((0, 1), 2), inputs=2, name="attn_vec_einsum", **kw)
        return out("BTNH,NHD->BTD", y), probs

    def _project(self, x, kw):
        """float[B, T, D] → q [B, T, N, H], k and v [B, T, K, H]. Called in a compact method."""
        n, k_heads, d, h = self.num_heads, self.num_kv_heads, x.shape[-1], self.head_dim
        if self.fused:
            qkv = lora.Dense((n, 3, h), dtype=x.dtype, name="qkv", **kw)(x)
            return (qkv[..., i, :] for i in range(3))
        if n == k_heads:
            return lora.Einsum((3, n, d, h), _init(2, (0, 1, 3)), parts="qkv", name="qkv_einsum", **kw)(
                "BTD,3NDH->BT3NH", x
            )
        q = lora.Einsum((n, d, h), _init(1, (0, 2)), name="q_einsum", **kw)("BTD,NDH->BTNH", x)
        k, v = lora.Einsum((2, k_heads, d, h), _init(2, (0, 1, 3)), parts="kv", name="kv_einsum", **kw)(
            "BTD,2KDH->BT2KH", x
        )
        return q, k, v

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

    def _extend(self, q, k, v, places, step):
        prefix = "prefix" if self.has_variable("prefix", "k_prefix") else "cache"
        new = []
        for name, x in (("k", k), ("v", v)):
            cache = self.get_variable("cache", f"{name}_new")
            cache = jax.lax.dynamic_update_slice_in_dim(cache, x.astype(cache.dtype), step, axis=1)
            self.put_variable("cache", f"{name}_new", cache)
            new.append(cache)
        return attention.attend_cached(
            q,
            (*(self.get_variable(prefix, f"{name}_prefix") for name in "kv"), places.mask),
            (*new, places.new_mask),
            scale=self.scale,
            softcap=self.softcap,
            key_bias=places.key_bias,
        )


ACTIVATIONS = {"gelu_tanh": nn.gelu, "silu": nn.silu}


class FeedForward(nn.Module):
    """Gated MLP: linear(act(gate(x)) · up(x)). float[B, T, D] → float[B, T, D]."""

    mlp_dim: int
    act: str
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
        y = constrain(ACTIVATIONS[self.act](gate) * up, "act_batch", "act_len", "act_mlp")
        return lora.add(self, quantised.product(jnp.matmul, y, linear), y, "linear", "down")


class BiasedFeedForward(nn.Module):
    """MLP without a gate: down(act(up(x))), both with biases (BLOOM). float[B, T, D] → float[B, T, D]."""

    mlp_dim: int
    act: str
    lora: tuple
    deterministic: bool

    @nn.compact
    def __call__(self, x):
        kw = dict(dtype=x.dtype, lora=self.lora, deterministic=self.deterministic)
        y = ACTIVATIONS[self.act](lora.Dense(self.mlp_dim, name="up", **kw)(x))
        y = constrain(y, "act_batch", "act_len", "act_mlp")
        return lora.Dense(x.shape[-1], name="down", **kw)(y)


class Block(nn.Module):
    """One decoder layer. As a scan body: (carry, …) → (carry, probabilities or a fold's out), where the
    carry is (float[B, T, D], a fold's state or None).

    Attributes:
      norm: kind and eps of its norms, as for `norms.make`.
      attn: arguments of `Attention`.
    """

    mlp_dim: int
    act: str
    fused: bool
    norm: tuple
    post_norms: bool
    dropout: float
    deterministic: bool
    attn: dict
    lora: tuple

    @nn.compact
    def __call__(self, carry, is_local, places, local, step):
        x, state = carry
        drop = nn.Dropout(self.dropout, deterministic=self.deterministic)
        y = norms.make(*self.norm, name="pre_attention_norm")(x)
        adapters = dict(lora=self.lora, deterministic=self.deterministic)
        attn = Attention(**self.attn, fused=self.fused, **adapters, name="attn")
        y, probs = attn(y, _choose(places, local, is_local), step)
        state, probs = fold_layer(self.attn["capture"], state, probs)
        if self.post_norms:
            y = norms.make(*self.norm, name="post_attention_norm")(y)
        x = constrain(x + drop(y), "act_batch", "act_len", "act_emb")
        y = norms.make(*self.norm, name="pre_ffw_norm")(x)
        mlp = BiasedFeedForward if self.fused else FeedForward
        y = mlp(self.mlp_dim, self.act, **adapters, name="mlp")(y)
        if self.post_norms:
            y = norms.make(*self.norm, name="post_ffw_norm")(y)
        return (constrain(x + drop(y), "act_batch", "act_len", "act_emb"), state), probs
