"""PEFT adapters of other language models than PaliGemma's: `peft`'s logits in both directions, exact round trips."""

import copy
import functools
import json
import re
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import peft as reference
import pytest
import safetensors.numpy
import torch

from paligemma_med.checkpoints import CheckpointError, adapter, hf, lazy, peft
from paligemma_med.checkpoints.hf import families, gemma3
from paligemma_med.models import decoder, lora_targets, vlm
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints import adapters
from tests.checkpoints.hf import test_gemma3
from tests.models import hf_decoders
from tests.rounding import assert_close

TOLERANCE = 1e-5  # of the scale
TOKENS = np.array([[5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43]], np.int32)
TYPES = {"gemma3": "gemma3_text", "llama": "llama", "bloom": "bloom"}
# (model, PEFT's config, rules of ours): what systems 002 to 004 and Google's notebook adapt.
CASES = {
    "llama gqa": (
        dict(
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            r=3,
            lora_alpha=6,
            rank_pattern={"k_proj": 2},
            alpha_pattern={"v_proj": 1},
        ),
        [("llm/layers/attn/.*", dict(rank=3, alpha=6)), (".*down", dict(rank=2, alpha=5))],
    ),
    "llama mha": (
        dict(target_modules=["q_proj", "v_proj"], r=4, lora_alpha=16),
        [("llm/layers/attn/qkv_einsum/w:[qv]", dict(rank=4, alpha=16))],
    ),
    "bloom 6 heads": (
        dict(target_modules=["query_key_value"], r=3, lora_alpha=5),
        [("llm/layers/attn/qkv/kernel", dict(rank=3, alpha=5)), (".*mlp/.*", dict(rank=2, alpha=3))],
    ),
    "gemma3 window 9": (
        dict(target_modules="all-linear", r=2, lora_alpha=3),
        [("llm/layers/.*", dict(rank=2, alpha=3))],
    ),
}


class _Alone(nn.Module):
    """A decoder under the name that it has in a composite, which LoRA's rules ask for."""

    name_of_case: str
    rules: tuple

    @nn.compact
    def __call__(self, tokens):
        llm = decoder.Model(**hf_decoders.CASES[self.name_of_case], lora=self.rules, name="llm")
        mask = jnp.tril(jnp.ones((tokens.shape[1],) * 2, bool))[None]
        return llm.compute_logits(llm(llm.embed_tokens(tokens), mask)[0])


def our_logits(name, made):
    params, specs = adapter.insert_adapter({"llm": hf_decoders.reference(name)[2]}, made)
    rules = tuple((re.escape(t.name), s) for t, s in specs.items())
    return np.asarray(jax.jit(_Alone(name, rules).apply)({"params": params}, TOKENS))


def their_logits(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def randomised(model):
    """A PEFT model with random factors, neither of them 0."""
    for key, p in model.named_parameters():
        if "lora_" in key:
            rng = np.random.default_rng([*key.encode()])
            scale = p.shape[1] ** -0.5 if "lora_A" in key else 0.2
            p.data = torch.tensor(rng.normal(0, scale, p.shape), dtype=torch.float32)
    return model.eval()


@functools.cache
def theirs(name):
    return randomised(
        reference.get_peft_model(
            copy.deepcopy(hf_decoders.reference(name)[0]), reference.LoraConfig(task_type="CAUSAL_LM", **CASES[name][0])
        )
    )


def assert_logits(got, want, base):
    scale = float(np.abs(want).max())
    assert np.abs(want - base).max() > 0.05 * scale
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * scale)


def slow(*names):
    """All cases, these with the marker."""
    return [pytest.param(n, marks=[pytest.mark.slow] if n in names else []) for n in CASES]


@pytest.mark.parametrize("name", slow("gemma3 window 9", "llama mha"))
def test_an_adapter_of_theirs_gives_its_logits_here(name, tmp_path):
    theirs(name).save_pretrained(tmp_path)
    made = peft.load_adapter(tmp_path)
    base = their_logits(hf_decoders.reference(name)[0])
    assert_logits(our_logits(name, made), their_logits(theirs(name)), base)


