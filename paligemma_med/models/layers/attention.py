"""Attention behind one function, so that every tower switches implementation in one place.

`attend` is used by the image tower and by the language model on whole sequences; `attend_cached`
is the decoding step, in which several samples of one prompt read the same prefix cache.

`capture` says how probabilities leave a tower.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads,
G query heads per key/value head (N = K·G), H width of a head, R samples of one prompt,
M key positions that belong to one sample.
"""

import functools

import jax
import jax.numpy as jnp

from paligemma_med.models import lean
from paligemma_med.models.layers.capture import weigh

# Low enough to vanish in a float32 softmax, but finite: a row whose keys are all masked (padding) gives
# finite values that nothing reads, not NaN that spreads through gradients.
MASKED = -(2.0**127)

IMPLEMENTATIONS = ("xla", "cudnn")


def attend(
    q, k, v, mask=None, *, scale, softcap=None, key_bias=None, impl="xla", capture=False, perturb=None
) -> tuple[jax.Array, jax.Array | None]:
    """Softmax attention with grouped key/value heads.

    Args:
      q: float[B, T, N, H] queries.
      k: float[B, S, K, H] keys; N is a multiple of K.
      v: float[B, S, K, H] values.
      mask: bool[B, T, S], True where a query may see a key; None lets every query see every key.
        "cudnn" also takes the form of `splice.split_mask`.
      scale: factor on the dot products.
      softcap: if set, the scaled dot products become softcap·tanh(x / softcap) (Gemma 2).
      key_bias: float32[B or 1, N, S], added to the scaled dot products of all queries (ALiBi); it has no gradient,
        and goes with no softcap.
      impl: "xla", or "cudnn" for the fused GPU kernel (16-bit inputs, no softcap, no key_bias, no
        capture; H up to 128, from Hopper on 256).
      capture: also return the probabilities.
      perturb: float32[B, N, T, S], added to the probabilities: zeros, to differentiate with respect to
        it. Or float32[B, T, S], of which only the gradient is used: see `capture.weigh`.

    Returns:
      (float[B, T, N, H] in the type of v, probabilities float32[B, N, T, S] or None).
      Dot products are accumulated, and the softmax is taken, in float32.

    Raises:
      ValueError: an unknown `impl`, or one that doesn't support the other arguments.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"attn_impl is {impl!r}; expected one of {IMPLEMENTATIONS}.")
    if impl == "cudnn":
        if capture or perturb is not None:
            raise ValueError(
                "Attention can't be captured under attn_impl='cudnn', whose fused kernel never "
                "holds the probabilities: use attn_impl='xla'."
            )
        if softcap:
            raise ValueError("attn_impl='cudnn' has no soft-cap (Gemma 2): use attn_impl='xla'.")
        if key_bias is not None:
            raise ValueError("attn_impl='cudnn' has no bias of keys (ALiBi): use attn_impl='xla'.")
        return _attend_fused(q, k, v, mask, scale), None
    if softcap and key_bias is not None:
        raise ValueError("Attention with a soft-cap has no bias of keys (ALiBi).")

    if not capture and perturb is None:
        return _attend(q, k, v, mask, key_bias, scale, softcap), None

    # Heads go in front of positions before the products, which then need no T × S array transposed: a CPU, which copies
    # such arrays, holds one of them instead of three.
    groups = q.shape[2] // k.shape[2]
    batch, length, heads, width = q.shape
    q = jnp.moveaxis(q, 2, 1).reshape(batch, k.shape[2], groups * length, width)
    k, v = (jnp.moveaxis(x, 2, 1) for x in (k, v))
    logits = _cap(_dot(q, jnp.swapaxes(k, -1, -2), 2) * scale, softcap)
    if groups > 1:
        logits = logits.reshape(batch, -1, groups, length, k.shape[2])
    if key_bias is not None:
        logits += key_bias.reshape(-1, *logits.shape[1:-2], 1, logits.shape[-1])
    if mask is not None:
        logits = jnp.where(jnp.expand_dims(mask, range(1, logits.ndim - 2)), logits, MASKED)
    probs = jax.nn.softmax(logits, axis=-1)
    if perturb is not None and perturb.ndim == 3:
        probs = weigh(probs, perturb)
    elif perturb is not None:
        probs = probs + perturb.reshape(probs.shape)
    out = _dot(probs.astype(v.dtype).reshape(batch, -1, groups * length, v.shape[2]), v, 2).astype(v.dtype)
    out = jnp.moveaxis(out.reshape(batch, heads, length, width), 1, 2)
    if capture:
        return out, probs.reshape(batch, heads, *probs.shape[-2:])
    return out, None


_FUSED = "cudnn"  # "xla" in tests: the same function without a GPU


def _attend_fused(q, k, v, mask, scale):
    def fused(q, **kw):
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=_FUSED, **kw)

    try:
        if mask is None:
            return fused(q)
        if not isinstance(mask, tuple):
            # cuDNN wants a full [B, 1, T, S] mask; a broadcast one fails (jax#28974).
            return fused(q, mask=mask[:, None])
        lengths, mask = mask
        first = q.shape[1] - mask.shape[1]
        out = fused(q[:, :first], key_value_seq_lengths=lengths)
    except (NotImplementedError, RuntimeError) as e:
        raise ValueError(f"attn_impl='cudnn' can't be had here: {e} Use attn_impl='xla'.") from e
    return jnp.concatenate([out, _attend(q[:, first:], k, v, mask, None, scale, None)], axis=1)


# Attention that writes T × S floats as rarely as possible. The division by the sum of exponentials
# comes after the product with v, on H numbers a query instead of S. The backward pass is written by
# hand: it computes the exponentials again from q and k, and none of its products needs a T × S matrix
# transposed, which a CPU copies (JAX's own has five such copies). The gradient with respect to the logits
# is FlashAttention's (arXiv 2205.14135, appendix B.2).
#
# Axes: B, K, T, G, H of queries; B, K, S, H of keys and values; no K or G where it would be 1. K and G
# aren't merged, so that each can be cut over devices.


def _attend(q, k, v, mask, bias, scale, softcap):
    heads, kv_heads = q.shape[2], k.shape[2]
    if kv_heads == 1:
        mask = None if mask is None else mask[:, :, None]
        bias = None if bias is None else bias[:, None]
        return _attention(q, k[:, :, 0], v[:, :, 0], mask, bias, scale, softcap)
    mask = None if mask is None else mask[:, None]
    bias = None if bias is None else bias[:, :, None]
    if kv_heads < heads:
        q = q.reshape(*q.shape[:2], kv_heads, -1, q.shape[3])
        mask = None if mask is None else mask[:, :, :, None]
        bias = None if bias is None else bias.reshape(bias.shape[0], kv_heads, 1, -1, bias.shape[-1])
    q, k, v = (jnp.moveaxis(x, 2, 1) for x in (q, k, v))
    out = jnp.moveaxis(_attention(q, k, v, mask, bias, scale, softcap), 1, 2)
    return out.reshape(*out.shape[:2], heads, -1)


def _dot(a, b, batch, contracted=1):
    """Contracts the last `contracted` axes of a with the first of b after `batch` common ones, in float32."""
    common = tuple(range(batch))
    last = tuple(range(a.ndim - contracted, a.ndim))
    first = tuple(range(batch, batch + contracted))
    return jax.lax.dot_general(a, b, ((last, first), (common, common)), preferred_element_type=jnp.float32)


def _logits(q, k, bias, scale, softcap):
    logits = _cap(_dot(q, jnp.swapaxes(k, -1, -2), k.ndim - 2) * scale, softcap)
    return logits if bias is None else logits + bias


def _exponentials(logits, mask, most=None):
    """(exp(logits − most), most); most is the largest of each row unless given."""
    if mask is not None:
        logits = jnp.where(mask, logits, MASKED)
    if most is None:
        most = jnp.max(logits, axis=-1, keepdims=True)
    return jnp.exp(logits - most), most


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, mask, bias, scale, softcap):
    return _attention_fwd(q, k, v, mask, bias, scale, softcap)[0]


def _attention_fwd(q, k, v, mask, bias, scale, softcap):
    exps, most = _exponentials(_logits(q, k, bias, scale, softcap), mask)
    total = jnp.sum(exps, axis=-1, keepdims=True)
    out = (_dot(exps.astype(v.dtype), v, v.ndim - 2) / total).astype(v.dtype)
    return out, (q, k, v, mask, bias, out, most, total)


def _attention_bwd(scale, softcap, kept, grad):
    q, k, v, mask, bias, out, most, total = kept
    batch = k.ndim - 2
    logits = _logits(q, k, bias, scale, softcap)
    exps, _ = _exponentials(logits, mask, most)
    grad = grad.astype(jnp.float32) / total
    by_sum = jnp.sum(grad * out.astype(jnp.float32), axis=-1, keepdims=True)
    grad = grad.astype(v.dtype)
    # A row that sees nothing has uniform probabilities, whatever its logits.
    factor = jnp.where(most > MASKED, jnp.float32(scale), 0.0)
    by_logits = exps * (_dot(grad, jnp.swapaxes(v, -1, -2), batch) - by_sum) * factor
    if softcap:
        by_logits *= 1 - jnp.square(logits / softcap)
    by_logits = by_logits.astype(q.dtype)

    def by_keys(x, weights):  # transposes x, with H in front, rather than the larger weights
        if lean.is_for_cpu():
            # XLA leaves this product in bfloat16, which its CPU backend then can't compute (jaxlib 0.10.2 to 0.12).
            x, weights = (a.astype(jnp.float32) for a in (x, weights))
        out = _dot(jnp.moveaxis(x, -1, batch), weights, batch, x.ndim - 1 - batch)
        return jnp.swapaxes(out, -1, -2)

    by_q = _dot(by_logits, k, batch).astype(q.dtype)
    by_k = by_keys(q, by_logits).astype(k.dtype)
    by_v = by_keys(grad, exps.astype(v.dtype)).astype(v.dtype)
    return by_q, by_k, by_v, None, None


_attention.defvjp(_attention_fwd, _attention_bwd)


def attend_cached(q, prefix, new, *, scale, softcap=None, key_bias=None) -> jax.Array:
    """One decoding step: each sample attends to its prompt's prefix and to its own past tokens.

    The prefix keys of a prompt are held once and read by all of its samples; per sample there are only the
    few positions that it produced itself.

    Args:
      q: float[B·R, 1, N, H], the samples of a prompt side by side.
      prefix: (k float[B, S, K, H], v likewise, mask bool[B, S]).
      new: (k float[B·R, M, K, H], v likewise, mask bool[M]).
      scale, softcap: as in `attend`.
      key_bias: (float32[B·R, N, S], float32[B·R, N, M]), added to the scaled dot products with the prefix and with
        the new positions.

    Returns:
      float[B·R, 1, N, H].
    """
    pk, pv, pmask = prefix
    nk, nv, nmask = new
    batch, _, kv_heads, width = pk.shape
    q5 = q.reshape(batch, -1, kv_heads, q.shape[2] // kv_heads, width)
    nk = nk.reshape(batch, -1, *nk.shape[1:])
    nv = nv.reshape(batch, -1, *nv.shape[1:])

    f32 = dict(preferred_element_type=jnp.float32)
    on_prefix = jnp.einsum("BRKGH,BSKH->BRKGS", q5, pk.astype(q.dtype), **f32)
    on_new = jnp.einsum("BRKGH,BRMKH->BRKGM", q5, nk.astype(q.dtype), **f32)
    on_prefix, on_new = _cap(on_prefix * scale, softcap), _cap(on_new * scale, softcap)
    if key_bias is not None:
        on_prefix, on_new = (x + b.reshape(x.shape) for x, b in zip((on_prefix, on_new), key_bias, strict=True))
    on_prefix = jnp.where(pmask[:, None, None, None], on_prefix, MASKED)
    on_new = jnp.where(nmask, on_new, MASKED)
    probs = jax.nn.softmax(jnp.concatenate([on_prefix, on_new], axis=-1), axis=-1).astype(q.dtype)
    p_prefix, p_new = jnp.split(probs, [pk.shape[1]], axis=-1)
    out = jnp.einsum("BRKGS,BSKH->BRKGH", p_prefix, pv.astype(q.dtype))
    out += jnp.einsum("BRKGM,BRMKH->BRKGH", p_new, nv.astype(q.dtype))
    return out.reshape(q.shape)


def _cap(logits, softcap):
    return softcap * jnp.tanh(logits / softcap) if softcap else logits
