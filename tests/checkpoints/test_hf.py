"""Hugging Face directories: parity with transformers in both directions, exact round trips, every
generation of names, and each way in which a directory can be wrong."""

import functools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from paligemma_med.checkpoints import CheckpointError, hf, lazy, npz
from paligemma_med.models import decoder, lora_targets, paligemma
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = 1e-5
INDEX = "model.safetensors.index.json"


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, image, text, mask_ar):
    return model.apply({"params": params}, image, text, mask_ar)[0]


def theirs_saved(name, folder, **kw):
    """A reference case written by transformers; returns our tree of it, by the other mapping."""
    case, model, _, params, _ = reference.reference(name)
    model.save_pretrained(folder, **kw)
    return case, params


def ours_saved(name, folder, **kw):
    case, _, _, params, _ = reference.reference(name)
    hf.save_hf(folder, params, img=case["img"] | {"variant": None}, llm=dicts(case)[1], **kw)
    return case, params


def dicts(case):
    return dict(case["img"], variant=None), dict(case["llm"], variant=None)


def tensors_of(folder):
    """{name: array} of all files of a directory."""
    out = {}
    for file in pathlib.Path(folder).glob("*.safetensors"):
        out |= safetensors.numpy.load_file(file)
    return out


def rewrite(folder, tensors):
    """Makes a directory's weights one file of `tensors`."""
    for file in [*pathlib.Path(folder).glob("*.safetensors"), pathlib.Path(folder, INDEX)]:
        file.unlink(missing_ok=True)
    tensors = {k: np.ascontiguousarray(v) for k, v in tensors.items()}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder, section=None, /, **kw):
    path = pathlib.Path(folder, "config.json")
    config = json.loads(path.read_text())
    where = config[section] if section else config
    for key, value in kw.items():
        where.pop(key, None)
        if value is not ...:
            where[key] = value
    path.write_text(json.dumps(config))


# --- the table ---------------------------------------------------------------------------------


def test_every_target_has_the_module_that_holds_its_weight():
    # For each target a random weight, put into the torch model alone, moves only that parameter.
    for name in ("mqa", "mha"):
        case, model, _, params, _ = reference.reference(name)
        flat = flatten_tree(params)
        modules = {hf.canonical(n) for n, _ in model.named_modules()}
        state = {hf.canonical(k): k for k in model.state_dict()}
        for target in lora_targets.TARGETS:
            if target.param not in flat:
                continue
            module = hf.module_of(target)
            assert module.format(i=0) in modules
            changed = dict(model.state_dict())
            key = state[module.format(i=0) + ".weight"]
            changed[key] = changed[key] + 1
            after = flatten_tree(reference.to_tree(changed, case))
            moved = {k for k in flat if not np.array_equal(flat[k], after[k])}
            assert moved == {target.param}, target.name
            difference = after[target.param] - flat[target.param]
            if target.stacked:
                difference = difference[0]
            if target.index is not None:
                assert np.count_nonzero(np.delete(difference, target.index, 0)) == 0
                difference = difference[target.index]
            assert np.all(difference != 0)


