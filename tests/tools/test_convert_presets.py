"""The converter on runs of models that aren't PaliGemma: what of them PyTorch loads, and what can't be written."""

import json

import numpy as np
import pytest
import transformers

from paligemma_med.checkpoints import CheckpointError, adapter, compose, forms, hf, npz, peft, workdir
from paligemma_med.models import presets, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints import adapters, test_in_parts
from tests.checkpoints.trees import assert_same
from tests.models import test_presets
from tools.convert_checkpoint import convert


def run_of(folder, kw, flat, rules, trained):
    """A workdir of a run that began from base.npz, with random adapters and `trained` leaves of its own."""
    made = adapters.random_on(flat, rules)
    npz.save_npz(folder / "base.npz", unflatten_tree(flat))
    params, _ = adapter.insert_adapter(unflatten_tree(flat), made)
    own = {n: x for n, x in flatten_tree(params).items() if lora.is_factor(n)}
    own |= {n: flat[n] + 1 for n in trained}
    (folder / "run").mkdir()
    config = dict(model=kw, model_init=str(folder / "base.npz"), lora=rules)
    (folder / "run" / "config.json").write_text(json.dumps(config))
    with workdir.Checkpoints(folder / "run") as saved:
        saved.save(3, own, {})
    return str(folder / "run"), made, {**flat, **own}


def test_a_model_in_parts(tmp_path):
    kw, flat, _ = test_in_parts.tiny("bloom_qformer")
    rules = test_in_parts.RULES["bloom_qformer"]
    trained = [n for n in flat if n.startswith("connector/")]
    run, made, tree = run_of(tmp_path, kw, flat, rules, trained)
    convert(run, tmp_path / "hf", "hf", base_model="bigscience/bloomz-7b1")
    assert {f.name for f in (tmp_path / "hf").iterdir()} == {"README.md", "decoder", "connector.safetensors"}
    adapters.assert_equal(peft.load_adapter(tmp_path / "hf" / "decoder"), made)
    config = json.loads((tmp_path / "hf" / "decoder" / peft.CONFIG).read_text())
    assert config["base_model_name_or_path"] == "bigscience/bloomz-7b1"
    read = compose.for_model(flatten_tree(forms.open_params(str(tmp_path / "hf" / "connector.safetensors"))), flat)
    assert all(np.array_equal(np.asarray(read[n]), tree[n]) for n in trained) and {*read} == {*trained}
    card = (tmp_path / "hf" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "bigscience/bloomz-7b1"\npipeline_tag')
    assert "only what the run changed is here" in card and "The run's folder has no evaluation." in card
    convert(run, tmp_path / "peft", "peft")
    assert "A LoRA adapter" in (tmp_path / "peft" / "README.md").read_text()
    adapters.assert_equal(peft.load_adapter(tmp_path / "peft"), made)
    # Merged, the decoder is whole; the tower is its source's and isn't written again.
    convert(run, tmp_path / "merged", "hf", merge=True)
    assert {f.name for f in (tmp_path / "merged").iterdir()} == {"README.md", "decoder", "connector.safetensors"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged" / "decoder")
    merged, _ = adapter.insert_adapter(unflatten_tree(flat), made)
    merged = flatten_tree(adapter.merge(merged, made.specs))["llm/layers/attn/qkv/kernel"]
    name = "transformer.h.0.self_attention.query_key_value.weight"
    np.testing.assert_array_equal(loaded.state_dict()[name].numpy(), merged[0].reshape(merged.shape[1], -1).T)
    with pytest.raises(FileExistsError, match="exists; pass --overwrite"):
        convert(run, tmp_path / "hf", "hf")
    convert(run, tmp_path / "hf", "hf", overwrite=True)
    # From the source, with the adapter put in; without a config, what BLOOM needs isn't known.
    with pytest.raises(CheckpointError, match="eps are not among the weights: say them with llm=dict"):
        convert(tmp_path / "base.npz", tmp_path / "x", "hf", adapter_dir=tmp_path / "hf", merge=True)
    assert not (tmp_path / "x").exists()


def test_adapters_of_two_parts(tmp_path):
    kw, flat, _ = test_in_parts.tiny("llama_clip")
    run, made, tree = run_of(tmp_path, kw, flat, test_in_parts.RULES["llama_clip"], ["img/head/kernel"])
    convert(run, tmp_path / "peft", "peft")
    assert {f.name for f in (tmp_path / "peft").iterdir()} == {"README.md", "decoder", "tower"}
    assert (tmp_path / "peft" / "README.md").read_text().startswith("---\nlibrary_name: peft\npipeline_tag")
    adapters.assert_equal(forms.load_adapter(tmp_path / "peft"), made)
    convert(run, tmp_path / "hf", "hf")
    adapters.assert_equal(forms.load_adapter(tmp_path / "hf"), made)
    head = forms.open_params(str(tmp_path / "hf" / "connector.safetensors"))
    assert np.array_equal(compose.for_model(flatten_tree(head), flat)["img/head/kernel"], tree["img/head/kernel"])
    # The adapters and the head put onto the source give the run.
    convert(tmp_path / "base.npz", tmp_path / "with.npz", "npz", adapter_dir=tmp_path / "hf")
    assert_same(
        npz.open_npz(tmp_path / "with.npz"), unflatten_tree({**tree, "img/head/kernel": flat["img/head/kernel"]})
    )
    with pytest.raises(CheckpointError, match="transformers' ViT has .*encoder_norm/bias, which this tower hasn't"):
        convert(run, tmp_path / "x", "hf", merge=True)
    # A stage that trained more of the tower: adapters alone would lose it.
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "config.json").write_text(
        json.dumps(dict(model=kw, model_init=run, lora=test_in_parts.RULES["llama_clip"]))
    )
    with workdir.Checkpoints(tmp_path / "more") as saved:
        saved.save(3, {"img/pos_embedding": flat["img/pos_embedding"] + 1}, {})
    with pytest.raises(CheckpointError, match="img/pos_embedding is the run's own, which its adapters can't hold"):
        convert(str(tmp_path / "more"), tmp_path / "x", "hf")


def test_medgemma(tmp_path):
    """Merged, it is what Gemma3ForConditionalGeneration loads; its adapter is one folder for tower and decoder."""
    kw = {**presets.PRESETS["medgemma_4b"], **test_presets.TINY["medgemma_4b"]}
    kw["llm"] = dict(kw["llm"], num_heads=2, num_kv_heads=1)
    shapes = flatten_tree(vlm.abstract_params(vlm.Model(**kw), image_size=64))
    rng = np.random.default_rng(0)
    flat = {n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()}
    rules = [("connector/.*", None), (".*", dict(rank=2, alpha=2))]
    run, made, tree = run_of(tmp_path, kw, flat, rules, ["connector/proj/kernel", "connector/norm/scale"])
    convert(run, tmp_path / "peft", "peft", key_style="5")
    adapters.assert_equal(peft.load_adapter(tmp_path / "peft"), made)
    with pytest.raises(CheckpointError, match="adapters.*--merge.*--to peft"):
        convert(run, tmp_path / "x", "hf")
    convert(run, tmp_path / "hf", "hf", merge=True)
    model, notes = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(model).__name__ == "Gemma3ForConditionalGeneration" and not any(notes.values())
    merged, _ = adapter.insert_adapter(unflatten_tree({n: x for n, x in tree.items() if n in flat}), made)
    assert_same(hf.open_hf(tmp_path / "hf"), adapter.merge(merged, made.specs))
    assert vlm.Model(**hf.model_config(tmp_path / "hf")).leaves.keys() == flat.keys()
