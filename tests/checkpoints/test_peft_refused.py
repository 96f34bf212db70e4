"""PEFT adapters that can't be represented here, or are damaged: nothing is dropped in silence."""

import copy
import re
import warnings

import numpy as np
import peft as reference
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from paligemma_med.checkpoints import CheckpointError, adapter, peft
from tests.checkpoints import adapters
from tests.models import hf as models


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter on everything of both towers."""
    peft.save_adapter(tmp_path / "adapter", adapters.random_adapter("mqa"))
    adapters.edit(tmp_path / "adapter", target_modules=adapters.LINEAR)
    return tmp_path / "adapter"


def rewrite(folder, change):
    """Writes the tensors anew after change(dict) has been at them."""
    path = folder / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def refused(folder, match, error=CheckpointError):
    with pytest.raises(error, match=match) as e:
        peft.load_adapter(folder)
    return str(e.value)


@pytest.mark.parametrize(
    "fields",
    [
        dict(peft_type="LOHA"),
        dict(use_dora=True),
        dict(bias="lora_only"),
        dict(lora_bias=True),
        dict(modules_to_save=["lm_head"]),
        dict(use_rslora="false"),
        dict(use_rslora=1),
        dict(layers_to_transform=[0, 1]),
        dict(layers_pattern="layers"),
        dict(layer_replication=[[0, 2]]),
        dict(fan_in_fan_out=True),
        dict(trainable_token_indices=[5]),
        dict(target_parameters=["mlp.experts"]),
        dict(alora_invocation_tokens=[3]),
        dict(a_field_of_tomorrow={"x": 1}),
        dict(init_lora_weights="pissa"),
        dict(init_lora_weights="pissa_niter_16"),
        dict(init_lora_weights="corda"),
        dict(init_lora_weights="olora"),
        dict(init_lora_weights="loftq"),
        dict(init_lora_weights="lora_ga"),
        dict(r=0),
        dict(r=True),
        dict(r="8"),
        dict(lora_alpha="16"),
        dict(lora_alpha=None),
        dict(lora_dropout=None),
        dict(rank_pattern={"q_proj": 1.5}),
        dict(rank_pattern=["q_proj"]),
        dict(alpha_pattern={"q_proj": "x"}),
        dict(alpha_pattern={"(": 1}),
        dict(alpha_pattern={"(?<=q_)proj": 1}),
        dict(target_modules="(", r=3),
        dict(target_modules=[1]),
        dict(target_modules=None),
        dict(exclude_modules={"a": 1}),
    ],
    ids=str,
)
def test_configs_that_are_refused(saved, fields):
    adapters.edit(saved, **fields)
    message = refused(saved, f"{peft.CONFIG}: {next(iter(fields))} ")
    assert "\n" not in message


@pytest.mark.parametrize("alpha", [0, -1, 10**7, 1e30, 10**299])
def test_impossible_alpha(saved, alpha):
    adapters.edit(saved, lora_alpha=alpha)
    refused(saved, f"{peft.CONFIG}: LoRA alpha")


@pytest.mark.parametrize("alpha", [float("nan"), 10**400, -(10**400)])
def test_alpha_that_no_float_holds(saved, alpha):
    adapters.edit(saved, lora_alpha=alpha)
    refused(saved, f"{peft.CONFIG}: found (NaN|a whole number of 401 digits)")


def test_modules_to_save_say_what_can_be_done(saved):
    adapters.edit(saved, modules_to_save=["lm_head"])
    assert "merge_and_unload" in refused(saved, r"modules_to_save is \['lm_head'\]; expected none: ")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_how_it_began_does_not_matter_if_the_base_is_as_it_was(saved, init):
    adapters.edit(saved, init_lora_weights=init)
    adapters.assert_equal(peft.load_adapter(saved), adapters.random_adapter("mqa"))


def test_initialisations_that_change_the_base_are_peft_s(tmp_path):
    """Those refused do change it, and the others don't."""
    base = models.reference("mqa")[1].state_dict()
    for init in (True, "gaussian", "eva", "orthogonal", "pissa", "olora"):
        config = dict(target_modules=["q_proj"], r=2, init_lora_weights=init)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = reference.get_peft_model(copy.deepcopy(models.reference("mqa")[1]), reference.LoraConfig(**config))
        name = "model.language_model.layers.0.self_attn.q_proj"
        same = torch.equal(
            theirs.state_dict()[f"base_model.model.{name}.base_layer.weight"],
            base[f"{name}.weight"],
        )
        assert same == (init not in ("pissa", "olora")), init


EXTRA = {
    "base_model.model.lm_head.lora_A.weight": (3, 28),
    "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_B.bias": (32,),
    "base_model.model.model.language_model.layers.0.mlp.up_proj.lora_magnitude_vector": (44,),
    "base_model.model.model.language_model.embed_tokens.lora_embedding_A": (3, 97),
    "base_model.model.model.language_model.layers.00.self_attn.q_proj.lora_A.weight": (3, 28),
    "model.language_model.layers.0.self_attn.q_proj.lora_A.weight": (3, 28),
}


@pytest.mark.parametrize("key", EXTRA)
def test_unexpected_keys_are_listed(saved, key):
    rewrite(saved, lambda t: t.update({key: np.zeros(EXTRA[key], "f4")}))
    refused(saved, re.escape(f"{key}: unexpected"))


