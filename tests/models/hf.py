"""The reference that the model is compared with: a random Hugging Face PaliGemma and its weights.

The mapping of weights is written here a second time, apart from `paligemma_med.checkpoints`, so
that a mistake in one does not hide in the other. Every parameter is random (biases and norms'
scales too, whose defaults 0 and 1 would hide a missing term).
"""

import functools

import numpy as np
import torch
import transformers

from paligemma_med.models import paligemma

# Small, odd and unlike each other: every width differs from every other, so that no swapped axis
# fits by chance. scalar is Hugging Face's query_pre_attn_scalar.
CASES = {
    "mqa": dict(
        image=42,
        img=dict(width=24, depth=2, mlp_dim=40, num_heads=3, patch_size=14),
        llm=dict(width=28, depth=3, mlp_dim=44, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=97),
        prefix=(5, 2, 3),
        suffix=(3, 4, 1),
    ),
    "gqa": dict(
        image=30,
        img=dict(width=20, depth=3, mlp_dim=33, num_heads=2, patch_size=6),
        llm=dict(width=36, depth=2, mlp_dim=50, num_heads=6, num_kv_heads=2, head_dim=10, vocab_size=131),
        prefix=(1, 7),
        suffix=(6, 2),
    ),
    "mha": dict(
        image=16,
        img=dict(width=12, depth=1, mlp_dim=31, num_heads=4, patch_size=16),
        llm=dict(width=18, depth=1, mlp_dim=29, num_heads=3, num_kv_heads=3, head_dim=16, vocab_size=53),
        prefix=(4, 6, 1),
        suffix=(2, 1, 5),
    ),
    "gemma2": dict(
        image=28,
        img=dict(width=16, depth=2, mlp_dim=27, num_heads=2, patch_size=14),
        llm=dict(
            width=32,
            depth=3,
            mlp_dim=41,
            num_heads=4,
            num_kv_heads=2,
            head_dim=12,
            vocab_size=89,
            post_norms=True,
            attn_logits_softcap=50.0,
            final_logits_softcap=30.0,
        ),
        scalar=12,
        prefix=(3, 5),
        suffix=(4, 1),
    ),
    # Caps low enough to bend every logit, and a scale that is not that of the head's width.
    "gemma2_emb_per_head": dict(
        image=32,
        img=dict(width=30, depth=1, mlp_dim=17, num_heads=5, patch_size=8),
        llm=dict(
            width=40,
            depth=2,
            mlp_dim=23,
            num_heads=4,
            num_kv_heads=1,
            head_dim=6,
            vocab_size=61,
            post_norms=True,
            attn_logits_softcap=1.5,
            final_logits_softcap=2.0,
            query_pre_attn_norm="rsqrt_emb_per_head",
        ),
        scalar=10,
        prefix=(2, 6, 4),
        suffix=(5, 2, 3),
    ),
    "gemma2_mha": dict(
        image=20,
        img=dict(width=18, depth=2, mlp_dim=21, num_heads=3, patch_size=5),
        llm=dict(
            width=24,
            depth=2,
            mlp_dim=37,
            num_heads=2,
            num_kv_heads=2,
            head_dim=14,
            vocab_size=71,
            post_norms=True,
            attn_logits_softcap=4.0,
            final_logits_softcap=3.0,
        ),
        scalar=14,
        prefix=(8, 2),
        suffix=(1, 7),
    ),
}


def to_torch(case):
    """A random PaliGemmaForConditionalGeneration (float32, eager attention) for a case."""
    img, llm = case["img"], case["llm"]
    text = dict(
        model_type="gemma",
        hidden_size=llm["width"],
        intermediate_size=llm["mlp_dim"],
        num_hidden_layers=llm["depth"],
        num_attention_heads=llm["num_heads"],
        num_key_value_heads=llm["num_kv_heads"],
        head_dim=llm["head_dim"],
        vocab_size=llm["vocab_size"],
    )
    if llm.get("post_norms"):
        text |= dict(
            model_type="gemma2",
            query_pre_attn_scalar=case["scalar"],
            attn_logit_softcapping=llm["attn_logits_softcap"],
            final_logit_softcapping=llm["final_logits_softcap"],
        )
    config = transformers.PaliGemmaConfig(
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=img["width"],
            intermediate_size=img["mlp_dim"],
            num_hidden_layers=img["depth"],
            num_attention_heads=img["num_heads"],
            image_size=case["image"],
            patch_size=img["patch_size"],
            vision_use_head=False,
        ),
        text_config=text,
        projection_dim=llm["width"],
        image_token_index=llm["vocab_size"],
    )
    config._attn_implementation = "eager"
    model = transformers.PaliGemmaForConditionalGeneration(config).float().eval()
    rng = np.random.default_rng(sum(map(ord, str(case))))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            x = 0.3 * rng.normal(size=p.shape) + ("layer_norm" in name and name.endswith("weight"))
        else:
            x = rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[1:]))
        p.data = torch.tensor(x, dtype=torch.float32)
    model.tie_weights()
    return model


