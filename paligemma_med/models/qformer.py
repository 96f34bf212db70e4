"""A query transformer as connector: learned queries gather what a language model reads of an image (BLIP-2).

A BERT encoder (post-norm, exact GELU) over a fixed number of learned queries, of which every second layer, from the
first on, also attends to the tower's tokens. arXiv 2301.12597; transformers, models/blip_2/modeling_blip_2.py; LAVIS,
models/blip2_models/Qformer.py. Layers are stacked in pairs, one with cross-attention and one without, on a leading
axis.

Axis letters: B batch, P tokens of the tower, Q queries, D width of the tower, W of the query transformer, E of the
language model, N heads, H width of a head, F width of the MLP.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from paligemma_med.models import leaves
from paligemma_med.models.layers import attention, lora, norms, stack
from paligemma_med.models.layers.capture import perturbation

_EPS = 1e-12  # BERT's


# The modules with attention, in the order of a pair of layers.
_CROSS = "layers/block_0/cross"
_MODULES = ("layers/block_0/self", _CROSS, "layers/block_1/self")


def _in_order(first, cross, second):
    """The call's dict from the attention of pairs of layers, [layers / 2, …] each."""
    return {"self": jnp.stack([first, second], 1).reshape(-1, *first.shape[1:]), "cross": cross}


def _dense(path, letters, inputs, **kw):
    outputs = "".join(c for c in letters if c not in inputs)
    yield leaves.Leaf(f"{path}/kernel", letters, inputs, **kw)
    yield leaves.Leaf(f"{path}/bias", outputs, role="bias", **kw)


def _norm(path, **kw):
    yield leaves.Leaf(f"{path}/scale", "W", role="norm", **kw)
    yield leaves.Leaf(f"{path}/bias", "W", role="bias", **kw)


def _leaves():
    yield leaves.Leaf("queries", "1QW", role="positions")
    yield from _norm("input_norm")
    for block in ("block_0", "block_1"):
        at, kw = f"layers/{block}", dict(stacked=True)
        for kind, inputs in (("self", "W"), *((("cross", "D"),) if block == "block_0" else ())):
            yield from _dense(f"{at}/{kind}/query", "WNH", "W", **kw)
            yield from _dense(f"{at}/{kind}/key", f"{inputs}NH", inputs, **kw)
            yield from _dense(f"{at}/{kind}/value", f"{inputs}NH", inputs, **kw)
            yield from _dense(f"{at}/{kind}/out", "NHW", "NH", **kw)
            yield from _norm(f"{at}/{kind}_norm", **kw)
        yield from _dense(f"{at}/mlp/Dense_0", "WF", "W", **kw)
        yield from _dense(f"{at}/mlp/Dense_1", "FW", "F", **kw)
        yield from _norm(f"{at}/mlp_norm", **kw)
    yield from _dense("proj", "WE", "W")


