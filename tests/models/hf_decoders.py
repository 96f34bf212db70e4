"""Random language models of Hugging Face, and their weights in our names.

As in `tests.models.hf`, the mapping is written here apart from `paligemma_med.checkpoints`, and no parameter has a
value that would hide a missing term. Sizes are such that no swapped axis fits by chance.
"""

import functools

import numpy as np
import torch
import transformers

from paligemma_med.models import decoder
from tests.models.hf import stack

_SMALL = dict(width=42, mlp_dim=50, num_heads=6, head_dim=10)
_LLAMA = dict(norm="rms", norm_eps=1e-5, act="silu", embed_scale=False)
_BLOOM = dict(norm="layer", norm_eps=1e-5, fused=True, position="alibi", embed_norm=True, embed_scale=False)
# Eight layers, so that one sees all; a window shorter than the sequences; scores scaled by neither sqrt(head_dim) nor
# anything near it.
_GEMMA3 = dict(
    _SMALL,
    depth=8,
    num_kv_heads=2,
    vocab_size=97,
    post_norms=True,
    qk_norm=True,
    query_pre_attn_norm="rsqrt_emb_per_head",
    rope_theta=1e6,
    rope_scale=8.0,
)
CASES = {
    "gemma3 window 5": dict(_GEMMA3, window=5),
    "gemma3 window 9": dict(_GEMMA3, window=9),
    "gemma3 window 32": dict(_GEMMA3, window=32),
    "llama mha": dict(_SMALL, **_LLAMA, depth=2, num_kv_heads=6, vocab_size=61, tie=False),
    "llama gqa": dict(_SMALL, **_LLAMA, depth=3, num_kv_heads=2, vocab_size=61, tie=False, rope_theta=5e5),
    "llama tied": dict(_SMALL, **_LLAMA, depth=2, num_kv_heads=3, vocab_size=61, rope_theta=1e5),
    "bloom 4 heads": dict(
        width=36, mlp_dim=144, num_heads=4, num_kv_heads=4, head_dim=9, depth=2, vocab_size=53, **_BLOOM
    ),
    "bloom 6 heads": dict(
        width=48, mlp_dim=192, num_heads=6, num_kv_heads=6, head_dim=8, depth=3, vocab_size=53, **_BLOOM
    ),
}


def to_torch(name):
    """The random model (float32, eager attention) of a case."""
    kw = CASES[name]
    common = dict(
        vocab_size=kw["vocab_size"],
        hidden_size=kw["width"],
        intermediate_size=kw["mlp_dim"],
        num_hidden_layers=kw["depth"],
        num_attention_heads=kw["num_heads"],
        num_key_value_heads=kw["num_kv_heads"],
        head_dim=kw["head_dim"],
        attn_implementation="eager",
    )
    family = name.partition(" ")[0]
    if family == "gemma3":
        config = transformers.Gemma3TextConfig(
            **common,
            query_pre_attn_scalar=kw["width"] // kw["num_heads"],
            sliding_window=kw["window"],
            rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
                "full_attention": dict(rope_type="linear", rope_theta=kw["rope_theta"], factor=kw["rope_scale"]),
            },
        )
        model = transformers.Gemma3ForCausalLM(config)
    elif family == "llama":
        rope = dict(rope_type="default", rope_theta=kw.get("rope_theta", 1e4))
        config = transformers.LlamaConfig(
            **common, rms_norm_eps=1e-5, tie_word_embeddings=kw.get("tie", True), rope_parameters=rope
        )
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.BloomConfig(
            vocab_size=kw["vocab_size"],
            hidden_size=kw["width"],
            n_layer=kw["depth"],
            n_head=kw["num_heads"],
            attn_implementation="eager",
        )
        model = transformers.BloomForCausalLM(config)
    model = model.float().eval()
    rng = np.random.default_rng(sum(map(ord, name)))
    for path, p in model.named_parameters():
        if p.ndim == 1:
            ones = family != "gemma3" and "norm" in path + "ln_f" and path.endswith("weight")
            x = 0.3 * rng.normal(size=p.shape) + ones
        else:
            x = rng.normal(size=p.shape) / np.sqrt(p.shape[1])
        p.data = torch.tensor(x, dtype=torch.float32)
    model.tie_weights()
    return model


