"""Every key of our configs in big_vision's words, and every config file through `translate`."""

import importlib
import json
import re

import ml_collections
import pytest

from paligemma_med import input_pipeline
from paligemma_med.config import values as config_values
from paligemma_med.models import paligemma
from paligemma_med.models.layers import lora
from paligemma_med.training import optim
from paligemma_med.upstream import config as upstream_config
from paligemma_med.upstream import model as upstream_model
from paligemma_med.upstream.config import INPUT_KEYS, KEYS, translate
from tests import tiny

CONFIGS = [
    "quickstart:stage=1",
    "quickstart:stage=2",
    "slake_mini:",
    "slake_mini:turns=2",
    "stage1_slake:",
    "stage1_slake:lang=all,res=224",
    "stage2_medpix2:",
    "stage2_rocov2:letters,lora=figure",
    "stage2_pmc_vqa:answer=text",
    "stage2_rocov2_medpix2:anneal=False",
    "stage2_medpix2:tiny,samples=5",
]
# A value for each key that isn't idle, so that the table is true of what `translate` does.
BUSY = dict(
    grad_accum_steps=2,
    supervised_len=3,
    loss_chunk=4,
    keep_ckpt=5,
    tensorboard=True,
    wandb=True,
    peak_tflops=10.0,
    loss_norm="token",
    skip_nonfinite=3,
    ema_decay=0.9,
    keep_best=dict(metric="val/acc"),
)


def get_config(spec):
    name, _, arg = spec.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(arg)


def quiet(config):
    return translate(config, note=lambda text: None)


def test_the_table_has_every_key_of_ours_and_no_other():
    assert set(KEYS) == config_values.KEYS
    assert set(INPUT_KEYS) == input_pipeline.KEYS | input_pipeline.IGNORED_KEYS
    kinds = ("same", "kept", "translated", "launched", "ignored", "left out", "refused")
    for name, key in {**KEYS, **INPUT_KEYS}.items():
        assert key.what in kinds, name
        assert key.why or key.what == "same", f"{name}: no reason"


@pytest.mark.parametrize("name", sorted(KEYS))
def test_each_key_does_what_the_table_says(name):
    key, config, notes = KEYS[name], tiny.config(), []
    with config.unlocked():
        if name in BUSY:
            config[name] = BUSY[name]
    if key.what == "refused":
        with pytest.raises(ValueError, match=f"config.{name} is .* big_vision's trainer {key.why[:9]}"):
            translate(config)
        return
    out = translate(config, note=notes.append)
    if key.what in ("same", "kept") and config.get(name) is not None:
        assert out[name] == config[name]
    if key.what == "left out":
        assert name not in out and [n for n in notes if n.startswith(f"config.{name} = ")], name
    if key.what == "launched":
        assert name not in out


def test_idle_values_are_silent():
    notes = []
    translate(
        tiny.config(
            grad_accum_steps=1,
            loss_norm="example",
            skip_nonfinite=0,
            keep_best=None,
            tensorboard=False,
            wandb=False,
            keep_ckpt=2,
        ),
        note=notes.append,
    )
    assert notes == []


def test_weight_decay_of_adapters_is_said():
    """Kernels alone decay by big_vision's default, and by ours what adapts one as well."""
    lora = [(".*", dict(rank=2))]
    assert translate(tiny.config(wd=0.1, lora=lora)).wd_mults == [(optim.DECAYED, 1.0)]
    assert translate(tiny.config(wd=0.1, lora=lora, wd_mults=[(".*", 2.0)])).wd_mults == [(".*", 2.0)]
    assert "wd_mults" not in translate(tiny.config(wd=0.1)) and "wd_mults" not in translate(tiny.config(lora=lora))


def test_unknown_keys_are_refused():
    with pytest.raises(ValueError, match="unknown keys.*did you mean 'lr'"):
        translate(tiny.config(lrr=1))
    config = tiny.config()
    config.input.pq = "x"
    with pytest.raises(ValueError, match="config.input has unknown keys"):
        translate(config)


@pytest.mark.parametrize("spec", CONFIGS)
def test_config_files_are_translated_unchanged(spec):
    config = get_config(spec)
    before = config.to_json_best_effort()
    out = quiet(config)
    assert config.to_json_best_effort() == before
    json.loads(out.to_json())  # as its trainer writes it
    model = upstream_model.Model(**ml_collections.FrozenConfigDict(out.model))
    assert hash(model) == hash(
        paligemma.Model(dtype=config.get("dtype", "float32"), lora=config.get("lora"), **config.model)
    )
    assert not set(out) - ITS_KEYS - {n for n, k in KEYS.items() if k.what == "kept"}


# What trainers/proj/paligemma/train.py @0127fb6 reads, and big_vision/optax.py with it.
ITS_KEYS = set(
    """
    seed mesh mesh_allow_split_physical_axes sharding_strategy sharding_rules pp_modules
    prefetch_to_device input total_steps total_epochs total_examples model_name model model_init
    model_load resume optax_name optax lr lr_mults wd wd_mults schedule grad_clip_norm
    grad_clip_per_example label_smoothing evals
    log_training_steps log_training_epochs log_training_examples log_training_percent
    ckpt_steps ckpt_epochs ckpt_examples ckpt_percent
    keep_ckpt_steps keep_ckpt_epochs keep_ckpt_examples keep_ckpt_percent
    """.split()
)


