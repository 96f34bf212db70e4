"""Hugging Face directories: parity with transformers in both directions, and exact round trips."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.checkpoints import CheckpointError, hf, lazy, npz
from paligemma_med.checkpoints.hf import read
from paligemma_med.models import paligemma
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.hf.folders import apply, dicts, edit_config, ours_saved, rewrite, tensors_of, theirs_saved
from tests.checkpoints.trees import assert_same
from tests.models import hf as reference

BF16 = np.dtype(ml_dtypes.bfloat16)
TOLERANCE = 1e-5


# --- parity ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", reference.CASES)
def test_what_transformers_writes_gives_its_logits(name, tmp_path):
    case, params = theirs_saved(name, tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    opened = hf.open_hf(tmp_path)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert_same(opened, params)

    _, theirs, _, _, batch = reference.reference(name)
    model = hf.model_config(tmp_path)
    img, llm = model["img"], model["llm"]
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
    assert hf.model_config(tmp_path / "w")["img"] == dicts(case)[0]


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


# --- round trips ----------------------------------------------------------------------------------


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


# --- the embedding --------------------------------------------------------------------------------


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
    monkeypatch.setattr(read, "_PIECE", 1000)
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
    assert opened.shape[0] == 60 == hf.model_config(tmp_path)["llm"]["vocab_size"]
    np.testing.assert_array_equal(opened, params["llm"]["embedder"]["input_embedding"][:60])
    edit_config(tmp_path, image_token_id=..., image_token_index=97 - 65)
    with pytest.raises(CheckpointError, match="97 rows, 65 from image_token_index 32 on.*64"):
        hf.open_hf(tmp_path)