@pytest.mark.parametrize(
    "name, want",
    [
        ("model.language_model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language_model.layers.0.mlp.up_proj"),
        ("model.vision_tower.vision_model.encoder.layers.1.mlp.fc1.weight", "vision_tower.encoder.layers.1.mlp.fc1"),
        ("vision_tower.vision_model.post_layernorm.weight", "vision_tower.post_layernorm"),
        ("vision_tower.post_layernorm.weight", "vision_tower.post_layernorm"),
        ("model.multi_modal_projector.linear.weight", "multi_modal_projector.linear"),
        ("language_model.lm_head.weight", "lm_head"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_canonical_names(name, want):
    assert hf.canonical(name) == want + ".weight"
    assert hf.canonical(hf.canonical(name)) == want + ".weight"


@settings(max_examples=50, deadline=None)
@given(st.permutations("ABC"), st.permutations("ABC"), st.booleans(), st.booleans())
def test_relayout_there_and_back_is_the_identity(old, new, group_old, group_new):
    def layout(letters, group):
        return "({} {}) {}".format(*letters) if group else " ".join(letters)

    old, new = layout(old, group_old), layout(new, group_new)
    size = dict(A=2, B=3, C=5)
    x = np.arange(30).reshape(hf._shape(old, size))
    there = hf.relayout(x, old, new, size)
    assert there.shape == hf._shape(new, size)
    np.testing.assert_array_equal(hf.relayout(there, new, old, size), x)


@pytest.mark.parametrize("px, count", [(224, 2_923_466_480), (448, 2_924_351_216)])
def test_the_3b_tree_becomes_the_tensors_of_googles_pages(px, count):
    flat = flatten_tree(paligemma.abstract_params(paligemma.Model(), image_size=px))
    rows = hf._rows_of(flat)
    plan = hf._plan(flat, rows, hf._measure(flat, rows), BF16)
    shapes = {t.name: t.shape for t in plan}
    assert len(shapes) == 603
    assert sum(math.prod(s) for s in shapes.values()) == count
    tower, text = "vision_tower.vision_model", "language_model.model"
    for name, shape in {
        f"{tower}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{tower}.embeddings.position_embedding.weight": ((px // 14) ** 2, 1152),
        f"{tower}.encoder.layers.26.self_attn.out_proj.weight": (1152, 1152),
        f"{tower}.encoder.layers.0.mlp.fc1.weight": (4304, 1152),
        f"{tower}.post_layernorm.bias": (1152,),
        "multi_modal_projector.linear.weight": (2048, 1152),
        f"{text}.embed_tokens.weight": (257216, 2048),
        f"{text}.layers.17.self_attn.k_proj.weight": (256, 2048),
        f"{text}.layers.17.mlp.down_proj.weight": (2048, 16384),
        f"{text}.layers.0.post_attention_layernorm.weight": (2048,),
        f"{text}.norm.weight": (2048,),
    }.items():
        assert shapes[name] == shape
    shards = hf._shards(plan, 2 * 2**30)
    assert [t for shard in shards for t in shard] == plan
    assert len(shards) == 3 and all(sum(t.nbytes for t in s) <= 2**31 for s in shards)


# --- parity ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.CASES)
def test_what_transformers_writes_gives_its_logits(name, tmp_path):
    case, params = theirs_saved(name, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened = hf.open_hf(tmp_path)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert_same(opened, params)

    _, theirs, _, _, batch = reference.reference(name)
    img, llm = hf.model_config(tmp_path)
    assert img == dicts(case)[0]
    model = paligemma.Model(img=img, llm=llm)
    ours = apply(model, lazy.read_all(opened), batch["image"], batch["text"], batch["mask_ar"])
    assert_logits(ours, theirs, case, batch)


@pytest.mark.parametrize("name", reference.CASES)
def test_transformers_loads_what_we_write_and_gives_our_logits(name, tmp_path):
    case, params = ours_saved(name, tmp_path / "w", max_shard_bytes=30_000)
    assert len(list((tmp_path / "w").glob("*.safetensors"))) > 2
    theirs, info = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
        tmp_path / "w", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info.values()), info
    assert theirs.dtype == torch.float32
    assert theirs.config.image_token_id == case["llm"]["vocab_size"]
    _, _, ours, _, batch = reference.reference(name)
    logits = apply(ours, params, batch["image"], batch["text"], batch["mask_ar"])
    assert_logits(logits, theirs.eval(), case, batch)
    assert_same(hf.open_hf(tmp_path / "w"), params)
    assert hf.model_config(tmp_path / "w")[0] == dicts(case)[0]


def assert_logits(ours, theirs, case, batch):
    with torch.no_grad():
        logits = theirs(**reference.torch_inputs(case, batch)).logits.numpy()
    valid, length = batch["valid"], batch["text"].shape[1]
    logits = logits[:, -length:]
    rows = case["llm"]["vocab_size"]
    np.testing.assert_allclose(np.asarray(ours)[valid], logits[valid][:, :rows], rtol=0, atol=TOLERANCE)
    # Padding rows are copies of <pad>'s, so that greedy never answers with one.
    np.testing.assert_array_equal(logits[valid].argmax(-1), logits[valid][:, :rows].argmax(-1))


def test_padding_rows_are_those_of_pad_so_that_none_beats_it(tmp_path):
    _, params = ours_saved("mqa", tmp_path / "w")
    table = tensors_of(tmp_path / "w")["language_model.model.embed_tokens.weight"]
    rows = params["llm"]["embedder"]["input_embedding"].shape[0]
    assert len(table) == rows + 64
    assert (table[rows:] == table[0]).all()
    best_is_pad = table[0].astype(np.float64)
    logits = (table * best_is_pad).sum(-1)
    assert logits.max() == logits[0] and logits.argmax() == 0


# --- round trips -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["gqa", "mha", "gemma2"])
def test_npz_to_hf_to_npz_is_exact_to_the_bit(name, dtype, tmp_path):
    case, _, _, params, _ = reference.reference(name)
    npz.save_npz(tmp_path / "a.npz", params, dtype=dtype)
    hf.save_hf(tmp_path / "w", npz.open_npz(tmp_path / "a.npz"), llm=dicts(case)[1])
    npz.save_npz(tmp_path / "b.npz", hf.open_hf(tmp_path / "w"))
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tmp_path / "w")
    assert str(model.dtype) == f"torch.{dtype}"


def test_bits_that_are_no_numbers_survive(tmp_path):
    # Random bits: infinities, NaNs with a payload, negative zeros, subnormals.
    rng = np.random.default_rng(0)

    def scramble(x):
        return rng.integers(0, 2**16, x.shape, np.uint16).view(BF16)

    params = jax.tree.map(scramble, reference.reference("mqa")[3])
    hf.save_hf(tmp_path / "w", params)
    assert_same(hf.open_hf(tmp_path / "w"), params)


def test_dtype_casts_and_mixed_types_are_kept(tmp_path):
    params = reference.reference("mqa")[3]
    hf.save_hf(tmp_path / "cast", params, dtype="bfloat16")
    assert_same(hf.open_hf(tmp_path / "cast"), jax.tree.map(lambda x: x.astype(BF16), params))
    # A run's own weights: the head trained in float32, all else as stored.
    mixed = flatten_tree(params)
    mixed = {k: v if "head" in k else v.astype(BF16) for k, v in mixed.items()}
    hf.save_hf(tmp_path / "mixed", unflatten_tree(mixed))
    assert_same(hf.open_hf(tmp_path / "mixed"), unflatten_tree(mixed))
    config = json.loads((tmp_path / "mixed/config.json").read_text())
    assert config["torch_dtype"] == "float32"
    # Neither of two 16-bit types holds the other.
    halves = {k: v.astype(BF16 if "head" in k else np.float16) for k, v in mixed.items()}
    hf.save_hf(tmp_path / "halves", unflatten_tree(halves))
    config = json.loads((tmp_path / "halves/config.json").read_text())
    assert config["torch_dtype"] == "float32"


def test_layers_of_unlike_types_become_float32(tmp_path):
    params = theirs_saved("mqa", tmp_path)[1]
    tensors = tensors_of(tmp_path)
    name = next(n for n in tensors if "layers.1.self_attn.out_proj.bias" in n)
    tensors[name] = tensors[name].astype(np.float16)
    rewrite(tmp_path, tensors)
    out = hf.open_hf(tmp_path)["img"]["Transformer"]["encoderblock"]
    out = out["MultiHeadDotProductAttention_0"]["out"]["bias"]
    assert out.dtype == np.float32
    want = flatten_tree(params)
    want = want["img/Transformer/encoderblock/MultiHeadDotProductAttention_0/out/bias"]
    np.testing.assert_allclose(np.asarray(out), want, atol=1e-3)


GENERATIONS = {
    "google": ("language_model.model.", "vision_tower.vision_model.", ""),
    "4.52": ("model.language_model.", "model.vision_tower.vision_model.", "model."),
    "5": ("language_model.model.", "vision_tower.", ""),
    "none": ("language_model.", "vision_tower.", ""),
}


@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_generation_of_names(generation, tmp_path):
    params = theirs_saved("gqa", tmp_path)[1]
    text, tower, rest = GENERATIONS[generation]
    renamed = {}
    for name, x in tensors_of(tmp_path).items():
        name = hf.canonical(name)
        for old, new in (("language_model.", text), ("vision_tower.", tower), ("", rest)):
            if name.startswith(old):
                renamed[new + name.removeprefix(old)] = x
                break
    rewrite(tmp_path, renamed)
    assert_same(hf.open_hf(tmp_path), params)


# --- the embedding -----------------------------------------------------------------------------


def embedding_of(tensors):
    return next(k for k in tensors if k.endswith("embed_tokens.weight"))


@pytest.mark.parametrize("head", ["lm_head.weight", "language_model.lm_head.weight"])
@pytest.mark.parametrize("instead", [False, True])
def test_a_tied_head_is_taken(head, instead, tmp_path):
    params = theirs_saved("mqa", tmp_path)[1]
    tensors = tensors_of(tmp_path)
    tensors[head] = tensors[embedding_of(tensors)]
    if instead:
        del tensors[embedding_of(tensors)]
    rewrite(tmp_path, tensors)
    assert_same(hf.open_hf(tmp_path), params)


def test_an_untied_head_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "_PIECE", 1000)
    theirs_saved("mqa", tmp_path)
    tensors = tensors_of(tmp_path)
    head = tensors[embedding_of(tensors)].copy()
    head.view(np.uint32)[-1, -1] ^= 1  # the last bit of the last number
    rewrite(tmp_path, {**tensors, "lm_head.weight": head})
    opened = hf.open_hf(tmp_path)
    with pytest.raises(CheckpointError, match="lm_head.weight differs from .*embed_tokens.* tied"):
        np.asarray(opened["llm"]["embedder"]["input_embedding"])
    rewrite(tmp_path, {**tensors, "lm_head.weight": head[:-1]})
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(96, 28\).*\(97, 28\)"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("key", ["image_token_index", "image_token_id"])
def test_rows_from_the_image_token_on_are_cut(key, tmp_path):
    case, params = theirs_saved("mqa", tmp_path)
    edit_config(tmp_path, image_token_index=...)
    edit_config(tmp_path, **{key: 60})
    opened = hf.open_hf(tmp_path)["llm"]["embedder"]["input_embedding"]
    assert opened.shape[0] == 60 == hf.model_config(tmp_path)[1]["vocab_size"]
    np.testing.assert_array_equal(opened, params["llm"]["embedder"]["input_embedding"][:60])
    edit_config(tmp_path, image_token_id=..., image_token_index=97 - 65)
    with pytest.raises(CheckpointError, match="97 rows, 65 from image_token_index 32 on.*64"):
        hf.open_hf(tmp_path)


# --- config.json -------------------------------------------------------------------------------


def test_defaults_are_those_of_transformers():
    classes = dict(
        siglip_vision_model=transformers.SiglipVisionConfig,
        gemma=transformers.GemmaConfig,
        gemma2=transformers.Gemma2Config,
    )
    for kind, values in (*hf._DEFAULTS.items(), *hf._FIXED.items()):
        config = classes[kind]()
        found = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {})}
        for key, value in values.items():
            assert found.get(key) == value, (kind, key)
    whole = transformers.PaliGemmaConfig()
    assert whole.image_token_index == hf._IMAGE_TOKEN
    for key, section in hf._SECTIONS.items():
        found = getattr(whole, key).to_dict()
        assert {k: found[k] for k in section} == section


def test_googles_sparse_config(tmp_path):
    # As in google/paligemma-3b-mix-224, which leaves out what equals the classes' defaults.
    config = dict(
        model_type="paligemma",
        image_token_index=257152,
        text_config=dict(
            hidden_size=2048,
            intermediate_size=16384,
            model_type="gemma",
            num_attention_heads=8,
            num_hidden_layers=18,
            num_key_value_heads=1,
            vocab_size=257216,
        ),
        vision_config=dict(
            hidden_size=1152,
            intermediate_size=4304,
            model_type="siglip_vision_model",
            num_attention_heads=16,
            num_hidden_layers=27,
            patch_size=14,
        ),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    img, llm = hf.model_config(tmp_path)
    variant = paligemma.abstract_params(paligemma.Model(), image_size=224)
    sizes = paligemma.abstract_params(paligemma.Model(img=img, llm=llm), image_size=224)
    assert jax.tree.map(lambda x: x.shape, sizes) == jax.tree.map(lambda x: x.shape, variant)
    assert sum(x.size for x in jax.tree.leaves(sizes)) == 2_923_335_408


@pytest.mark.parametrize(
    "section, change, message",
    [
        (None, dict(model_type="llava"), "model_type 'llava': expected 'paligemma'"),
        ("text_config", dict(model_type="llama"), "text_config has model_type 'llama'"),
        ("text_config", dict(hidden_act="relu"), "text_config.hidden_act is 'relu'"),
        ("text_config", dict(rms_norm_eps=1e-5), "rms_norm_eps is 1e-05"),
        ("text_config", dict(rope_parameters=dict(rope_theta=2.0)), "rope_theta is 2.0"),
        ("text_config", dict(num_hidden_layers=True), "num_hidden_layers is True"),
        ("text_config", dict(num_hidden_layers=10**12), "layers"),
        ("text_config", dict(num_hidden_layers=2), r"layers\.2.*: unexpected"),
        ("text_config", dict(num_hidden_layers=4), r"layers\.3.*: missing"),
        ("text_config", dict(hidden_size=29), r"expected \(97, 29\), found \(97, 28\)"),
        ("vision_config", dict(num_attention_heads=5), "5 heads must divide"),
        ("vision_config", dict(image_size=28), r"expected \(4, 24\), found \(9, 24\)"),
    ],
)
def test_a_config_that_does_not_fit_is_an_error(section, change, message, tmp_path):
    theirs_saved("mqa", tmp_path)
    edit_config(tmp_path, section, **change)
    with pytest.raises(CheckpointError, match=message):
        hf.open_hf(tmp_path)


def test_a_scale_of_queries_that_we_lack_is_an_error(tmp_path):
    theirs_saved("gemma2", tmp_path)
    edit_config(tmp_path, "text_config", query_pre_attn_scalar=13)
    with pytest.raises(CheckpointError, match="query_pre_attn_scalar is 13, expected head_dim .12."):
        hf.model_config(tmp_path)


# --- bad directories ---------------------------------------------------------------------------


def test_missing_and_unexpected_tensors_are_listed(tmp_path):
    theirs_saved("mqa", tmp_path)
    tensors = tensors_of(tmp_path)
    gone = next(k for k in tensors if "layers.1.self_attn.k_proj.bias" in k)
    del tensors[gone]
    tensors["vision_tower.vision_model.head.probe"] = np.ones(3, np.float32)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(9)
    tensors["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    rewrite(tmp_path, tensors)
    with pytest.raises(CheckpointError) as e:
        hf.open_hf(tmp_path)
    assert "2 of" in str(e.value)
    assert f"{hf.canonical(gone)}: missing, expected (24,)" in str(e.value)
    assert "vision_tower.head.probe: unexpected, found (3,)" in str(e.value)


def test_two_names_of_one_tensor_and_quantised_weights_are_errors(tmp_path):
    theirs_saved("mqa", tmp_path)
    tensors = tensors_of(tmp_path)
    name = next(k for k in tensors if "post_layernorm.weight" in k)
    rewrite(tmp_path, {**tensors, f"model.{name}": tensors[name]})
    with pytest.raises(CheckpointError, match="post_layernorm.weight is the same as"):
        hf.open_hf(tmp_path)
    rewrite(tmp_path, {**tensors, name: np.ones(24, np.uint8)})
    with pytest.raises(CheckpointError, match="post_layernorm.weight is no tensor of.*quantised"):
        hf.open_hf(tmp_path)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    theirs_saved("mqa", folder, max_shard_size="50KB")
    return folder


@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_a_truncated_or_foreign_file_is_one_error(tmp_path_factory, sharded, data):
    folder = sharded
    broken = tmp_path_factory.mktemp("broken")
    for file in folder.iterdir():
        (broken / file.name).symlink_to(file)
    victim = broken / data.draw(st.sampled_from(sorted(p.name for p in folder.glob("*.safetensors"))))
    content = victim.read_bytes()
    victim.unlink()
    cut = data.draw(st.integers(0, len(content) - 1))
    foreign = data.draw(st.booleans())
    victim.write_bytes(data.draw(st.binary(max_size=100)) if foreign else content[:cut])
    with pytest.raises(CheckpointError, match="not a readable safetensors file") as e:
        hf.open_hf(broken)
    assert victim.name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("file", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", 3, ".."])
def test_an_index_cannot_reach_out_of_its_folder(file, tmp_path):
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    name = sorted(index["weight_map"])[0]
    index["weight_map"][name] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="expected a .safetensors file of this folder"):
        hf.open_hf(tmp_path)


def test_an_index_that_differs_from_its_files_is_an_error(tmp_path):
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / INDEX).read_text())
    name = sorted(index["weight_map"])[0]
    del index["weight_map"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"1 tensors are either in the index.*{name}"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(CheckpointError, match="no weight_map"):
        hf.open_hf(tmp_path)


def test_one_file_comes_before_an_index_and_others_as_in_transformers(tmp_path):
    params = theirs_saved("mqa", tmp_path, max_shard_size="50KB")[1]
    first = sorted(tmp_path.glob("*.safetensors"))[0]
    theirs_saved("mqa", tmp_path / "one")
    os.rename(tmp_path / "one" / "model.safetensors", tmp_path / "model.safetensors")
    first.write_bytes(b"not looked at")
    assert_same(hf.open_hf(tmp_path), params)
    (tmp_path / INDEX).unlink()
    assert_same(hf.open_hf(tmp_path), params)


def test_headers_are_whole_words_as_the_format_wants(tmp_path):
    ours_saved("gqa", tmp_path / "w", max_shard_bytes=20_000)
    for file in (tmp_path / "w").glob("*.safetensors"):
        assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        hf.open_hf(tmp_path)
    theirs_saved("mqa", tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        hf.open_hf(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="without model.safetensors.index.json"):
        hf.open_hf(tmp_path)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="has no weights"):
        hf.open_hf(tmp_path)


# --- writing -----------------------------------------------------------------------------------


def edited(name="mqa", drop=(), **leaves):
    flat = dict(flatten_tree(reference.reference(name)[3]))
    for key in drop:
        del flat[key]
    return unflatten_tree({**flat, **{k.replace("__", "/"): v for k, v in leaves.items()}})


@pytest.mark.parametrize(
    "params, message",
    [
        (lambda: edited(img__head__lora_a=np.ones((24, 2))), "adapters.*--merge.*--to peft"),
        (lambda: edited(drop=["img/head/bias"]), "img/head/bias: missing"),
        (lambda: edited(img__new=np.ones(2, np.float32)), "img/new: unexpected"),
        (lambda: edited(img__head__bias=np.ones(28, int)), "img/head/bias: has dtype int64"),
        (lambda: edited(img__head__bias=np.ones(29, np.float32)), r"bias: found shape \(29,\)"),
        (
            lambda: edited(llm__layers__attn__kv_einsum__w=np.ones((3, 3, 1, 28, 8), np.float32)),
            r"kv_einsum/w: found shape \(3, 3, 1, 28, 8\), expected \(3, 2, K, 28, 8\)",
        ),
        (lambda: edited(img__pos_embedding=np.ones((1, 8, 24), np.float32)), "square grid"),
    ],
)
def test_a_tree_that_does_not_fit_is_not_written(params, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "w", params())
    assert not any(tmp_path.iterdir())


def test_soft_caps_come_from_the_dict_or_a_known_variant(tmp_path):
    case, _, _, params, _ = reference.reference("gemma2")
    with pytest.raises(CheckpointError, match="no known variant.*soft-caps.*llm=dict"):
        hf.save_hf(tmp_path / "w", params)
    assert not any(tmp_path.iterdir())
    sizes = {k: v for k, v in case["llm"].items() if not k.endswith("cap")}
    decoder.VARIANTS["tiny_test"] = dict(sizes, attn_logits_softcap=7.0, final_logits_softcap=9.0)
    try:
        hf.save_hf(tmp_path / "w", params)
    finally:
        del decoder.VARIANTS["tiny_test"]
    llm = hf.model_config(tmp_path / "w")[1]
    assert (llm["attn_logits_softcap"], llm["final_logits_softcap"]) == (7.0, 9.0)


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(llm=dict(variant=None, width=29)), "llm says width=29, but the weights have 28"),
        (dict(llm={}), "llm says width=2048"),
        (dict(llm=dict(variant="gemma_3b")), "variant 'gemma_3b' is unknown"),
        (dict(llm=dict(variant=None, final_logits_softcap=3.0)), "soft-caps"),
        (dict(img=dict(variant=None, patch_size=16)), "img says patch_size"),
    ],
)
def test_dicts_that_contradict_the_weights_are_errors(kw, message, tmp_path):
    with pytest.raises(CheckpointError, match=message):
        hf.save_hf(tmp_path / "w", reference.reference("mqa")[3], **kw)


