"""Weights under the names of every version of transformers, and of files that leave something out, are one tree.

Names are those of published files and of modules (transformers' conversion mappings, PEFT's keys), written by hand.
"""

import json

import numpy as np
import pytest

from paligemma_med.checkpoints import CheckpointError, hf, lazy
from paligemma_med.models import presets, vlm
from tests.checkpoints.hf.folders import rewrite, tensors_of
from tests.checkpoints.hf.test_gemma3 import theirs
from tests.checkpoints.trees import assert_same
from tests.models import hf_decoders


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """(config.json, {name in the published style: tensor}, our tree)."""
    folder = tmp_path_factory.mktemp("gemma3")
    theirs().save_pretrained(folder)
    return (folder / "config.json").read_text(), tensors_of(folder), lazy.read_all(hf.open_hf(folder))


def renamed(state, *pairs):
    out = {}
    for name, x in state.items():
        for old, new in pairs:
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        out[name] = x
    return out


# As version 5.24 writes them: the text's are of before 4.52, the tower's of since 5.
TEXT, TOWER, BETWEEN = "language_model.model.", "vision_tower.", "multi_modal_projector."
GENERATIONS = {
    "written": (),
    "published": ((TOWER, TOWER + "vision_model."),),
    "4.52": (
        (TEXT, "model.language_model."),
        (TOWER, f"model.{TOWER}vision_model."),
        (BETWEEN, "model." + BETWEEN),
    ),
    "5": ((TEXT, "model.language_model."), (TOWER, "model." + TOWER), (BETWEEN, "model." + BETWEEN)),
}


@pytest.mark.parametrize("head", ["", "lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("name", GENERATIONS)
def test_gemma3(gemma3, tmp_path, name, head):
    """With the tied head's copy or without."""
    config, state, want = gemma3
    assert all(n.startswith((TEXT, TOWER, BETWEEN)) for n in state)
    state = renamed(state, *GENERATIONS[name])
    if head:
        state[head] = next(x for n, x in state.items() if n.endswith("embed_tokens.weight"))
    (tmp_path / "config.json").write_text(config)
    rewrite(tmp_path, state)
    assert_same(lazy.read_all(hf.open_hf(tmp_path)), want)


@pytest.mark.parametrize("name", ["gemma3 window 5", "llama gqa", "llama tied", "bloom 4 heads"])
@pytest.mark.parametrize("prefix", [True, False], ids=["whole", "bare"])
def test_language_models(tmp_path, name, prefix):
    """With what old files have besides: RoPE's frequencies, which are no weights, and heads that are tied."""
    theirs, _, params = hf_decoders.reference(name)
    theirs.config.save_pretrained(tmp_path)
    first = "transformer." if name.startswith("bloom") else "model."
    state = {n: x.detach().numpy() for n, x in theirs.state_dict().items()}
    state = {n if prefix else n.removeprefix(first): x for n, x in state.items() if prefix or "lm_head" not in n}
    if not prefix and not json.loads((tmp_path / "config.json").read_text()).get("tie_word_embeddings", True):
        state["lm_head.weight"] = theirs.lm_head.weight.detach().numpy()
    if not name.startswith("bloom"):
        state |= {f"{first * prefix}layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    rewrite(tmp_path, state)
    assert_same(lazy.read_all(hf.open_hf(tmp_path)), {"llm": params})


# What the config.json of the published weights say of arithmetic, by preset and part. Of MedGemma's the heads are the
# class' defaults.
PUBLISHED = {
    ("medgemma_4b", None): dict(
        model_type="gemma3",
        image_token_index=262_144,
        mm_tokens_per_image=256,
        text_config=dict(
            model_type="gemma3_text",
            hidden_size=2560,
            intermediate_size=10_240,
            num_hidden_layers=34,
            rope_scaling=dict(factor=8.0, rope_type="linear"),
            sliding_window=1024,
        ),
        vision_config=dict(
            model_type="siglip_vision_model",
            hidden_size=1152,
            image_size=896,
            intermediate_size=4304,
            num_attention_heads=16,
            num_hidden_layers=27,
            patch_size=14,
        ),
    ),
    ("llama_clip", "llm"): dict(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=14_336,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        rms_norm_eps=1e-5,
        rope_scaling=None,
        rope_theta=500_000.0,
        tie_word_embeddings=False,
        vocab_size=128_256,
    ),
    ("pefomed", "llm"): dict(
        model_type="llama",
        hidden_size=4096,
        intermediate_size=11_008,
        num_attention_heads=32,
        num_hidden_layers=32,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        vocab_size=32_000,
    ),
    ("bloom_qformer", "llm"): dict(
        model_type="bloom",
        n_embed=4096,
        n_layer=30,
        num_attention_heads=32,
        layer_norm_epsilon=1e-5,
        apply_residual_connection_post_layernorm=False,
        vocab_size=250_880,
    ),
    ("bloom_qformer", "img"): dict(model_type="vit", hidden_act="gelu", layer_norm_eps=1e-6),
    ("llama_clip", "img"): dict(model_type="vit", hidden_act="gelu", layer_norm_eps=1e-6),
}


@pytest.mark.parametrize("preset, part", PUBLISHED)
def test_presets_are_what_published_configs_say(tmp_path, preset, part):
    model, config = vlm.Model(**presets.PRESETS[preset]), PUBLISHED[preset, part]
    (tmp_path / "config.json").write_text(json.dumps(config))
    hf.check_agrees(tmp_path, model, part)
    if part == "llm":
        key = {"llama": "rms_norm_eps", "bloom": "layer_norm_epsilon"}[config["model_type"]]
        (tmp_path / "config.json").write_text(json.dumps({**config, key: 1e-6}))
        with pytest.raises(CheckpointError, match="says norm_eps=1e-06, but config.model.llm has 1e-05: change the"):
            hf.check_agrees(tmp_path, model, part)
