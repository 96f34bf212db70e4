"""What tests of decoding share: models small enough to check by full forward passes.

Most tests take three prompts of at most five tokens, and two samples of four, so that they share few
programs: compiling one takes seconds, running it milliseconds.
"""

import functools

import jax
import numpy as np

from paligemma_med.models import paligemma

IMG = dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(4, 4))
LLM = dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=31)
MODELS = {
    "mqa": {},
    "gqa": dict(num_kv_heads=2, depth=3),
    "mha": dict(num_kv_heads=4, scan=False),
    "gemma2": dict(
        num_kv_heads=2,
        post_norms=True,
        attn_logits_softcap=5.0,
        final_logits_softcap=3.0,
        query_pre_attn_norm="rsqrt_emb_per_head",
    ),
}
NO_EOS = -1  # no token is this one: every row runs to its end
SAMPLING = dict(max_new_tokens=4, temperature=1.3, top_p=0.95, eos_token=NO_EOS)


@functools.cache
def make(name="mqa", dtype="float32", seed=0):
    model = paligemma.Model(img=IMG, llm={**LLM, **MODELS[name]}, dtype=dtype)
    return model, draw_params(model, seed)


def draw_params(model, seed=0):
    """Random numbers in all leaves: norms matter, logits are apart, and nothing is compiled."""
    rng = np.random.default_rng(seed)
    shapes = paligemma.abstract_params(model, image_size=8)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(np.float32), shapes)


def make_batch(lengths, *, text_len=None, seed=0):
    """A ragged batch as eval pp gives it: prompts of these lengths, then pad 0, mask_ar 1."""
    rng = np.random.default_rng(seed)
    n, text_len = len(lengths), text_len or max(lengths)
    on = np.arange(text_len) < np.array(lengths)[:, None]
    return dict(
        image=rng.uniform(-1, 1, (n, 8, 8, 3)).astype(np.float32),
        text=np.where(on, rng.integers(3, 31, (n, text_len)), 0).astype(np.int32),
        mask_ar=np.where(on, 0, 1).astype(np.int32),
        mask_input=on.astype(np.int32),
    )


def rows_of(batch, rows):
    return {k: v[np.array(rows)] for k, v in batch.items()}


@functools.partial(jax.jit, static_argnames="model")
def apply(model, params, image, text, mask_ar):
    return jax.nn.log_softmax(model.apply({"params": params}, image, text, mask_ar)[0])


def full_forward(model, params, batch, new):
    """Log-probabilities float[B, V] of the tokens after the prompts and `new` [B][n]: a forward
    pass over everything, without a cache. What stands right of a causal token changes nothing."""
    lengths = batch["mask_input"].sum(axis=1)
    text = np.pad(batch["text"], ((0, 0), (0, 8)))
    mask_ar = np.pad(batch["mask_ar"], ((0, 0), (0, 8)), constant_values=1)
    for row, tokens in enumerate(new):
        text[row, lengths[row] : lengths[row] + len(tokens)] = tokens
    logp = np.asarray(apply(model, params, batch["image"], text, mask_ar))
    return logp[np.arange(len(new)), lengths - 1 + np.array([len(t) for t in new])]
