"""Values of other types than a config's key has: one sentence with the key, before anything is read or traced."""

import pytest

from paligemma_med.checkpoints import CheckpointError
from paligemma_med.checkpoints.hf.config import Section
from paligemma_med.config import durations
from paligemma_med.config import values as config_values
from paligemma_med.models.layers import lora
from tests import tiny

PAIRS = (3, "x", [3], [("a",)], [("a", 1, 2)], [(1, 2)], {"a": 1}, [["a", b"x"]])
CONNECTORS = (
    *(dict(factor=x) for x in ("4", 0, 2.5, True)),
    *(dict(reduce=x) for x in ("mean", 3, ["pool"])),
    *({name: "no"} for name in ("norm", "bias")),
    dict(hidden=-1),
    dict(widht=3),
)
TOWERS = (
    *({name: "no"} for name in ("cls", "keep_cls", "patch_bias", "key_bias")),
    *({name: x} for name in ("norm_eps", "pre_norm", "final_norm") for x in ("1e-6", 0, True)),
    *(dict(mean=x, std=[1.0] * 3) for x in (0.5, [0.5], ["a"] * 3)),
    *(dict(gelu=x) for x in ("relu", 3, ["exact"])),
)
DECODERS = (
    *({name: 1} for name in ("fused", "qk_norm", "embed_scale", "embed_norm", "tie")),
    *({name: x} for name in ("rope_theta", "rope_scale", "local_rope_theta") for x in ("1e4", 0, float("nan"))),
    *({name: x} for name in ("window", "window_every") for x in (0, 2.5, "8")),
    *({name: x} for name in ("norm", "act", "position") for x in ("x", 3, ["rms"])),
)
WRONG = [
    *((key, value) for key in ("lora", "lr_mults", "wd_mults", "mesh", "sharding_strategy") for value in PAIRS),
    *(("sharding_rules", value) for value in PAIRS),
    *(("schedule", value) for value in PAIRS if not isinstance(value, dict)),
    *(("model_init", value) for value in (3, ["x"], {"img": 3})),
    *(("adapter_init", value) for value in (3, ["x"], {"a": "b"})),
    *(("keep_best", value) for value in (3, "val/acc", ["val/acc"])),
    *(("compilation_cache", value) for value in (3, ["x"])),
    *(("frozen_dtype", value) for value in (["int8"], {"a": 1}, 8)),
    *(("attn_impl", value) for value in (["xla"], {}, 1)),
    *(("res", value) for value in (1e30, 10**300, "32", True, None)),
    *(("lr", value) for value in (float("nan"), float("inf"), 1e308, 10**400, "1e-3", None)),
    ("model", {"img": dict(variant=("mu", 16)), "llm": {}}),
    ("model", {"img": dict(variant="mu/16", patch_size="16"), "llm": {}}),
    ("model", {"img": {}, "llm": dict(variant="gemma_mu", attn_logits_softcap="abc")}),
    ("model", {"img": {}, "llm": dict(variant="gemma_mu", final_logits_softcap=True)}),
    ("model", {"img": {}, "llm": {}, "llm_model": ["x"]}),
    ("model", {"img": {}, "llm": {}, "connector": {"kind": ["x"]}}),
    *(("model", {"img": {}, "llm": {}, "connector": dict(kind="projector") | kw}) for kw in CONNECTORS),
    *(("model", {"img": dict(variant="mu/16") | kw, "llm": {}}) for kw in TOWERS),
    *(("model", {"img": {}, "llm": dict(variant="gemma_mu") | kw}) for kw in DECODERS),
]
IN_EVALS = [
    *(("controls", value) for value in ("echo", 3, [3], {"echo": 1})),
    *(("choices", value) for value in ("choice_a", 3, [None])),
    *(("groups", value) for value in ("location", [1])),
    *(("pred_kw", value) for value in (3, "x", ["x"])),
    *(("data", value) for value in (3, "phantom", None, {"name": 3}, {"name": "phantom", "split": ["train"]})),
    *(("train_data", value) for value in (3, "phantom", {"name": "x", "split": 3})),
    *(("batch_size", value) for value in (None, 0, "8", 2.5, 10**30)),
    *(("skip_first", value) for value in (1, "yes")),
    *(("protocol", value) for value in (3, ["vqa"])),
    *(("shuffle_seed", value) for value in (-1, 2**32, "x")),
]


def refused(config, where):
    with pytest.raises(ValueError, match=where) as e:
        config_values.checked_for_training(config)
    assert "\n" not in str(e.value) and len(str(e.value)) < 600
    str(e.value).encode()


@pytest.mark.parametrize("key, value", WRONG, ids=str)
def test_of_the_config(key, value):
    config = tiny.config()
    with config.unlocked():
        if key in config:
            del config[key]
        config[key] = value
    refused(config, key.split("_")[0])


@pytest.mark.parametrize("key, value", IN_EVALS, ids=str)
def test_of_an_evaluation(key, value):
    config = tiny.config()
    with config.unlocked():
        if key in config.evals.val:
            del config.evals.val[key]
        config.evals.val[key] = value
    refused(config, rf"config.evals.val\.{key}")


def test_a_soft_cap_of_zero_is_none_as_in_big_vision():
    config = tiny.config()
    with config.unlocked():
        config.model = {"img": {}, "llm": dict(variant="gemma_mu", attn_logits_softcap=0.0, final_logits_softcap=0.0)}
    config_values.checked(config)
    config.model.llm.final_logits_softcap = -1.0
    with pytest.raises(ValueError, match="final_logits_softcap is -1.0; expected a number, 0 or more"):
        config_values.checked(config)


@pytest.mark.parametrize("unit", durations.UNITS)
@pytest.mark.parametrize("value", [1e308, 10**300, 2**31 * 100])
def test_durations_that_no_counter_holds(unit, value):
    with pytest.raises(ValueError, match=f"total_{unit} is .*too many steps"):
        durations.to_steps({f"total_{unit}": value}, "total", num_examples=100, batch_size=10, total_steps=50)


@pytest.mark.parametrize(
    "kw",
    [
        dict(rank=2, rslora="false"),
        dict(rank=2, rslora=1),
        dict(rank=2, alpha="x"),
        dict(rank=2, alpha=10**400),
        dict(rank=2, alpha=True),
        dict(rank=2, alpha=1e7),
        dict(rank=2, dropout="0.1"),
        dict(rank=2, dropout=float("nan")),
        dict(rank="2"),
        dict(rank=2.0),
        dict(rank=10**30),
    ],
    ids=str,
)
def test_of_an_adapter(kw):
    with pytest.raises(ValueError, match=f"LoRA {list(kw)[-1]} is "):
        lora.as_rules([("x", kw)])


@pytest.mark.parametrize("value", ["abc", True, 0, -1.0, 1e300, [], float("nan")])
def test_soft_caps_of_hugging_faces_configs(value):
    with pytest.raises(CheckpointError, match="f: cap is .*expected a number above 0, or null"):
        Section({"cap": value}, "f").cap("cap")
    assert Section({"cap": None}, "f").cap("cap") is None
    assert Section({"cap": 30.0}, "f").cap("cap") == 30.0
