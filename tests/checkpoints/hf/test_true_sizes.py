"""What would be written of the published models, by shapes alone: as many bytes as on their pages, and the configs."""

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.checkpoints.hf import families, layout, write
from paligemma_med.checkpoints.hf import vit as hf_vit
from paligemma_med.models import presets, vit, vlm
from paligemma_med.models.leaves import flatten_tree

BF16 = np.dtype(ml_dtypes.bfloat16)


def planned(name, part=None):
    """(family, {name: shape}, bytes in bfloat16, config.json) of a preset, or of its part."""
    kw = presets.PRESETS[name]
    res = {"medgemma_4b": 896, "pefomed": 448}.get(name, 224)
    flat = flatten_tree(vlm.abstract_params(vlm.Model(**kw), image_size=res))
    flat = {n: x for n, x in flat.items() if part is None or n.startswith(f"{part}/")}
    family = families.of_model(flat.keys(), kw["llm"])
    sizes = layout.measure({n: x.shape for n, x in flat.items()})
    tensors = write._plan(family, flat, family.table(flat.keys()), sizes, BF16)
    config = family.make_config(sizes, flat.keys(), kw.get("img"), kw["llm"], kw.get("connector"))
    return family, {t.name: t.shape for t in tensors}, sum(t.nbytes for t in tensors), config


def test_medgemma():
    """total_size of model.safetensors.index.json of google/medgemma-4b-it."""
    family, shapes, size, config = planned("medgemma_4b")
    assert (family.NAME, len(shapes), size) == ("Gemma 3", 883, 8_600_158_944)
    text = "language_model.model"
    for name, shape in {
        "vision_tower.vision_model.embeddings.position_embedding.weight": (4096, 1152),
        "multi_modal_projector.mm_input_projection_weight": (1152, 2560),
        "multi_modal_projector.mm_soft_emb_norm.weight": (1152,),
        f"{text}.embed_tokens.weight": (262_208, 2560),
        f"{text}.layers.33.self_attn.q_norm.weight": (256,),
        f"{text}.layers.33.self_attn.k_proj.weight": (1024, 2560),
        f"{text}.layers.0.mlp.down_proj.weight": (2560, 10_240),
    }.items():
        assert shapes[name] == shape
    assert (config["mm_tokens_per_image"], config["image_token_index"], config["eos_token_id"]) == (
        256,
        262_144,
        [1, 106],
    )
    read = transformers.Gemma3Config(**config)
    of_text = read.text_config
    assert [i for i, kind in enumerate(of_text.layer_types) if kind == "full_attention"] == [5, 11, 17, 23, 29]
    assert of_text.rope_parameters["full_attention"] == dict(rope_type="linear", rope_theta=1e6, factor=8.0)
    assert of_text.rope_parameters["sliding_attention"]["rope_theta"] == 1e4
    assert (of_text.sliding_window, of_text.vocab_size, of_text.query_pre_attn_scalar) == (1024, 262_208, 256)
    assert read.vision_config.image_size == 896


@pytest.mark.parametrize(
    "name, family, size, expected",
    [
        # The first is total_size of meta-llama/Meta-Llama-3-8B; the others are published numbers of parameters.
        (
            "llama_clip",
            "LLaMA",
            16_060_522_496,
            dict(rms_norm_eps=1e-5, rope_theta=5e5, num_key_value_heads=8, bos_token_id=128_000),
        ),
        (
            "pefomed",
            "LLaMA",
            2 * 6_738_415_616,
            dict(rms_norm_eps=1e-5, rope_theta=1e4, num_key_value_heads=32, eos_token_id=2),
        ),
        (
            "bloom_qformer",
            "BLOOM",
            2 * 7_069_016_064,
            dict(n_head=32, n_layer=30, hidden_size=4096, layer_norm_epsilon=1e-5),
        ),
    ],
)
def test_language_models(name, family, size, expected):
    found, shapes, written, config = planned(name, "llm")
    assert (found.NAME, written) == (family, size)
    assert {k: config[k] for k in expected} == expected
    head = "lm_head.weight"
    assert (head in shapes) == (family == "LLaMA")
    # transformers makes the same tensors of that config, but for the tied head.
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    want = {n: tuple(x.shape) for n, x in model.state_dict().items() if n in shapes or n != head}
    assert shapes == want


def test_biomedclips_tower():
    _, shapes, written, config = planned("bloom_qformer", "img")
    assert written == 2 * 85_798_656
    assert (config["image_size"], config["patch_size"], config["hidden_act"]) == (224, 16, "gelu")
    assert shapes["embeddings.position_embeddings"] == (1, 197, 768)


def test_every_gelu_of_a_tower_has_the_name_of_what_computes_it():
    assert {*hf_vit.GELUS.values()} == {*vit.GELUS}
    x = np.linspace(-4, 4, 33, dtype=np.float32)
    for theirs, ours in hf_vit.GELUS.items():
        want = transformers.activations.ACT2FN[theirs](torch.tensor(x)).numpy()
        np.testing.assert_allclose(vit.GELUS[ours](x), want, rtol=0, atol=1e-5)