@pytest.mark.parametrize("name", slow("llama mha"))
def test_an_adapter_of_ours_gives_its_logits_there(name, tmp_path):
    plain = hf_decoders.reference(name)
    made = adapters.random_on(flatten_tree({"llm": plain[2]}), CASES[name][1])
    family = families.FAMILIES[TYPES[name.split()[0]]]
    peft.save_adapter(tmp_path / "a", made, model_type=family.MODEL_TYPE)
    adapters.assert_equal(peft.load_adapter(tmp_path / "a"), made)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = reference.PeftModel.from_pretrained(copy.deepcopy(plain[0]), tmp_path / "a").eval()
        found = model.load_adapter(tmp_path / "a", "again")
    assert not found.missing_keys and not found.unexpected_keys
    # Nothing else was adapted.
    adapted = {n for n, _ in model.named_modules() if n.endswith(".lora_A")}
    modules = families.modules_of(family)
    assert adapted == {
        f"base_model.model.{modules[t].replace('{i}', str(i))}.lora_A"
        for t, (a, _) in made.factors.items()
        for i in range(len(a))
    }
    assert_logits(their_logits(model), our_logits(name, made), their_logits(plain[0]))


def test_the_fused_kernel_has_one_a(tmp_path):
    """Of the width of its input, with a B for queries, keys and values in turn of each head."""
    theirs("bloom 6 heads").save_pretrained(tmp_path)
    ((target, (a, b)),) = peft.load_adapter(tmp_path).factors.items()
    assert target.name == "llm/layers/attn/qkv/kernel"
    assert a.shape == (3, 48, 3) and b.shape == (3, 3, 144)


@pytest.mark.parametrize("style", ["4.41", "4.52", "5"])
def test_names_of_bloom_and_llama_never_changed(style, tmp_path):
    for name, start in (("bloom 6 heads", "transformer.h.0."), ("llama mha", "model.layers.0.")):
        made = adapters.random_on(flatten_tree({"llm": hf_decoders.reference(name)[2]}), CASES[name][1])
        peft.save_adapter(tmp_path / name, made, model_type=TYPES[name.split()[0]], key_style=style)
        keys = safetensors.numpy.load_file(tmp_path / name / peft.WEIGHTS)
        assert any(k.startswith(f"base_model.model.{start}") for k in keys)
        adapters.assert_equal(peft.load_adapter(tmp_path / name), made)