def test_a_constant_schedule_is_a_stair_without_steps():
    out = quiet(get_config("stage1_slake:"))
    assert [s and dict(s) for _, s in out.schedule] == [{"decay_type": "stair"}, None]
    assert dict(quiet(tiny.config(schedule=dict(warmup_steps=2))).schedule) == {
        "decay_type": "stair",
        "warmup_steps": 2,
    }
    cosine = dict(decay_type="cosine", warmup_percent=0.1)
    assert dict(quiet(tiny.config(schedule=cosine)).schedule) == cosine


def test_a_mixture_has_its_pp_with_each_set():
    config = get_config("stage2_rocov2_medpix2:anneal=False,medpix=0.25")
    out = quiet(config).input
    assert dict(out.data) == {"rocov2": 0.75, "medpix2": 0.25}
    for name in out.data:
        assert out[name].pp == config.input.pp and out[name].data.split == "train"
        assert out[name].shuffle_buffer_size == upstream_config.SHUFFLE_BUFFER
    assert set(out) == {"data", "batch_size", "rocov2", "medpix2"}  # it asserts the others away
    with pytest.raises(ValueError, match="config.input.anneal .* anneal=False"):
        translate(get_config("stage2_rocov2_medpix2:"), note=lambda text: None)


def test_input_keys():
    config = tiny.config()
    config.input.update(on_error="skip", prefetch=3, allow_missing_eos=True, num_workers=2)
    out = quiet(config)
    assert out.prefetch_to_device == 3 and out.input.skip_errors
    assert out.input.pp == config.input.pp and out.input.data == config.input.data
    assert not {"on_error", "prefetch", "allow_missing_eos", "num_workers"} & set(out.input)


def test_weights_and_what_is_frozen_go_to_load():
    config = get_config("stage2_medpix2:tiny,stage1=out/x")
    out = quiet(config)
    assert out.model_init == "out/x"
    assert dict(out.model_load) == dict(
        resample_posemb=False,
        base="",
        allow_nonfinite=False,
        adapter_init="",
        frozen_dtype="float32",
        trained=[(".*/lora_[ab]", True), (".*", False)],
    )
    config.frozen_dtype, config.resample_posemb = "bfloat16", True
    assert quiet(config).model_load.frozen_dtype == "bfloat16"
    assert quiet(config).model_load.resample_posemb
    with pytest.raises(ValueError, match="frozen_dtype is 'nf4'.*knows no quantised"):
        quiet(tiny.config(frozen_dtype="nf4"))
    with pytest.raises(ValueError, match="config.model has image_ar, but big_vision's trainer has PaliGemma alone"):
        quiet(tiny.config(model=dict(tiny.MODEL, image_ar="causal")))
    config.model_init, config.adapter_init = None, "out/adapter"
    with pytest.raises(ValueError, match="adapter_init is 'out/adapter'.*without a model_init"):
        translate(config)


def test_evals_keep_their_section_whole():
    config = tiny.config()
    theirs = dict(type="proj.paligemma.transfers.vqa", pred="decode", log_steps=2)
    config.evals.its = theirs
    config.evals.late = config.evals.val.copy_and_resolve_references()
    del config.evals.late.log_steps
    out = quiet(config).evals
    assert dict(out.its) == theirs
    assert out.val.log_steps == 3 and "log_percent" not in out.val
    assert out.late.log_percent == 1.0 and out.late.skip_first
    want = {k: v for k, v in config.evals.val.to_dict().items() if k != "log_steps"}
    assert out.val.section.to_dict() == want
    assert (out.val.type, out.val.pred, out.val.name) == ("paligemma_med", "logits", "val")


def test_strategies_are_in_its_form():
    rules = [("llm/layers/.*", 'shard_dim(axis="data", dim=1)|fsdp()'), (".*", "replicate")]
    out = quiet(tiny.config(sharding_strategy=rules)).sharding_strategy
    assert [s for _, s in out] == ["shard_dim(axis='data', dim=1)|fsdp(axis='data')", "replicate()"]
    match = re.compile(out[0][0]).fullmatch
    assert match("params/llm/layers/attn/q_einsum/w") and match("opt/0/mu/llm/layers/mlp/linear")
    assert not match("params/img/head/kernel") and not match("params/xllm/layers/mlp/linear")
    with pytest.raises(ValueError, match="tp.*replicate, fsdp and shard_dim alone"):
        translate(tiny.config(sharding_strategy=[(".*", 'tp(axis="data")')]))


def test_the_model_takes_lora_as_pairs_or_dicts():
    config = tiny.config(lora=[("llm/layers/mlp/linear", None), (".*", dict(rank=2, alpha=8))])
    model = upstream_model.Model(**ml_collections.FrozenConfigDict(quiet(config).model))
    assert model == upstream_model.Model(**config.model, lora=config.lora)
    assert model.lora == lora.as_rules(config.lora) and isinstance(model, paligemma.Model)
