"""Language models by themselves: what transformers writes is read as the model and the weights that it is."""

import json

import pytest

from paligemma_med.checkpoints import CheckpointError, hf, lazy
from paligemma_med.models import decoder
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.hf.folders import edit_config
from tests.checkpoints.trees import assert_same
from tests.models import hf_decoders


@pytest.mark.parametrize("name", hf_decoders.CASES)
def test_what_transformers_writes_is_read(name, tmp_path):
    theirs, ours, params = hf_decoders.reference(name)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    opened = hf.open_hf(tmp_path)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert_same(opened, {"llm": params})
    model = hf.model_config(tmp_path)
    assert model.keys() == {"llm"}
    assert decoder.Model(**model["llm"]) == ours


def test_bare_names_are_the_same_model(tmp_path):
    """Files of the inner module, without the head's: `model.` and `transformer.` are left out."""
    for name in ("llama tied", "bloom 4 heads"):
        theirs, _, params = hf_decoders.reference(name)
        folder = tmp_path / name
        theirs.base_model.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config))
        assert_same(hf.open_hf(folder), {"llm": params})


@pytest.mark.parametrize(
    "name, key, value, message",
    [
        ("llama gqa", "hidden_act", "gelu", "config.json: hidden_act is 'gelu', but this model has 'silu'"),
        ("llama gqa", "attention_bias", True, "attention_bias is True"),
        ("llama gqa", "rope_parameters", dict(rope_type="llama3", factor=8.0), "rope_type is 'llama3'"),
        ("llama gqa", "rms_norm_eps", None, "rms_norm_eps is null, expected a number above 0"),
        ("llama gqa", "tie_word_embeddings", "no", "tie_word_embeddings is 'no', expected true or false"),
        ("bloom 4 heads", "n_head", 5, "5 heads must divide the width of 36"),
        ("bloom 4 heads", "apply_residual_connection_post_layernorm", True, "apply_residual.* is True"),
    ],
)
def test_configs_that_are_refused(name, key, value, message, tmp_path):
    hf_decoders.reference(name)[0].config.save_pretrained(tmp_path)
    edit_config(tmp_path, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        hf.model_config(tmp_path)


@pytest.mark.parametrize(
    "name, family",
    [("gemma3 window 5", r"Gemma 3 \(text\)"), ("llama gqa", "LLaMA"), ("bloom 4 heads", "BLOOM")],
)
def test_writing_is_refused_by_name(name, family, tmp_path):
    with pytest.raises(CheckpointError, match=f"{family} is read, but not written yet"):
        hf.save_hf(tmp_path / "w", {"llm": hf_decoders.reference(name)[2]})
    assert not (tmp_path / "w").exists()