class _Attention(nn.Module):
    """float[B, Q, W] queries, float[B, S, D] keys → (float[B, Q, W], probabilities float32[B, N, Q, S] or None)."""

    num_heads: int
    capture: bool
    kw: dict

    @nn.compact
    def __call__(self, x, keys):
        heads = (self.num_heads, x.shape[-1] // self.num_heads)
        q = lora.Dense(heads, name="query", **self.kw)(x)
        k, v = (lora.Dense(heads, name=name, **self.kw)(keys) for name in ("key", "value"))
        y, probs = attention.attend(q, k, v, scale=heads[1] ** -0.5, capture=self.capture, perturb=perturbation(self))
        return lora.Dense(x.shape[-1], inputs=2, name="out", **self.kw)(y), probs


class _Block(nn.Module):
    mlp_dim: int
    num_heads: int
    cross: bool
    capture: bool
    kw: dict

    @nn.compact
    def __call__(self, x, image):
        probs = []
        for kind, keys in (("self", x), *((("cross", image),) if self.cross else ())):
            y, found = _Attention(self.num_heads, self.capture, self.kw, name=kind)(x, x if kind == "self" else keys)
            x = norms.LayerNorm(_EPS, name=f"{kind}_norm")(x + y)
            probs.append(found)
        x = norms.LayerNorm(_EPS, name="mlp_norm")(x + _Mlp(self.mlp_dim, self.kw, name="mlp")(x))
        return x, probs


class _Mlp(nn.Module):
    mlp_dim: int
    kw: dict

    @nn.compact
    def __call__(self, x):
        y = nn.gelu(lora.Dense(self.mlp_dim, name="Dense_0", **self.kw)(x), approximate=False)
        return lora.Dense(x.shape[-1], name="Dense_1", **self.kw)(y)


class _Pair(nn.Module):
    """Two layers. As a scan body: float[B, Q, W] → (the same, probabilities: self, cross, self)."""

    mlp_dim: int
    num_heads: int
    capture: bool
    kw: dict

    @nn.compact
    def __call__(self, x, image):
        x, first = _Block(self.mlp_dim, self.num_heads, True, self.capture, self.kw, name="block_0")(x, image)
        x, second = _Block(self.mlp_dim, self.num_heads, False, self.capture, self.kw, name="block_1")(x, image)
        return x, (*first, *second)


class QFormer(nn.Module):
    """See `connector.Connector`. The call's dict has, with capture_attention, "self" float32[layers, B, N, Q, Q] and
    "cross" float32[layers / 2, B, N, Q, P].

    Attributes:
      queries: Q.
      inner: W.
      depth: layers, an even number.
    """

    LEAVES = tuple(_leaves())
    READ_TOWER = tuple(f"layers/block_0/cross/{name}" for name in ("key", "value"))
    remat_policy = "nothing_saveable"

    width: int
    dtype: str = "float32"
    lora: tuple = ()
    queries: int = 32
    inner: int = 768
    depth: int = 12
    mlp_dim: int = 3072
    num_heads: int = 12

    @property
    def leaves(self) -> tuple[leaves.Leaf, ...]:
        return self.LEAVES

    @nn.compact
    def __call__(self, x, *, train=False, capture_attention=False):
        if self.depth % 2 or self.inner % self.num_heads:
            raise ValueError(
                f"connector: depth={self.depth} must be even, and inner={self.inner} a multiple of "
                f"num_heads={self.num_heads}."
            )
        kw = dict(dtype=self.dtype, lora=self.lora, deterministic=not train)
        init = nn.initializers.normal(stddev=0.02)  # BERT's
        queries = self.param("queries", init, (1, self.queries, self.inner), jnp.float32)
        y = norms.LayerNorm(_EPS, name="input_norm")(queries.astype(self.dtype))
        y = jnp.broadcast_to(y, (x.shape[0], *y.shape[1:]))
        pairs = stack.repeat(_Pair, self.depth // 2, True, self.remat_policy)
        y, probs = pairs(self.mlp_dim, self.num_heads, capture_attention, kw, name="layers")(y, x)
        out = {}
        if capture_attention:
            out = _in_order(*probs)
        return lora.Dense(self.width, name="proj", **kw)(y), out

    @staticmethod
    def tokens(kw: dict, patches: int) -> int:
        """Q, whatever the tower has."""
        return kw.get("queries", QFormer.queries)

    @staticmethod
    def slots(kw: dict, patches: int) -> dict[str, tuple[int, ...]]:
        """Shapes [layers / 2, 1, Q, ·] of the attention of one example, by the modules that compute it."""
        pairs, queries = kw.get("depth", QFormer.depth) // 2, kw.get("queries", QFormer.queries)
        return {name: (pairs, 1, queries, patches if name == _CROSS else queries) for name in _MODULES}

    @staticmethod
    def weighted(slots: dict) -> dict:
        """Arrays of `slots` → {"self": float32[layers, 1, 1, Q, Q], "cross": float32[layers / 2, 1, 1, Q, P]}."""
        return _in_order(*(slots[name][:, :, None] for name in _MODULES))

    @staticmethod
    def to_cells(kw: dict, shares, out: dict, rule: str) -> jax.Array:
        """float[…, Q] → float[…, P of the tower], its class token included if it gave one; out is the call's dict for
        one example, without its axis.

        From the last layer down, by the mean of heads: the shares go half through a layer's attention and half past it
        (rollout), or are added to what comes through (relevancy); what crosses goes to the image, what is left in the
        end is of the learned queries themselves. "raw" has the last cross-attention alone.
        """
        own, cross = (jnp.mean(out[name], axis=1) for name in ("self", "cross"))  # one example: [layers, Q, ·]
        shares = jnp.asarray(shares)
        if rule == "raw":
            return shares @ cross[-1]
        image, factor = 0.0, 0.5 if rule == "rollout" else 1.0
        for layer in reversed(range(own.shape[0])):
            if layer % 2 == 0:
                image = image + factor * shares @ cross[layer // 2]
                shares = shares * (0.5 if rule == "rollout" else 1.0)
            shares = factor * (shares + shares @ own[layer])
        return image