@pytest.mark.parametrize("after", [0, 3, 40])
def test_an_interrupted_write_leaves_nothing(after, tmp_path):
    params = reference.reference("mqa")[3]
    seen = []

    def interrupt(n):
        seen.append(n)
        if len(seen) > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(tmp_path / "w", params, progress=interrupt, max_shard_bytes=20_000)
    assert not any(tmp_path.iterdir())


def test_existing_folders(tmp_path):
    params = reference.reference("mqa")[3]
    hf.save_hf(tmp_path / "w", params, max_shard_bytes=20_000)
    with pytest.raises(FileExistsError, match="exists"):
        hf.save_hf(tmp_path / "w", params)
    hf.save_hf(tmp_path / "w", params, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["w"]
    assert sorted(os.listdir(tmp_path / "w")) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match="holds no model.safetensors"):
        hf.save_hf(tmp_path / "home", params, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").exists()

    # A folder that can't be replaced in the end is still there.
    def interrupt(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf.save_hf(tmp_path / "w", params, overwrite=True, progress=interrupt)
    assert_same(hf.open_hf(tmp_path / "w"), params)
    assert sorted(os.listdir(tmp_path)) == ["home", "w"]


def test_progress_counts_the_bytes_of_the_tree_and_one_leaf_is_held_at_a_time(tmp_path):
    params = reference.reference("gqa")[3]
    alive, most, done = [0], [0], []

    class Counted(np.ndarray):
        def __del__(self):
            if self.base is None:
                alive[0] -= 1

    def watched(x):
        def read():
            out = np.empty(x.shape, x.dtype).view(Counted)
            out = Counted(x.shape, x.dtype)
            out[...] = x
            alive[0] += 1
            most[0] = max(most[0], alive[0])
            return out

        return lazy.Lazy(x.shape, x.dtype, read)

    hf.save_hf(tmp_path / "w", jax.tree.map(watched, params), progress=done.append)
    assert sum(done) == sum(x.nbytes for x in jax.tree.leaves(params))
    assert most == [1]
    assert_same(hf.open_hf(tmp_path / "w"), params)


def test_converting_imports_neither_torch_nor_transformers(tmp_path):
    theirs_saved("mqa", tmp_path / "hf")
    code = (
        "import sys; from paligemma_med import checkpoints;"
        "from paligemma_med.checkpoints import hf;"
        f"hf.save_hf({str(tmp_path / 'new')!r}, hf.open_hf({str(tmp_path / 'hf')!r}));"
        f"checkpoints.load_params({str(tmp_path / 'new')!r});"
        "print([m for m in ('torch', 'transformers', 'tensorflow') if m in sys.modules])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=pathlib.Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"
