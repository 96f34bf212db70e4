"""Gemma 3 (MedGemma) as transformers writes it: the whole model's logits, and what a config.json may say."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.checkpoints import CheckpointError, hf, lazy
from paligemma_med.models import vlm
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.hf import folders
from tests.checkpoints.hf.folders import edit_config
from tests.checkpoints.trees import assert_same
from tests.models.test_towers import randomise

TOLERANCE = 1e-5
IMAGE, BEFORE, AFTER, PADS = 90, (3, 5), (6, 2), (0, 2)  # the image's token; text tokens of two rows


@functools.cache
def theirs():
    """8 layers, the 6th of which sees all; 64 patches, pooled to 4; a window that is longer than the image's block and
    shorter than the text."""
    config = transformers.Gemma3Config(
        vision_config=dict(
            hidden_size=24,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=3,
            image_size=56,
            patch_size=7,
            vision_use_head=False,
        ),
        text_config=dict(
            hidden_size=42,
            intermediate_size=50,
            num_hidden_layers=8,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=10,
            vocab_size=IMAGE + 64,
            query_pre_attn_scalar=7,
            sliding_window=6,
            rope_parameters={
                "sliding_attention": dict(rope_type="default", rope_theta=1e4),
                "full_attention": dict(rope_type="linear", rope_theta=1e6, factor=8.0),
            },
        ),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        attn_implementation="eager",
    )
    model = randomise(transformers.Gemma3ForConditionalGeneration(config), 4)
    for name, p in model.named_parameters():
        if "language_model" in name and p.ndim == 1 or "mm_soft_emb_norm" in name:
            p.data = 0.3 * p.data  # scales that 1 is added to
    model.tie_weights()
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("gemma3")
    theirs().save_pretrained(out, max_shard_size="50KB")
    return out


def batch():
    rng = np.random.default_rng(5)
    texts = [rng.integers(4, IMAGE, b + a).tolist() for b, a in zip(BEFORE, AFTER, strict=True)]
    text = np.array([t + [0] * n for t, n in zip(texts, PADS, strict=True)], np.int32)
    image = rng.uniform(-1, 1, (2, 56, 56, 3)).astype(np.float32)
    return image, text, np.array(BEFORE, np.int32)


def their_logits(model):
    """float[2, T, V] at the text's tokens."""
    image, text, at = batch()
    rows, where = [], []
    for row, n in zip(text, at, strict=True):
        rows.append([*row[:n], *[IMAGE] * 4, *row[n:]])
        where.append([i for i in range(len(row) + 4) if not n <= i < n + 4])
    ids = torch.tensor(rows)
    with torch.no_grad():
        logits = model(
            input_ids=ids,
            attention_mask=torch.tensor([[1] * (len(r) - p) + [0] * p for r, p in zip(rows, PADS, strict=True)]),
            token_type_ids=(ids == IMAGE).long(),
            pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)),
        ).logits
    # What predicts the token after the image is the image's last token.
    for row, n in zip(where, at, strict=True):
        row[n - 1] += 4
    return torch.stack([x[w] for x, w in zip(logits, where, strict=True)])


def test_logits_are_those_of_transformers(folder):
    model = vlm.Model(**hf.model_config(folder))
    opened = hf.open_hf(folder)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert {*flatten_tree(opened)} == {*model.leaves} and model.vocab_size == IMAGE
    image, text, at = batch()
    params = lazy.read_all(opened)
    got = model.apply({"params": params}, image, text, np.ones_like(text), image_at=at)[0]
    valid = np.arange(text.shape[1]) < text.shape[1] - np.array(PADS)[:, None]
    want = their_logits(theirs())[..., :IMAGE].numpy()
    scale = float(np.abs(want).max())
    assert 1 < scale < 10
    np.testing.assert_allclose(np.asarray(got)[valid], want[valid], rtol=0, atol=TOLERANCE * scale)


def test_decoding_gives_transformers_greedy_answer(folder):
    model, params = vlm.Model(**hf.model_config(folder)), lazy.read_all(hf.open_hf(folder))
    image, text, at = (x[:1] for x in batch())
    ids = torch.tensor([[*text[0, : at[0]], *[IMAGE] * 4, *text[0, at[0] :]]])
    want = (
        theirs()
        .generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=(ids == IMAGE).long(),
            pixel_values=torch.tensor(image.transpose(0, 3, 1, 2)),
            max_new_tokens=12,
            min_new_tokens=12,
            do_sample=False,
        )[0, ids.shape[1] :]
        .tolist()
    )

    def prefill(m):
        (x, mask, ar), _ = m.embed_image_and_text(image, text, image_at=at)
        return m.prefill_cache(x, mask, ar, cache_size=x.shape[1] + 12)

    def extend(m, token):
        return m.extend_cache(m.embed_text(token)[0])

    logits, cache = model.apply({"params": params}, method=prefill, mutable=["cache"])
    step = jax.jit(lambda c, t: model.apply({"params": params, **c}, t, method=extend, mutable=["cache"]))
    got = []
    for _ in want:
        got.append(int(jnp.argmax(logits[0, 0])))
        logits, cache = step(cache, jnp.full((1, 1), got[-1]))
    assert got == want


