"""PaliGemma's names and config.json: every generation of them, and what asks for another model."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
import transformers

from paligemma_med.checkpoints import CheckpointError, hf
from paligemma_med.checkpoints.hf import families, gemma, layout, siglip, write
from paligemma_med.checkpoints.hf import paligemma as names
from paligemma_med.models import lora_targets, paligemma
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.hf.folders import edit_config, rewrite, tensors_of, theirs_saved
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference

BF16 = np.dtype(ml_dtypes.bfloat16)


# --- the table ------------------------------------------------------------------------------------


def test_every_target_has_the_module_that_holds_its_weight():
    # For each target a random weight, put into the torch model alone, moves only that parameter.
    for name in ("mqa", "mha"):
        case, model, _, params, _ = reference.reference(name)
        flat = flatten_tree(params)
        modules = {names.canonical(n) for n, _ in model.named_modules()}
        state = {names.canonical(k): k for k in model.state_dict()}
        for target in lora_targets.TARGETS:
            if target.param not in flat:
                continue
            module = families.modules_of(names)[target]
            assert module.format(i=0) in modules
            changed = dict(model.state_dict())
            key = state[module.format(i=0) + ".weight"]
            changed[key] = changed[key] + 1
            after = flatten_tree(reference.to_tree(changed, case))
            moved = {k for k in flat if not np.array_equal(flat[k], after[k])}
            assert moved == {target.param}, target.name
            difference = after[target.param] - flat[target.param]
            if target.stacked:
                difference = difference[0]
            if target.index is not None:
                assert np.count_nonzero(np.delete(difference, target.index, 0)) == 0
                difference = difference[target.index]
            assert np.all(difference != 0)


@pytest.mark.parametrize(
    "name, want",
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj"),
        ("model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "vision_tower.encoder.layers.1.mlp.fc1"),
        ("vision_tower.vision_model.post_layernorm.weight", "vision_tower.post_layernorm"),
        ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm"),
        ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear"),
        ("language_model.lm_head.weight", "lm_head"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_canonical_names(name, want):
    assert names.canonical(name) == want + ".weight"
    assert names.canonical(names.canonical(name)) == want + ".weight"


@pytest.mark.parametrize("px, count", [(224, 2_923_466_480), (448, 2_924_351_216)])
def test_the_3b_tree_becomes_the_tensors_of_googles_pages(px, count):
    flat = flatten_tree(paligemma.abstract_params(paligemma.Model(), image_size=px))
    sizes = layout.measure({path: leaf.shape for path, leaf in flat.items()})
    plan = write._plan(names, flat, names.table(flat.keys()), sizes, BF16)
    shapes = {t.name: t.shape for t in plan}
    assert len(shapes) == 603
    assert sum(math.prod(s) for s in shapes.values()) == count
    tower, text = "vision_tower.vision_model", "language_model.model"
    for name, shape in {
        f"{tower}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": ((px // 14) ** 2, 1152),
        f"{tower}.encoder.layers.26.self_attn.out_proj.weight": (1152, 1152),
        f"{tower}.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        f"{tower}.post_layernorm.bias": (1152,),
        "multi_modal_projector.linear.weight": (2048, 1152),
        f"{text}.embed_tokens.weight": (257216, 2048),
        f"{text}.layers.17.self_attn.k_proj.weight": (256, 2048),
        f"{text}.layers.17.mlp.down_proj.weight": (2048, 16384),
        f"{text}.layers.0.post_attention_layernorm.weight": (2048,),
        f"{text}.norm.weight": (2048,),
    }.items():
        assert shapes[name] == shape
    shards = write._shards(plan, 2 * 2**30)
    assert [t for shard in shards for t in shard] == plan
    assert len(shards) == 3 and all(sum(t.nbytes for t in s) <= 2**31 for s in shards)


GENERATIONS = {
    "google": ("language_model.model.", "vision_tower.vision_model.", ""),
    "4.52": ("model.language_model.", "model.vision_tower.vision_model.", "model."),
    "5": ("language_model.model.", "vision_tower.", ""),
    "none": ("language_model.", "vision_tower.", ""),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_names(generation, tmp_path):
    params = theirs_saved("gqa", tmp_path)[1]
    text, tower, rest = GENERATIONS[generation]
    renamed = {}
    for name, x in tensors_of(tmp_path).items():
        name = names.canonical(name)
        for old, new in (("language_model.", text), ("vision_tower.", tower), ("", rest)):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = x
                break
    rewrite(tmp_path, renamed)
    assert_same(hf.open_hf(tmp_path), params)


# --- config.json ----------------------------------------------------------------------------------


def test_defaults_are_those_of_transformers():
    classes = dict(
        siglip_vision_model=transformers.SiglipVisionConfig,
        gemma=transformers.GemmaConfig,
        gemma2=transformers.Gemma2Config,
    )
    tables = (siglip.DEFAULTS, siglip.FIXED, gemma.DEFAULTS, gemma.FIXED)
    for kind, values in (pair for table in tables for pair in table.items()):
        config = classes[kind]()
        found = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
        for key, value in values.items():
            assert found.get(key) == value, (kind, key)
    whole = transformers.PaliGemmaConfig()
    assert whole.image_token_index == names.IMAGE_TOKEN
    for key, section in names.SECTIONS.items():
        found = getattr(whole, key).to_dict()
        assert {k: found[k] for k in section} == section


def test_googles_sparse_config(tmp_path):
    # As in google/paligemma-3b-mix-224, which leaves out what equals the classes' defaults.
    config = dict(
        model_type="paligemma",
        image_token_index=257152,
        text_config=dict(
            hidden_size=2048,
            intermediate_size=16384,
            model_type="gemma",
            num_attention_heads=8,
            num_hidden_layers=18,
            num_key_value_heads=1,
            vocab_size=257216,
        ),
        vision_config=dict(
            hidden_size=1152,
            intermediate_size=4304,
            model_type="siglip_vision_model",
            num_attention_heads=16,
            num_hidden_layers=27,
            patch_size=14,
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = hf.model_config(tmp_path)
    img, llm = model["img"], model["llm"]
    variant = paligemma.abstract_params(paligemma.Model(), image_size=224)
    sizes = paligemma.abstract_params(paligemma.Model(img=img, llm=llm), image_size=224)
    assert jax.tree.map(lambda x: x.shape, sizes) == jax.tree.map(lambda x: x.shape, variant)
    assert sum(x.size for x in jax.tree.leaves(sizes)) == 2_923_335_408


@pytest.mark.parametrize(
    "section, change, message",
    [
        (None, dict(model_type="llava"), "model_type 'llava': expected 'bloom' or 'gemma3' or .* or 'paligemma'"),
        ("text_config", dict(model_type="llama"), "text_config has model_type 'llama'"),
        ("text_config", dict(hidden_act="relu"), "text_config.hidden_act is 'relu'"),
        ("text_config", dict(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
        ("text_config", dict(rope_parameters=dict(rope_theta=2.0)), "rope_theta is 2.0"),
        ("text_config", dict(num_hidden_layers=True), "num_hidden_layers is True"),
        ("text_config", dict(num_hidden_layers=10**12), "layers"),
        ("text_config", dict(num_hidden_layers=2), r"layers\.2.*: unexpected"),
        ("text_config", dict(num_hidden_layers=4), r"layers\.3.*: missing"),
        ("text_config", dict(hidden_size=29), r"expected \(97, 29\), found \(97, 28\)"),
        ("vision_config", dict(num_attention_heads=5), "5 heads must divide"),
        ("vision_config", dict(image_size=28), r"expected \(4, 24\), found \(9, 24\)"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(section, change, message, tmp_path):
    theirs_saved("mqa", tmp_path)
    edit_config(tmp_path, section, **change)
    with pytest.raises(CheckpointError, match=message):
        hf.open_hf(tmp_path)


def test_a_scale_of_queries_that_we_lack_is_an_error(tmp_path):
    theirs_saved("gemma2", tmp_path)
    edit_config(tmp_path, "text_config", query_pre_attn_scalar=13)
    with pytest.raises(CheckpointError, match="query_pre_attn_scalar is 13, expected head_dim .12."):
        hf.model_config(tmp_path)


def test_numbers_that_went_through_float32_are_the_same(tmp_path):
    """As in a config.json made from a GGUF file: 1e-6 is 9.999999974752427e-07 there."""
    theirs_saved("mqa", tmp_path / "w")
    model = hf.model_config(tmp_path / "w")
    edit_config(tmp_path / "w", "text_config", rms_norm_eps=float(np.float32(1e-6)))
    assert hf.model_config(tmp_path / "w") == model
    edit_config(tmp_path / "w", "text_config", rms_norm_eps=1.001e-6)
    with pytest.raises(CheckpointError, match="text_config.rms_norm_eps is 1.001e-06"):
        hf.model_config(tmp_path / "w")
