"""PEFT adapters: the same logits as `peft`'s in both directions, exact round trips, names old and new."""

import copy
import functools
import logging
import os
import re
import warnings

import jax
import ml_dtypes
import numpy as np
import peft as reference
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import adapter, peft, peft_config
from paligemma_med.checkpoints.hf import families, paligemma
from paligemma_med.models import lora_targets, vlm
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints import adapters
from tests.models import hf as models
from tests.rounding import assert_close

MODULES = families.modules_of(paligemma)
TOLERANCE = 1e-5
# The commonest configs, and each of the ways in which modules can differ.
CONFIGS = {
    "attention": dict(target_modules=adapters.ATTENTION, r=3, lora_alpha=6),
    "all-linear": dict(target_modules="all-linear", r=2, lora_alpha=3),
    "q and v": dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=2),
    "regex": dict(target_modules=r".*language_model.*\.(k_proj|down_proj)", r=4),
    "patterns": dict(
        target_modules=adapters.LINEAR,
        r=2,
        lora_alpha=4,
        rank_pattern={r"encoder\.layers\.\d+\.self_attn\.q_proj": 5, "q_proj": 3, "v_proj": 1},
        alpha_pattern={"self_attn.v_proj": 3, "q_proj": 10, "multi_modal_projector.linear": 0.5},
    ),
    "rslora": dict(target_modules=adapters.LINEAR, r=4, lora_alpha=3, use_rslora=True),
    "excluded": dict(target_modules=adapters.LINEAR, r=3, exclude_modules=".*vision_tower.*"),
}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image, text, mask_ar):
    return model.apply({"params": params}, image, text, mask_ar)[0]


def our_logits(name, made):
    """Ours of the valid tokens with an adapter on top."""
    case, _, _, base, batch = models.reference(name)
    img, llm = (dict(variant=None, **case[k]) for k in ("img", "llm"))
    model, params = adapter.apply_adapter(img, llm, base, made)
    logits = apply(model, params, batch["image"], batch["text"], batch["mask_ar"])
    return np.asarray(logits)[batch["valid"]]


def their_logits(name, model):
    case, _, _, _, batch = models.reference(name)
    with torch.no_grad():
        logits = model(**models.torch_inputs(case, batch)).logits
    return logits[:, -batch["text"].shape[1] :].numpy()[batch["valid"]]


@functools.cache
def base_logits(name):
    return their_logits(name, models.reference(name)[1])