def _gated(state, kw, i):
    at, n, k, h = f"layers.{i}", kw["num_heads"], kw["num_kv_heads"], kw["head_dim"]

    def heads(name, count):
        return state[f"{at}.self_attn.{name}_proj.weight"].reshape(count, h, -1).transpose(0, 2, 1)

    def norm(name):
        return {"scale": state[f"{at}.{name}.weight"]}

    q, key, v = heads("q", n), heads("k", k), heads("v", k)
    if n == k:
        attn = {"qkv_einsum": {"w": np.stack([q, key, v])}}
    else:
        attn = {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([key, v])}}
    attn["attn_vec_einsum"] = {"w": state[f"{at}.self_attn.o_proj.weight"].T.reshape(n, h, -1)}
    out = {"pre_attention_norm": norm("input_layernorm")}
    if kw.get("post_norms"):
        attn |= {"q_norm": norm("self_attn.q_norm"), "k_norm": norm("self_attn.k_norm")}
        out |= {
            "post_attention_norm": norm("post_attention_layernorm"),
            "pre_ffw_norm": norm("pre_feedforward_layernorm"),
            "post_ffw_norm": norm("post_feedforward_layernorm"),
        }
    else:
        out["pre_ffw_norm"] = norm("post_attention_layernorm")
    gate, up, down = (state[f"{at}.mlp.{x}_proj.weight"].T for x in ("gate", "up", "down"))
    return {**out, "attn": attn, "mlp": {"gating_einsum": np.stack([gate, up]), "linear": down}}


def _bloom(state, kw, i):
    at, n, h = f"h.{i}", kw["num_heads"], kw["head_dim"]

    def dense(name):
        return {"kernel": state[f"{at}.{name}.weight"].T, "bias": state[f"{at}.{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{at}.{name}.weight"], "bias": state[f"{at}.{name}.bias"]}

    qkv, out = dense("self_attention.query_key_value"), dense("self_attention.dense")
    return {
        "pre_attention_norm": norm("input_layernorm"),
        "attn": {
            "qkv": {"kernel": qkv["kernel"].reshape(-1, n, 3, h), "bias": qkv["bias"].reshape(n, 3, h)},
            "out": {"kernel": out["kernel"].reshape(n, h, -1), "bias": out["bias"]},
        },
        "pre_ffw_norm": norm("post_attention_layernorm"),
        "mlp": {"up": dense("mlp.dense_h_to_4h"), "down": dense("mlp.dense_4h_to_h")},
    }


def to_tree(model, name):
    """Its weights as our decoder's parameters."""
    kw = CASES[name]
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    state = {k.removeprefix("model.").removeprefix("transformer."): v for k, v in state.items()}
    if name.startswith("bloom"):
        table, last, layer = "word_embeddings.weight", "ln_f", _bloom
    else:
        table, last, layer = "embed_tokens.weight", "norm", _gated
    out = {
        "embedder": {"input_embedding": state[table]},
        "layers": stack([layer(state, kw, i) for i in range(kw["depth"])]),
        "final_norm": {"scale": state[f"{last}.weight"]},
    }
    if not kw.get("tie", True):
        out["embedder"]["output_embedding"] = state["lm_head.weight"]
    if name.startswith("bloom"):
        out["final_norm"]["bias"] = state["ln_f.bias"]
        embed_norm = "word_embeddings_layernorm"
        out["embed_norm"] = {"scale": state[f"{embed_norm}.weight"], "bias": state[f"{embed_norm}.bias"]}
    return out


@functools.cache
def reference(name):
    """(Hugging Face model, our decoder, our parameters) of a case, made once."""
    theirs = to_torch(name)
    return theirs, decoder.Model(**CASES[name]), to_tree(theirs, name)
