"""PEFT adapters: the same logits as `peft`'s in both directions, and nothing dropped in silence."""

import copy
import functools
import json
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

from paligemma_med.checkpoints import adapter, hf, npz, peft
from paligemma_med.models import lora_targets
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints import adapters
from tests.models import hf as models

TOLERANCE = 1e-5
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj", "out_proj"]
LINEAR = [*ATTENTION, "fc1", "fc2", "gate_proj", "up_proj", "down_proj", "linear"]
# The commonest configs, and each of the ways in which modules can differ.
CONFIGS = {
    "attention": dict(target_modules=ATTENTION, r=3, lora_alpha=6),
    "all-linear": dict(target_modules="all-linear", r=2, lora_alpha=3),
    "q and v": dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=2),
    "regex": dict(target_modules=r".*language_model.*\.(k_proj|down_proj)", r=4),
    "patterns": dict(
        target_modules=LINEAR,
        r=2,
        lora_alpha=4,
        rank_pattern={r"encoder\.layers\.\d+\.self_attn\.q_proj": 5, "q_proj": 3, "v_proj": 1},
        alpha_pattern={"self_attn.v_proj": 3, "q_proj": 10, "multi_modal_projector.linear": 0.5},
    ),
    "rslora": dict(target_modules=LINEAR, r=4, lora_alpha=3, use_rslora=True),
    "excluded": dict(target_modules=LINEAR, r=3, exclude_modules=".*vision_tower.*"),
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
        hf.canonical(n.removeprefix("base_model.model.").removesuffix(".lora_A"))
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
    np.testing.assert_allclose(our_logits(name, made), want, rtol=0, atol=TOLERANCE)


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
    np.testing.assert_allclose(their_logits(name, theirs), want, rtol=0, atol=TOLERANCE)
    # No module of the other tower that bears a like name (vision and text both have a q_proj).
    assert adapted_modules(theirs) == {
        hf.module_of(t).replace("{i}", str(i)) for t, (a, _) in made.factors.items() for i in range(len(a))
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
        np.testing.assert_allclose(merged[n], x, rtol=0, atol=1e-6, err_msg=n)


def test_alpha_in_the_config_counts(tmp_path):
    folder = tmp_path / "adapter"
    peft.save_adapter(folder, adapters.random_adapter("mqa"))
    want = our_logits("mqa", peft.load_adapter(folder))
    edit(folder, lora_alpha=7)
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


@pytest.mark.parametrize("style", peft.STYLES)
@pytest.mark.parametrize("name", ["mqa", "mha", "gemma2"])
def test_round_trip_is_exact(name, style, tmp_path):
    made = adapters.random_adapter(name, adapters.MIXED)
    peft.save_adapter(tmp_path / "adapter", made, key_style=style)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


KERNELS = [t.name for t in lora_targets.TARGETS if "qkv" not in t.param]


@settings(deadline=None, max_examples=20)
@given(
    specs=st.dictionaries(
        st.sampled_from(KERNELS),
        st.builds(dict, rank=st.integers(1, 5), alpha=st.floats(1e-3, 1e3)),
        min_size=1,
    ),
    style=st.sampled_from(sorted(peft.STYLES)),
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
    np.testing.assert_allclose(their_logits("mqa", theirs), our_logits("mqa", made), rtol=0, atol=TOLERANCE)


def test_different_dropouts_are_told_of(tmp_path, caplog):
    rules = [("img/head/.*", dict(rank=1, dropout=0.1)), (".*", dict(rank=1, dropout=0.2))]
    made = adapters.random_adapter("mqa", rules)
    with caplog.at_level(logging.WARNING, "absl"):
        peft.save_adapter(tmp_path / "adapter", made)
    assert "one dropout for all modules: 0.2 is written" in caplog.text
    assert {s.dropout for s in peft.load_adapter(tmp_path / "adapter").specs.values()} == {0.2}


# ---- Names of modules, old and new


@pytest.mark.parametrize("style", peft.STYLES)
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
    edit(tmp_path / "adapter", target_modules=LINEAR)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


@pytest.mark.parametrize("style", peft.STYLES)
def test_patterns_written_match_in_every_version(style, tmp_path):
    """target_modules and patterns, by PEFT's own functions, on the modules of each version."""
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    made = adapters.random_adapter("mqa", adapters.MIXED)
    peft.save_adapter(tmp_path / "adapter", made)
    config = reference.PeftConfig.from_pretrained(tmp_path / "adapter")
    for target in peft._MODULES:
        tower, _, rest = hf.module_of(target).partition(".")
        name = f"{peft.STYLES[style][tower]}.{rest}".replace("{i}", "11")
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

    for style in peft.STYLES.values():
        for name in (
            f"{style['language_model']}.layers.2.self_attn.q_proj",
            f"{style['vision_tower']}.encoder.layers.12.self_attn.q_proj",
            f"{style['multi_modal_projector']}.linear",
        ):
            pattern = {regex: 1, ".*layers.*": 2}
            want = pattern.get(get_pattern_key(pattern, name), 3)
            assert peft._by_pattern(pattern, name, 3) == want, name


# ---- Errors


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter on everything of both towers."""
    peft.save_adapter(tmp_path / "adapter", adapters.random_adapter("mqa"))
    edit(tmp_path / "adapter", target_modules=LINEAR)
    return tmp_path / "adapter"


def edit(folder, **fields):
    path = folder / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def rewrite(folder, change):
    """Writes the tensors anew after change(dict) has been at them."""
    path = folder / peft.WEIGHTS
    tensors = safetensors.numpy.load_file(path)
    change(tensors)
    safetensors.numpy.save_file(tensors, path)


def refused(folder, match, error=npz.CheckpointError):
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
        dict(alpha_pattern={"(?i)q_proj": 1}),
        dict(target_modules="(", r=3),
        dict(target_modules=[1]),
        dict(target_modules=None),
        dict(exclude_modules={"a": 1}),
    ],
    ids=str,
)
def test_configs_that_are_refused(saved, fields):
    edit(saved, **fields)
    message = refused(saved, f"{peft.CONFIG}: {next(iter(fields))} ")
    assert "\n" not in message


@pytest.mark.parametrize("alpha", [0, -1, float("nan")])
def test_impossible_alpha(saved, alpha):
    edit(saved, lora_alpha=alpha)
    refused(saved, f"{peft.CONFIG}: LoRA alpha")


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", None])
def test_how_it_began_does_not_matter_if_the_base_is_as_it_was(saved, init):
    edit(saved, init_lora_weights=init)
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
    edit(saved, target_modules=[n for n in LINEAR if n != "fc1"])
    message = refused(saved, "target_modules doesn't match it")
    assert len(re.findall(r"\n  .*fc1.*: unexpected", message)) == 4  # A and B of two layers
    edit(saved, target_modules=LINEAR, exclude_modules=["fc1"])
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
        edit(tmp_path / "adapter", target_modules=target_modules)
        adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)
    # Nor what would be targeted in some versions only, where the file fits others too.
    one = r"model\.(language_model|vision_tower\.encoder)\.layers\.\d+\.self_attn\..*"
    edit(tmp_path / "adapter", target_modules=one)
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)
    edit(tmp_path / "adapter", target_modules=ATTENTION, exclude_modules=".*vision_tower.*")
    adapters.assert_equal(peft.load_adapter(tmp_path / "adapter"), made)


Q0 = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_"


def test_other_ranks_than_the_config_says(saved):
    edit(saved, rank_pattern={"q_proj": 2})
    refused(saved, r"q_proj has A of shape .* but adapter_config.json gives it rank 2")


def test_layers_that_differ(saved):
    edit(saved, alpha_pattern={r"layers\.0\.self_attn\.q_proj": 2})
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
    refused(saved, "never loaded: save the adapter anew", FileNotFoundError)
    (saved / peft.CONFIG).write_text("{")
    refused(saved, "is not JSON")
    (saved / peft.CONFIG).write_text("[]")
    refused(saved, "expected an object, found list")
    (saved / peft.CONFIG).write_text("[" * 100_000)
    refused(saved, "is not JSON")
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
    with pytest.raises(npz.CheckpointError, match="key_style is '6'"):
        peft.save_adapter(tmp_path / "a", adapters.random_adapter("mqa"), key_style="6")
    with pytest.raises(npz.CheckpointError, match="0 specs and 0 pairs"):
        peft.save_adapter(tmp_path / "a", adapter.Adapter({}, {}))
