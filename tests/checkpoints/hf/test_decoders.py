"""Language models by themselves: what transformers writes is read as what it is, and what is written here as well."""

import json

import pytest
import torch
import transformers

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


@pytest.mark.parametrize("name", hf_decoders.CASES)
def test_what_is_written_is_transformers_model(name, tmp_path):
    """Every tensor to the bit, and logits, for which the config has to say the same."""
    theirs, _, params = hf_decoders.reference(name)
    hf.save_hf(tmp_path / "w", {"llm": params}, llm=hf_decoders.CASES[name])
    loaded, notes = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "w", output_loading_info=True, attn_implementation="eager"
    )
    assert type(loaded) is type(theirs) and not any(notes.values())
    want = theirs.state_dict()
    assert loaded.state_dict().keys() == want.keys()
    assert all(torch.equal(x, want[n]) for n, x in loaded.state_dict().items())
    tokens = torch.tensor([[5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]])
    with torch.no_grad():
        assert torch.equal(loaded.eval()(tokens).logits, theirs(tokens).logits)
    assert_same(hf.open_hf(tmp_path / "w"), {"llm": params})
    assert decoder.Model(**hf.model_config(tmp_path / "w")["llm"]) == decoder.Model(**hf_decoders.CASES[name])


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("llama gqa", None, "no known variant, and its eps and RoPE's base are not among the weights: .* llm=dict"),
        ("llama gqa", dict(norm="rms_plus_one"), "llm has norm='rms_plus_one', but transformers' LLaMA has 'rms'"),
        ("llama gqa", dict(width=43), "llm says width=43, but the weights have 42"),
        ("llama gqa", dict(query_pre_attn_norm="rsqrt_emb_per_head"), "llm has query_pre_attn_norm='rsqrt_emb_per"),
        ("bloom 4 heads", dict(position="rope"), "llm has position='rope', but transformers' BLOOM has 'alibi'"),
        (
            "gemma3 window 5",
            dict(final_logits_softcap=3.0),
            "final_logits_softcap=3.0, but transformers' Gemma 3 has None",
        ),
    ],
)
def test_models_that_transformers_has_not_are_not_written(name, change, message, tmp_path):
    llm = None if change is None else {**hf_decoders.CASES[name], **change}
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "w", {"llm": hf_decoders.reference(name)[2]}, llm=llm)
    assert not (tmp_path / "w").exists()