def test_one_module_under_two_names(saved):
    key = "base_model.model.language_model.model.layers.0.self_attn.q_proj.lora_A.weight"
    rewrite(saved, lambda t: t.update({key: np.zeros((3, 28), "f4")}))
    refused(saved, "unexpected, .*self_attn.q_proj is the same module")


def test_keys_that_target_modules_does_not_name_are_listed(saved):
    adapters.edit(saved, target_modules=[n for n in adapters.LINEAR if n != "fc1"])
    message = refused(saved, "target_modules doesn't match it")
    assert len(re.findall(r"\n  .*fc1.*: unexpected", message)) == 4  # A and B of two layers
    adapters.edit(saved, target_modules=adapters.LINEAR, exclude_modules=["fc1"])
    refused(saved, "target_modules doesn't match it")


@pytest.mark.parametrize(
    "gone, listed",
    [
        (r".*layers\.1\.mlp\.fc1\.lora_A.*", 1),  # half a module
        (r".*layers\.1\.mlp\.fc1\..*", 2),  # a layer of a target
        (r".*layers\.0\.self_attn\..*", 16),  # the first layer of q, k, v and out of both towers
        (r".*multi_modal_projector.*", 2),
        (r".*up_proj.*", 6),
        (r".*vision_tower.*", 12),  # all of a tower, whose layers nobody knows then
        (r".*language_model.*", 14),
    ],
)
def test_missing_keys_are_listed(saved, gone, listed):
    def remove(tensors):
        for key in [k for k in tensors if re.fullmatch(gone, k)]:
            del tensors[key]

    rewrite(saved, remove)
    message = refused(saved, ": missing")
    assert len(re.findall(r"\n  .*: missing", message)) == listed


def test_a_tower_that_is_not_targeted_is_not_missed(tmp_path):
    made = adapters.random_adapter("mqa", [("llm/.*/attn/.*", dict(rank=2))])
    peft.save_adapter(tmp_path / "adapter", made, key_style="5")
    for target_modules in (r".*language_model.*(q|k|v|o)_proj", r"model\.language_model\.layers\.\d+\.self_attn\..*"):
        adapters.edit(tmp_path / "adapter", target_modules=target_modules)
        adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)
    # Nor what would be targeted in some versions only, where the file fits others too.
    one = r"model\.(language_model|vision_tower\.encoder)\.layers\.\d+\.self_attn\..*"
    adapters.edit(tmp_path / "adapter", target_modules=one)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)
    adapters.edit(tmp_path / "adapter", target_modules=adapters.ATTENTION, exclude_modules=".*vision_tower.*")
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"


def test_other_ranks_than_the_config_says(saved):
    adapters.edit(saved, rank_pattern={"q_proj": 2})
    refused(saved, r"q_proj has A of shape .* but adapter_config.json gives it rank 2")


def test_layers_that_differ(saved):
    adapters.edit(saved, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 2})
    refused(saved, "differ in rank, alpha or shape")


def test_factors_that_are_no_matrices(saved):
    rewrite(saved, lambda t: t.update({f"{Q0}A.weight": t[f"{Q0}A.weight"].ravel()}))
    refused(saved, "expected a matrix")


def test_factors_of_whole_numbers(saved):
    rewrite(saved, lambda t: t.update({f"{Q0}A.weight": t[f"{Q0}A.weight"].astype("i4")}))
    refused(saved, "expected floats, found int32")


def test_files_that_are_missing_or_damaged(saved, tmp_path):
    weights = saved / peft.WEIGHTS
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(saved, "not a readable safetensors file")
    safetensors.numpy.save_file({}, weights)
    refused(saved, "holds no tensors|missing")
    weights.unlink()
    refused(saved, "has no adapter_model.safetensors", FileNotFoundError)
    (saved / "adapter_model.bin").write_bytes(b"\x80\x04\x95")
    refused(saved, "never loaded: save the adapter again", FileNotFoundError)
    (saved / peft.CONFIG).write_text("{")
    refused(saved, "not valid JSON")
    (saved / peft.CONFIG).write_text("[]")
    refused(saved, "found a list; expected an object")
    (saved / peft.CONFIG).write_text("[" * 100_000)
    refused(saved, "nested too deeply")
    refused(tmp_path, "adapter_config.json is missing", FileNotFoundError)
    refused(weights / "x", "adapter_config.json is missing", FileNotFoundError)


def test_what_is_there_is_not_overwritten_by_accident(tmp_path):
    first, second = (adapters.random_adapter("mqa", seed=s) for s in (0, 1))
    folder = tmp_path / "adapter"
    peft.save_adapter(folder, first)
    with pytest.raises(FileExistsError):
        peft.save_adapter(folder, second)
    adapters.assert_equal(peft.load_adapter(folder), first)
    peft.save_adapter(folder, second, overwrite=True)
    adapters.assert_equal(peft.load_adapter(folder), second)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError):
        peft.save_adapter(tmp_path / "other", second, overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kw):
        raise OSError("disk full")

    monkeypatch.setattr(peft.json, "dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        peft.save_adapter(tmp_path / "adapter", adapters.random_adapter("mqa"))
    assert not list(tmp_path.iterdir())


def test_arguments_that_mean_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="key_style is '6'"):
        peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa"), key_style="6")
    with pytest.raises(CheckpointError, match="0 specs and 0 pairs"):
        peft.save_adapter(tmp_path / "a", adapter.Adapter({}, {}))