def test_what_is_written_is_transformers_model(folder, tmp_path):
    """Its own class loads it: every tensor to the bit but for the 64 rows behind the vocabulary, and the logits."""
    opened, model = hf.open_hf(folder), hf.model_config(folder)
    hf.save_hf(tmp_path / "w", opened, **{k: model[k] for k in ("img", "llm", "connector")})
    assert_same(hf.open_hf(tmp_path / "w"), opened)
    assert hf.model_config(tmp_path / "w") == model
    loaded, notes = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "w", output_loading_info=True, attn_implementation="eager"
    )
    assert type(loaded) is type(theirs()) and not any(notes.values())
    got, want = (m.state_dict() for m in (loaded, theirs()))
    assert got.keys() == want.keys()
    assert all(torch.equal(x[:IMAGE], want[n][:IMAGE]) for n, x in got.items())
    table = got["model.language_model.embed_tokens.weight"]
    assert table.shape[0] == IMAGE + 64 and torch.equal(table[IMAGE:], table[:1].expand(64, -1))
    assert torch.equal(their_logits(loaded)[..., :IMAGE], their_logits(theirs())[..., :IMAGE])
    # The names of Google's own files, which every version of transformers reads; 5.24 leaves out "vision_model".
    names = {n.replace("vision_tower.vision_model.", "vision_tower.") for n in folders.tensors_of(tmp_path / "w")}
    assert names == {*folders.tensors_of(folder)}


def test_models_that_it_is_not_are_not_written(folder, tmp_path):
    opened, model = hf.open_hf(folder), hf.model_config(folder)
    for kw, message in (
        (dict(connector=dict(model["connector"], factor=3)), "64 tokens are no square whose side 3 divides"),
        (
            dict(connector=dict(model["connector"], reduce="none")),
            "reduce='none', but transformers' Gemma 3 has 'pool'",
        ),
        (dict(img=dict(model["img"], gelu="exact")), "img has gelu='exact', but transformers' SigLIP has 'tanh'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            hf.save_hf(tmp_path / "w", opened, **{**{k: model[k] for k in ("img", "llm", "connector")}, **kw})


def test_older_files_say_the_same(folder, tmp_path):
    """Before version 5: rope_theta, rope_local_base_freq and rope_scaling; no layer_types but a pattern."""
    new = hf.model_config(folder)
    edit = json.loads((folder / "config.json").read_text())
    text = edit["text_config"]
    for key in ("rope_parameters", "layer_types"):
        text.pop(key)
    text |= dict(
        rope_theta=1e6,
        rope_local_base_freq=1e4,
        rope_scaling=dict(rope_type="linear", factor=8.0),
        sliding_window_pattern=6,
    )
    (tmp_path / "config.json").write_text(json.dumps(edit))
    assert hf.model_config(tmp_path) == new
    assert new["connector"]["factor"] == 4 and new["image_ar"] == "block" and new["llm"]["window"] == 6


def test_medgemmas_own_config(tmp_path):
    """config.json of google/medgemma-4b-it, without what transformers ignores: heads are the class' defaults."""
    text = dict(
        hidden_size=2560,
        intermediate_size=10240,
        model_type="gemma3_text",
        num_hidden_layers=34,
        rope_scaling=dict(factor=8.0, rope_type="linear"),
        sliding_window=1024,
    )
    vision = dict(
        hidden_size=1152,
        image_size=896,
        intermediate_size=4304,
        model_type="siglip_vision_model",
        num_attention_heads=16,
        num_hidden_layers=27,
        patch_size=14,
        vision_use_head=False,
    )
    whole = dict(model_type="gemma3", image_token_index=262144, mm_tokens_per_image=256, text_config=text)
    (tmp_path / "config.json").write_text(json.dumps(dict(whole, vision_config=vision)))
    model = vlm.Model(**hf.model_config(tmp_path))
    shapes = flatten_tree(vlm.abstract_params(model, image_size=896))
    # The card's 4.3 billion; the file has 64 rows of 2,560 more.
    assert sum(int(np.prod(x.shape)) for x in shapes.values()) == 4_299_915_632
    named = vlm.Model(img=dict(variant="So400m/14"), llm=dict(variant="gemma3_4b"), connector=dict(model.connector))
    assert {n: x.shape for n, x in flatten_tree(vlm.abstract_params(named, image_size=896)).items()} == {
        n: x.shape for n, x in shapes.items()
    }


@pytest.mark.parametrize(
    "section, key, value, message",
    [
        (None, "mm_tokens_per_image", 5, "mm_tokens_per_image is 5, expected the square"),
        ("text_config", "sliding_window", 0, "sliding_window is 0, expected a whole number"),
        ("text_config", "layer_types", ["full_attention", "sliding_attention"] * 4, "expected every n-th layer"),
        ("text_config", "rope_parameters", dict(full_attention=dict(rope_type="yarn")), "rope_type is 'yarn'"),
        ("text_config", "rope_parameters", dict(full_attention=dict(rope_theta="x")), "rope_theta is 'x'"),
        ("text_config", "attn_logit_softcapping", 30.0, "attn_logit_softcapping is 30.0, but this model has None"),
        ("text_config", "query_pre_attn_scalar", 5, "query_pre_attn_scalar is 5, expected head_dim"),
        ("text_config", "vocab_size", 400, "the embedding has 400 rows"),
    ],
)
def test_configs_that_are_refused(folder, tmp_path, section, key, value, message):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    edit_config(tmp_path, section, **{key: value})
    with pytest.raises(CheckpointError, match=message):
        hf.model_config(tmp_path)
