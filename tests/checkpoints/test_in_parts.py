"""Models that transformers has no class for: what is written of them is what PEFT and transformers load."""

import copy
import functools
import warnings

import jax
import numpy as np
import peft as reference
import pytest
import torch
import transformers

from paligemma_med.checkpoints import CheckpointError, adapter, compose, forms, hf, in_parts, peft
from paligemma_med.checkpoints.hf import connectors, families
from paligemma_med.models import presets, vlm
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints import adapters
from tests.checkpoints.hf.folders import tensors_of
from tests.models import test_presets
from tests.models import test_towers as towers

RULES = {
    "llama_clip": [
        ("llm/layers/attn/.*", dict(rank=3, alpha=6)),
        ("img/.*MultiHeadDotProductAttention_0/.*", dict(rank=2, alpha=4)),
    ],
    "bloom_qformer": [("llm/layers/attn/qkv/kernel", dict(rank=3, alpha=6))],
    "pefomed": [("llm/layers/attn/qkv_einsum/w:[qv]", dict(rank=3, alpha=6))],
}
CLASSES = dict(llama_clip="Llama", bloom_qformer="Bloom", pefomed="Llama")
BLOOM = dict(width=32, mlp_dim=128, num_heads=4, num_kv_heads=4, head_dim=8)


@functools.cache
def tiny(name, **connector):
    """(arguments of a preset's model in a tiny form, random parameters, {path: array}, an adapter)."""
    kw = {**presets.PRESETS[name], **test_presets.TINY[name]}
    if between := {**(presets.PRESETS[name].get("connector") or {}), **kw.get("connector", {}), **connector}:
        kw["connector"] = between
    if name == "bloom_qformer":
        kw["llm"] = {**kw["llm"], **BLOOM}
    rng = np.random.default_rng(0)
    shapes = flatten_tree(vlm.abstract_params(vlm.Model(**kw), image_size=32))
    flat = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()}
    return kw, flat, adapters.random_on(flat, RULES[name])


def dicts(kw):
    return {k: kw.get(k) for k in ("img", "llm", "connector")}