def make_theirs(name, config, seed=0):
    """A PEFT model of a case with random factors, neither of them 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers' own deprecations
        model = reference.get_peft_model(
            copy.deepcopy(models.reference(name)[1]), reference.LoraConfig(**config)
        ).eval()
    for key, p in model.named_parameters():
        if "lora_" in key:
            rng = np.random.default_rng([seed, *key.encode()])
            scale = p.shape[1] ** -0.5 if "lora_A" in key else 0.2
            p.data = torch.tensor(rng.normal(0, scale, p.shape), dtype=torch.float32)
    return model


def load_theirs(name, folder):
    """What PyTorch makes of a folder; a missing or unexpected key fails."""
    base = copy.deepcopy(models.reference(name)[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", ".*missing adapter keys.*")
        model = reference.PeftModel.from_pretrained(base, folder).eval()
        found = model.load_adapter(folder, "again")
    assert not found.missing_keys and not found.unexpected_keys
    return model


def adapted_modules(model):
    return {
        paligemma.canonical(n.removeprefix("base_model.model.").removesuffix(".lora_A"))
        for n, _ in model.named_modules()
        if n.endswith(".lora_A")
    }


# ---- The same logits


@pytest.mark.parametrize(
    "name, config",
    [
        *(("mqa", c) for c in CONFIGS),
        ("gqa", "attention"),
        ("mha", "attention"),
        ("gemma2", "all-linear"),
        ("gemma2_mha", "patterns"),
    ],
)
def test_an_adapter_of_theirs_gives_its_logits_here(name, config, tmp_path):
    theirs = make_theirs(name, CONFIGS[config])
    want = their_logits(name, theirs)
    assert abs(want - base_logits(name)).max() > 0.1
    theirs.save_pretrained(tmp_path)
    made = peft.load_adapter(tmp_path)
    assert_close(our_logits(name, made), want, units=64)


def test_others_may_read_what_is_written(tmp_path):
    old = os.umask(0o022)
    try:
        peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa", adapters.ALL))
    finally:
        os.umask(old)
    assert {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()} == {
        "adapter_config.json": 0o644,
        "adapter_model.safetensors": 0o644,
    }


@pytest.mark.parametrize(
    "name, rules, style",
    [
        ("mqa", adapters.ALL, "4.52"),
        ("mqa", adapters.ALL, "5"),
        ("mqa", adapters.MIXED, "4.52"),
        ("mha", adapters.MIXED, "5"),
        ("gemma2", adapters.ALL, "4.52"),
        ("mqa", [("img/.*query/kernel", dict(rank=3, alpha=9, rslora=True))], "4.52"),
        ("mqa", [("llm/.*", dict(rank=3, alpha=2, rslora=True, dropout=0.3))], "5"),
        ("mqa", [("img/Trans.*|llm/.*", dict(rank=3, alpha=6))], "4.41"),
    ],
)
def test_an_adapter_of_ours_gives_its_logits_there(name, rules, style, tmp_path):
    made = adapters.random_adapter(name, rules)
    folder = tmp_path / "adapter"
    peft.save_adapter(folder, made, key_style=style)
    theirs = load_theirs(name, folder)
    want = our_logits(name, made)
    assert abs(want - base_logits(name)).max() > 0.1
    assert_close(their_logits(name, theirs), want, units=64)
    # No module of the other tower that bears a like name (vision and text both have a q_proj).
    assert adapted_modules(theirs) == {
        MODULES[t].replace("{i}", str(i)) for t, (a, _) in made.factors.items() for i in range(len(a))
    }


@pytest.mark.parametrize("name", ["mqa", "gemma2_mha"])
def test_merged_weights_equal_theirs(name, tmp_path):
    theirs = make_theirs(name, CONFIGS["patterns"])
    theirs.save_pretrained(tmp_path)
    made = peft.load_adapter(tmp_path)
    case, _, _, base, _ = models.reference(name)
    params, specs = adapter.insert_adapter(base, made)
    merged = flatten_tree(adapter.merge(params, specs))
    want = models.to_tree(theirs.merge_and_unload().state_dict(), case)
    for n, x in flatten_tree(want).items():
        assert_close(merged[n], x, err_msg=n)


def test_alpha_in_the_config_counts(tmp_path):
    folder = tmp_path / "adapter"
    peft.save_adapter(folder, adapters.random_adapter("mqa"))
    want = our_logits("mqa", peft.load_adapter(folder))
    adapters.edit(folder, lora_alpha=7)
    assert abs(our_logits("mqa", peft.load_adapter(folder)) - want).max() > 1e-2


def test_training_state_of_theirs_goes_on(tmp_path):
    """What was written is an adapter that PEFT trains: dropout and rank are in its config."""
    made = adapters.random_adapter("mqa", [("llm/.*", dict(rank=3, alpha=6, dropout=0.25))])
    peft.save_adapter(tmp_path / "adapter", made, base_model="some/base")
    config = reference.PeftConfig.from_pretrained(tmp_path / "adapter")
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 6, 0.25)
    assert (config.task_type, config.inference_mode, config.bias) == ("CAUSAL_LM", True, "none")
    assert config.base_model_name_or_path == "some/base"
    assert not config.rank_pattern and not config.alpha_pattern and not config.use_rslora


# ---- Round trips


@pytest.mark.parametrize("style", paligemma.STYLES)
@pytest.mark.parametrize("name", ["mqa", "mha", "gemma2"])
def test_round_trip_is_exact(name, style, tmp_path):
    made = adapters.random_adapter(name, adapters.MIXED)
    peft.save_adapter(tmp_path / "adapter", made, key_style=style)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


KERNELS = [t.name for t in lora_targets.TARGETS if t.param in vlm.Model().leaves]


@settings(deadline=None, max_examples=20)
@given(
    specs=st.dictionaries(
        st.sampled_from(KERNELS),
        st.builds(dict, rank=st.integers(1, 5), alpha=st.floats(1e-3, 1e3)),
        min_size=1,
    ),
    style=st.sampled_from(sorted(paligemma.STYLES)),
    rslora=st.booleans(),
    dropout=st.floats(0, 0.9),
)
def test_any_set_of_targets_makes_the_round_trip(specs, style, rslora, dropout, tmp_path_factory):
    rules = [(re.escape(n), dict(s, rslora=rslora, dropout=dropout)) for n, s in specs.items()]
    made = adapters.random_adapter("gqa", rules)
    folder = tmp_path_factory.mktemp("x") / "adapter"
    peft.save_adapter(folder, made, key_style=style)
    adapters.assert_equal(peft.load_adapter(folder), made)


@pytest.mark.parametrize("dtype", ["float16", ml_dtypes.bfloat16])
def test_types_stay(dtype, tmp_path):
    made = adapters.random_adapter("mqa", dtype=dtype)
    peft.save_adapter(tmp_path / "adapter", made)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)
    theirs = safetensors.torch.load_file(tmp_path / "adapter" / peft.WEIGHTS)
    assert {str(x.dtype) for x in theirs.values()} == {f"torch.{np.dtype(dtype)}"}


def test_types_are_cast_on_demand(tmp_path):
    made = adapters.random_adapter("mqa")
    peft.save_adapter(tmp_path / "adapter", made, dtype="bfloat16")
    for target, pair in peft.load_adapter(tmp_path / "adapter").factors.items():
        for x, y in zip(pair, made.factors[target]):
            np.testing.assert_array_equal(x, y.astype(ml_dtypes.bfloat16))


def test_the_file_does_not_depend_on_the_order_of_targets(tmp_path):
    made = adapters.random_adapter("mqa", adapters.MIXED)
    backwards = adapter.Adapter(dict(reversed(made.specs.items())), dict(reversed(made.factors.items())))
    peft.save_adapter(tmp_path / "a", made)
    peft.save_adapter(tmp_path / "b", backwards)
    for name in (peft.WEIGHTS, peft.CONFIG):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_rslora_of_some_keeps_every_scale(tmp_path):
    rules = [
        ("img/.*", dict(rank=4, alpha=3, rslora=True)),
        (".*:[kv]", dict(rank=3, alpha=5, rslora=True)),
        ("llm/.*", dict(rank=2, alpha=7)),
    ]
    made = adapters.random_adapter("mqa", rules)
    peft.save_adapter(tmp_path / "adapter", made)
    got = peft.load_adapter(tmp_path / "adapter")
    assert {s.rslora for s in got.specs.values()} == {True}
    for target, spec in made.specs.items():
        assert got.specs[target].scale == pytest.approx(spec.scale, rel=1e-12)
    theirs = load_theirs("mqa", tmp_path / "adapter")
    assert_close(their_logits("mqa", theirs), our_logits("mqa", made), units=64)


def test_different_dropouts_are_told_of(tmp_path, caplog):
    rules = [("img/head/.*", dict(rank=1, dropout=0.1)), (".*", dict(rank=1, dropout=0.2))]
    made = adapters.random_adapter("mqa", rules)
    with caplog.at_level(logging.WARNING, "absl"):
        peft.save_adapter(tmp_path / "adapter", made)
    assert "one dropout for all modules: 0.2 is written" in caplog.text
    assert {s.dropout for s in peft.load_adapter(tmp_path / "adapter").specs.values()} == {0.2}


# ---- Names of modules, old and new


@pytest.mark.parametrize("style", paligemma.STYLES)
def test_names_of_each_version_are_read(style, tmp_path):
    """… as PEFT writes them, with a list of the modules' last names."""
    made = adapters.random_adapter("mqa")
    peft.save_adapter(tmp_path / "adapter", made, key_style=style)
    keys = safetensors.numpy.load_file(tmp_path / "adapter" / peft.WEIGHTS)
    starts = {
        "4.41": ("language_model.model.layers", "vision_tower.vision_model.encoder"),
        "4.52": ("model.language_model.layers", "model.vision_tower.vision_model.encoder"),
        "5": ("model.language_model.layers", "model.vision_tower.encoder"),
    }[style]
    for start in starts:
        assert any(k.startswith(f"base_model.model.{start}.") for k in keys)
    adapters.edit(tmp_path / "adapter", target_modules=adapters.LINEAR)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