def to_tree(state, case):
    """Tensors under Hugging Face's names (weights, or their gradients) → our tree.

    big_vision has (in, …out) kernels where PyTorch has (out, in), and stacks layers in front.
    """
    img, llm = case["img"], case["llm"]
    state = {
        k.removeprefix("model.").replace(".vision_model.", "."): v.detach().float().numpy() for k, v in state.items()
    }
    heads, head = img["num_heads"], img["width"] // img["num_heads"]
    n, kv, h = llm["num_heads"], llm["num_kv_heads"], llm["head_dim"]

    def dense(name):
        return {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]}

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def vit_layer(i):
        at = f"vision_tower.encoder.layers.{i}"
        attn = {}
        for ours, theirs in (("query", "q"), ("key", "k"), ("value", "v")):
            d = dense(f"{at}.self_attn.{theirs}_proj")
            attn[ours] = {
                "kernel": d["kernel"].reshape(-1, heads, head),
                "bias": d["bias"].reshape(heads, head),
            }
        d = dense(f"{at}.self_attn.out_proj")
        attn["out"] = {"kernel": d["kernel"].reshape(heads, head, -1), "bias": d["bias"]}
        return {
            "LayerNorm_0": norm(f"{at}.layer_norm1"),
            "LayerNorm_1": norm(f"{at}.layer_norm2"),
            "MlpBlock_0": {"Dense_0": dense(f"{at}.mlp.fc1"), "Dense_1": dense(f"{at}.mlp.fc2")},
            "MultiHeadDotProductAttention_0": attn,
        }

    def llm_layer(i):
        at = f"language_model.layers.{i}"

        def heads_of(name, count):
            w = state[f"{at}.self_attn.{name}_proj.weight"].reshape(count, h, -1)
            return w.transpose(0, 2, 1)

        q, k, v = heads_of("q", n), heads_of("k", kv), heads_of("v", kv)
        o = state[f"{at}.self_attn.o_proj.weight"].T.reshape(n, h, -1)
        qkv = (
            {"qkv_einsum": {"w": np.stack([q, k, v])}}
            if n == kv
            else {"q_einsum": {"w": q}, "kv_einsum": {"w": np.stack([k, v])}}
        )
        gate, up, down = (state[f"{at}.mlp.{x}_proj.weight"].T for x in ("gate", "up", "down"))
        norms = (
            {
                "pre_attention_norm": "input_layernorm",
                "post_attention_norm": "post_attention_layernorm",
                "pre_ffw_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            }
            if llm.get("post_norms")
            else {
                "pre_attention_norm": "input_layernorm",
                "pre_ffw_norm": "post_attention_layernorm",
            }
        )
        return {
            "attn": {**qkv, "attn_vec_einsum": {"w": o}},
            "mlp": {"gating_einsum": np.stack([gate, up]), "linear": down},
            **{a: {"scale": state[f"{at}.{b}.weight"]} for a, b in norms.items()},
        }

    kernel = state["vision_tower.embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)
    return {
        "img": {
            "embedding": {
                "kernel": kernel,
                "bias": state["vision_tower.embeddings.patch_embedding.bias"],
            },
            "pos_embedding": state["vision_tower.embeddings.position_embedding.weight"][None],
            "Transformer": {
                "encoderblock": stack([vit_layer(i) for i in range(img["depth"])]),
                "encoder_norm": norm("vision_tower.post_layernorm"),
            },
            "head": dense("multi_modal_projector.linear"),
        },
        "llm": {
            "embedder": {"input_embedding": state["language_model.embed_tokens.weight"]},
            "layers": stack([llm_layer(i) for i in range(llm["depth"])]),
            "final_norm": {"scale": state["language_model.norm.weight"]},
        },
    }


def stack(layers):
    """Equal dicts of arrays → one dict whose arrays have the layers in front."""
    if isinstance(layers[0], dict):
        return {k: stack([layer[k] for layer in layers]) for k in layers[0]}
    return np.stack(layers)


def batch_of(case, seed=0):
    """A ragged batch: image, text, mask_ar, and valid bool[B, T]; each row prompt, answer, pads."""
    rng = np.random.default_rng(seed)
    length = max(p + s for p, s in zip(case["prefix"], case["suffix"])) + 1
    shape = (len(case["prefix"]), length)
    at = np.arange(length)[None]
    prefix, suffix = (np.array(case[k])[:, None] for k in ("prefix", "suffix"))
    valid = at < prefix + suffix
    # No valid token is 0: PyTorch's embedding has no gradient at its padding row.
    text = np.where(valid, rng.integers(1, case["llm"]["vocab_size"], size=shape), 0)
    image = rng.uniform(-1, 1, size=(shape[0], case["image"], case["image"], 3))
    return dict(
        image=image.astype(np.float32),
        text=text.astype(np.int32),
        mask_ar=(at >= prefix).astype(np.int32),
        valid=valid,
    )


def torch_inputs(case, batch):
    """The same batch as keyword arguments of the Hugging Face model's forward.

    token_type_ids 0 marks the bidirectional prefix there and 1 the causal answer, just as mask_ar.
    """
    rows = len(batch["text"])
    patches = (case["image"] // case["img"]["patch_size"]) ** 2

    def after_image(x, fill):
        x = np.concatenate([np.full((rows, patches), fill), x], axis=1)
        return torch.tensor(x, dtype=torch.long)

    return dict(
        input_ids=after_image(batch["text"], case["llm"]["vocab_size"]),
        token_type_ids=after_image(batch["mask_ar"], 0),
        attention_mask=after_image(batch["valid"], 1),
        pixel_values=torch.tensor(batch["image"].transpose(0, 3, 1, 2)),
    )


@functools.cache
def reference(name):
    """(case, Hugging Face model, our model, our parameters, batch) of a named case, made once."""
    case = CASES[name]
    theirs = to_torch(case)
    ours = paligemma.Model(img=dict(variant=None, **case["img"]), llm=dict(variant=None, **case["llm"]))
    return case, theirs, ours, to_tree(theirs.state_dict(), case), batch_of(case)