def merged_state(model, folder):
    """The weights of a transformers model with an adapter of a folder merged in; a missing or unexpected key fails."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = reference.PeftModel.from_pretrained(copy.deepcopy(model), folder)
        found = adapted.load_adapter(folder, "again")
    assert not found.missing_keys and not found.unexpected_keys
    return adapted.merge_and_unload().state_dict()


@pytest.mark.parametrize("name", RULES)
def test_adapters_and_connector_are_what_peft_loads_and_what_is_read(name, tmp_path):
    kw, flat, made = tiny(name)
    params, specs = adapter.insert_adapter(unflatten_tree(flat), made)
    own = [n for n in flat if n.startswith(("connector/", "img/head/"))]
    in_parts.save(tmp_path / "w", params, specs=specs, own=own, **dicts(kw))
    between = {row.path for row in connectors.rows_of(flat, kw.get("connector"))}
    assert between == {*own}
    names = {f.name for f in (tmp_path / "w").iterdir()}
    assert names == {"decoder", "connector.safetensors"} | ({"tower"} if name == "llama_clip" else set())
    adapters.assert_equal(forms.load_adapter(tmp_path / "w"), made)
    # The language model's, on a base that is written whole, against our own merging.
    llm = {n: x for n, x in flat.items() if n.startswith("llm/")}
    hf.save_hf(tmp_path / "base", unflatten_tree(llm), llm=kw["llm"])
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert type(base).__name__ == f"{CLASSES[name]}ForCausalLM"
    merged = adapter.merge(params, specs)
    hf.save_hf(tmp_path / "merged", {"llm": merged["llm"]}, llm=kw["llm"])
    want = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged").state_dict()
    got = merged_state(base, tmp_path / "w" / "decoder")
    changed = 0
    for key, x in want.items():
        torch.testing.assert_close(got[key], x, rtol=0, atol=1e-5 * float(x.abs().max()))
        changed += not torch.equal(base.state_dict()[key], x)
    assert changed == sum(len(a) for t, (a, _) in made.factors.items() if t.param.startswith("llm/"))
    # What lies between is read as it was.
    read = forms.open_params(str(tmp_path / "w" / "connector.safetensors"))
    read = compose.for_model(flatten_tree(read), flat)
    assert {n: x.shape for n, x in read.items()} == {n: flat[n].shape for n in own}
    assert all(np.array_equal(np.asarray(read[n]), flat[n]) for n in own)


@pytest.mark.parametrize(
    "name, connector, names",
    [
        ("llama_clip", {}, {"model.mm_projector.weight", "model.mm_projector.bias"}),
        (
            "llama_clip",
            dict(kind="projector", hidden=20),
            {f"model.mm_projector.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")},
        ),
        ("pefomed", {}, {"llama_proj.weight", "llama_proj.bias"}),
    ],
)
def test_a_connector_has_the_names_of_its_source(name, connector, names, tmp_path):
    kw, flat, made = tiny(name, **connector)
    params, specs = adapter.insert_adapter(unflatten_tree(flat), made)
    in_parts.save(tmp_path / "w", params, specs=specs, own=(), dtype="bfloat16", **dicts(kw))
    found = tensors_of(tmp_path / "w")
    assert found.keys() == names and {str(x.dtype) for x in found.values()} == {"bfloat16"}
    weight = next(x for n, x in found.items() if n.endswith(("projector.weight", "projector.2.weight", "proj.weight")))
    assert weight.shape[0] == vlm.Model(**kw).parts["llm"].width


def test_the_query_transformer_is_what_transformers_loads(tmp_path):
    kw, flat, made = tiny("bloom_qformer")
    params, specs = adapter.insert_adapter(unflatten_tree(flat), made)
    in_parts.save(tmp_path / "w", params, specs=specs, own=(), **dicts(kw))
    found = {n: torch.tensor(x) for n, x in tensors_of(tmp_path / "w").items()}
    sizes = kw["connector"]
    config = transformers.Blip2QFormerConfig(
        hidden_size=sizes["inner"],
        num_hidden_layers=sizes["depth"],
        num_attention_heads=sizes["num_heads"],
        intermediate_size=sizes["mlp_dim"],
        encoder_hidden_size=32,
        cross_attention_frequency=2,
    )
    model = transformers.Blip2QFormerModel(config)
    theirs = {n.removeprefix("qformer."): x for n, x in found.items() if n.startswith("qformer.")}
    model.load_state_dict(theirs)
    assert {*found} - {f"qformer.{n}" for n in theirs} == {
        "query_tokens",
        "language_projection.weight",
        "language_projection.bias",
    }


def test_without_adapters_parts_are_whole_models(tmp_path):
    """BLOOM and BiomedCLIP's tower, written as `from_pretrained` loads them and read as they were."""
    kw, flat, _ = tiny("bloom_qformer")
    done = []
    in_parts.save(tmp_path / "w", unflatten_tree(flat), progress=done.append, **dicts(kw))
    assert sum(done) == sum(x.nbytes for x in flat.values())
    decoder = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "w" / "decoder")
    tower, notes = transformers.ViTModel.from_pretrained(
        tmp_path / "w" / "tower", output_loading_info=True, add_pooling_layer=False
    )
    assert type(decoder).__name__ == "BloomForCausalLM" and not any(notes.values())
    rows = {row.path: row for row in families.FAMILIES["vit"].table(flat)}
    kernel = flat["img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel"]
    assert np.array_equal(tower.state_dict()["layers.0.mlp.fc1.weight"].numpy(), kernel[0].T)
    parts = dict(
        img=tmp_path / "w" / "tower", llm=tmp_path / "w" / "decoder", connector=tmp_path / "w" / "connector.safetensors"
    )
    read = forms.open_init({k: str(v) for k, v in parts.items()})
    read = compose.for_model(flatten_tree(read), flat)
    assert read.keys() == flat.keys() and rows.keys() < flat.keys()
    assert all(np.array_equal(np.asarray(read[n]), x) for n, x in flat.items())
    again = hf.model_config(tmp_path / "w" / "tower")["img"]
    assert (again["gelu"], again["norm_eps"], again["depth"]) == ("exact", 1e-6, 1)