def test_keys_of_old_peft_and_of_a_bare_state_dict(tmp_path):
    """PEFT 0.2 had no names of adapters; a state_dict has them in its keys. Its config has fields that are gone."""
    theirs("llama mha").save_pretrained(tmp_path)
    want = peft.load_adapter(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / peft.WEIGHTS)
    named = {k.replace(".weight", ".default.weight"): x for k, x in tensors.items()}
    assert named.keys() == {k for k in theirs("llama mha").state_dict() if "lora_" in k}
    safetensors.numpy.save_file(named, tmp_path / peft.WEIGHTS)
    adapters.assert_equal(peft.load_adapter(tmp_path), want)
    old = dict(
        base_model_name_or_path="llama",
        bias="none",
        enable_lora=None,
        fan_in_fan_out=False,
        inference_mode=True,
        lora_alpha=16,
        lora_dropout=0.0,
        merge_weights=False,
        modules_to_save=None,
        peft_type="LORA",
        r=4,
        target_modules=["q_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )
    (tmp_path / peft.CONFIG).write_text(json.dumps(old))
    safetensors.numpy.save_file(tensors, tmp_path / peft.WEIGHTS)
    adapters.assert_equal(peft.load_adapter(tmp_path), want)
    adapters.edit(tmp_path, merge_weights=True)  # how it is evaluated there, not what it computes
    adapters.assert_equal(peft.load_adapter(tmp_path), want)


# ---- MedGemma

NOTEBOOK = dict(r=2, lora_alpha=2, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")


@functools.cache
def medgemma():
    return randomised(reference.get_peft_model(copy.deepcopy(test_gemma3.theirs()), reference.LoraConfig(**NOTEBOOK)))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(arguments of our model, its parameters)."""
    folder = tmp_path_factory.mktemp("base")
    test_gemma3.theirs().save_pretrained(folder)
    return hf.model_config(folder), lazy.read_all(hf.open_hf(folder))


def test_medgemmas_notebook(base, tmp_path):
    """All linear layers of decoder and tower, but not the projector, as Google's notebook trains them; merged, they are
    the same weights here and there."""
    medgemma().save_pretrained(tmp_path / "a")
    made = peft.load_adapter(tmp_path / "a")
    plain = vlm.Model(**base[0])
    want = lora_targets.resolve([("connector/.*", None), (".*", dict(rank=2))], plain.leaves)
    assert {*made.specs} == {*want}
    params, specs = adapter.insert_adapter(base[1], made)
    merged = copy.deepcopy(medgemma()).merge_and_unload()
    merged.save_pretrained(tmp_path / "m")
    want = flatten_tree(lazy.read_all(hf.open_hf(tmp_path / "m")))
    for name, x in flatten_tree(adapter.merge(params, specs)).items():
        assert_close(x, want[name], err_msg=name)
    assert any(np.abs(x - want[name]).max() > 0.1 for name, x in flatten_tree(base[1]).items())


@pytest.mark.parametrize("style", gemma3.STYLES)
def test_names_of_each_generation_are_read_and_written(style, base, tmp_path):
    rules = [("img/.*", dict(rank=2)), ("llm/.*", dict(rank=3, alpha=1))]
    made = adapters.random_on(flatten_tree(base[1]), rules)
    peft.save_adapter(tmp_path / "a", made, key_style=style, model_type="gemma3")
    keys = safetensors.numpy.load_file(tmp_path / "a" / peft.WEIGHTS)
    for part in ("vision_tower", "language_model"):
        assert any(k.startswith(f"base_model.model.{gemma3.STYLES[style][part]}.") for k in keys)
    adapters.assert_equal(peft.load_adapter(tmp_path / "a"), made)
    if style != "4.41":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = reference.PeftModel.from_pretrained(copy.deepcopy(test_gemma3.theirs()), tmp_path / "a")
            found = model.load_adapter(tmp_path / "a", "again")
        assert not found.missing_keys and not found.unexpected_keys


@pytest.mark.slow
def test_medgemmas_logits(base, tmp_path):
    medgemma().save_pretrained(tmp_path)
    made = peft.load_adapter(tmp_path)
    kw = {k: v for k, v in base[0].items() if k not in ("img", "llm")}
    model, params = adapter.apply_adapter(base[0]["img"], base[0]["llm"], base[1], made, **kw)
    image, text, at = test_gemma3.batch()
    got = jax.jit(lambda p: model.apply({"params": p}, image, text, np.ones_like(text), image_at=at)[0])(params)
    valid = np.arange(text.shape[1]) < text.shape[1] - np.array(test_gemma3.PADS)[:, None]
    want, plain = (
        test_gemma3.their_logits(m).numpy()[..., : test_gemma3.IMAGE] for m in (medgemma(), test_gemma3.theirs())
    )
    assert_logits(np.asarray(got)[valid], want[valid], plain[valid])


# ---- What PEFT can't express, or we can't


def test_adapters_on_what_is_no_module_are_not_written(base, tmp_path):
    made = adapters.random_on(flatten_tree(base[1]), [("connector/proj/kernel", dict(rank=2))])
    with pytest.raises(
        CheckpointError,
        match=r"factors of connector/proj/kernel, which is no linear layer by itself in "
        r"transformers' Gemma 3: merge them into the weights \(--merge\)$",
    ):
        peft.save_adapter(tmp_path / "a", made, model_type="gemma3")
    llm = adapters.random_on(flatten_tree({"llm": hf_decoders.reference("llama mha")[2]}), [(".*", dict(rank=1))])
    with pytest.raises(CheckpointError, match=r"qkv_einsum/w:q and 6 more, which .* in transformers' BLOOM"):
        peft.save_adapter(tmp_path / "a", llm, model_type="bloom")
    assert not (tmp_path / "a").exists()


def test_modules_to_save_are_refused(tmp_path):
    """As Google's notebook has them: both tables, which are tied."""
    config = reference.LoraConfig(**NOTEBOOK, modules_to_save=["lm_head", "embed_tokens"])
    reference.get_peft_model(copy.deepcopy(test_gemma3.theirs()), config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match=r"modules_to_save is \['lm_head', 'embed_tokens'\]; .*merge_and_unload"
    ) as e:
        peft.load_adapter(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("module", ["trunk.blocks.0.attn.qkv", "vision_model.encoder.layers.0.self_attn.qkv"])
def test_one_layer_for_queries_keys_and_values_of_a_tower_is_refused(module, tmp_path):
    """timm's, and BLIP-2's."""
    theirs("llama mha").save_pretrained(tmp_path)
    key = f"base_model.model.{module}.lora_"
    safetensors.numpy.save_file(
        {f"{key}A.weight": np.ones((4, 8), "f4"), f"{key}B.weight": np.ones((24, 4), "f4")}, tmp_path / peft.WEIGHTS
    )
    with pytest.raises(
        CheckpointError, match=f"{re.escape(module)} is one layer for queries, keys and values.* ViTModel"
    ) as e:
        peft.load_adapter(tmp_path)
    assert "\n" not in str(e.value)