@pytest.mark.parametrize("style", paligemma.STYLES)
def test_patterns_written_match_in_every_version(style, tmp_path):
    """target_modules and patterns, by PEFT's own functions, on the modules of each version."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    made = adapters.random_adapter("mqa", adapters.MIXED)
    peft.save_adapter(tmp_path / "adapter", made)
    config = reference.PeftConfig.from_pretrained(tmp_path / "adapter")
    for target in peft._targets(paligemma).values():
        tower, _, rest = MODULES[target].partition(".")
        name = f"{paligemma.STYLES[style][tower]}.{rest}".replace("{i}", "11")
        assert bool(check_target_module_exists(config, name)) == (target in made.specs), name
        if target in made.specs:
            key = get_pattern_key(config.rank_pattern, name)
            assert config.rank_pattern.get(key, config.r) == made.specs[target].rank
            key = get_pattern_key(config.alpha_pattern, name)
            assert config.alpha_pattern.get(key, config.lora_alpha) == made.specs[target].alpha
    assert not check_target_module_exists(config, "lm_head")


@pytest.mark.parametrize(
    "regex",
    [
        "q_proj",
        "proj",
        "_proj",
        ".*proj",
        "self_attn.q_proj",
        "self_attn",
        "attn.q_proj",
        r"layers\.[02]\.self_attn\.q_proj",
        "layers.2.*",
        "2.self_attn.q_proj|linear",
        "tower.*",
        "model.language_model.layers.2.self_attn.q_proj",
        "language_model",
        "",
    ],
)
def test_patterns_mean_what_they_mean_in_peft(regex):
    from peft.utils.other import get_pattern_key

    for style in paligemma.STYLES.values():
        for name in (
            f"{style['language_model']}.layers.2.self_attn.q_proj",
            f"{style['vision_tower']}.encoder.layers.12.self_attn.q_proj",
            f"{style['multi_modal_projector']}.linear",
        ):
            pattern = {regex: 1, ".*layers.*": 2}
            want = pattern.get(get_pattern_key(pattern, name), 3)
            assert peft_config.by_pattern(pattern, name, 3) == want, name