def test_what_no_part_can_hold_is_said(tmp_path):
    kw, flat, made = tiny("llama_clip")
    params, specs = adapter.insert_adapter(unflatten_tree(flat), made)
    with pytest.raises(
        CheckpointError, match=r"pos_embedding is the run's own, which its adapters can't hold: .*\(--merge\)$"
    ):
        in_parts.save(tmp_path / "w", params, specs=specs, own=["img/pos_embedding"], **dicts(kw))
    with pytest.raises(
        CheckpointError, match="transformers' ViT has .*/encoder_norm/bias, which this tower hasn't: keep"
    ):
        in_parts.save(tmp_path / "w", unflatten_tree(flat), **dicts(kw))
    head = adapters.random_on(flat, [("img/head/kernel", dict(rank=2))])
    params, specs = adapter.insert_adapter(unflatten_tree(flat), head)
    with pytest.raises(CheckpointError, match="factors of img/head/kernel, for which PEFT knows no linear layer"):
        in_parts.save(tmp_path / "w", params, specs=specs, own=(), **dicts(kw))
    kw, flat, _ = tiny("pefomed")
    eva = adapters.random_on(flat, [("img/.*/query/kernel", dict(rank=2))])
    params, specs = adapter.insert_adapter(unflatten_tree(flat), eva)
    with pytest.raises(CheckpointError, match="query/kernel, for which PEFT knows no linear layer by itself: merge"):
        in_parts.save(tmp_path / "w", params, specs=specs, own=(), **dicts(kw))
    with pytest.raises(CheckpointError, match="no class for this tower that is written here"):
        in_parts.save(tmp_path / "w", unflatten_tree(flat), **dicts(kw))
    with pytest.raises(CheckpointError, match="no class for this tower, connector and language model together"):
        hf.save_hf(tmp_path / "w", unflatten_tree(flat), **dicts(kw))
    assert not any(tmp_path.iterdir())


# ---- Adapters of a tower


def _adapted_tower(names):
    theirs = towers.theirs_of("vit")
    made = reference.get_peft_model(
        copy.deepcopy(theirs), reference.LoraConfig(r=3, lora_alpha=5, target_modules=names)
    )
    for key, p in made.named_parameters():
        if "lora_" in key:
            rng = np.random.default_rng([*key.encode()])
            p.data = torch.tensor(rng.normal(0, 0.2, p.shape), dtype=torch.float32)
    return theirs, made.eval()


@pytest.mark.parametrize("style", ["4.41", "5"])
def test_a_towers_adapter_of_either_names_gives_its_features(style, tmp_path):
    """… as PEFT wrote it with transformers 5, and before. Ours are written in both; 5's are those that load today."""
    theirs, adapted = _adapted_tower(["q_proj", "v_proj", "o_proj", "fc1", "fc2"])
    adapted.save_pretrained(tmp_path / "theirs")
    made = peft.load_adapter(tmp_path / "theirs")
    peft.save_adapter(tmp_path / "ours", made, model_type="vit", key_style=style)
    adapters.assert_equal(peft.load_adapter(tmp_path / "ours"), made)
    names = ["query", "value", "dense"] if style == "4.41" else ["q_proj", "v_proj", "o_proj", "fc1", "fc2"]
    adapters.edit(tmp_path / "ours", target_modules=names)
    adapters.assert_equal(peft.load_adapter(tmp_path / "ours"), made)
    if style == "4.41":
        return
    params = {"img": towers.to_tree(theirs, "vit")}
    params, specs = adapter.insert_adapter(params, made)
    merged = adapter.merge(params, specs)["img"]
    model = towers.vit.Model(**towers.SMALL, cls=True, gelu="exact", mean=(0.5,) * 3, std=(0.5,) * 3)
    got = jax.jit(lambda p: model.apply({"params": p}, towers.PIXELS)[0])(merged)
    with torch.no_grad():
        want, plain = (m(towers.torch_pixels()).last_hidden_state[:, 1:].numpy() for m in (adapted, theirs))
    scale = float(np.abs(want).max())
    assert np.abs(want - plain).max() > 0.05 * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale)
    merged_again = merged_state(theirs, tmp_path / "ours")
    for key, x in copy.deepcopy(adapted).merge_and_unload().state_dict().items():
        torch.testing.assert_close(merged_again[key], x, rtol=0, atol=1e-6)
