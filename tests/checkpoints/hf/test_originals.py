"""Parts of other systems, recognised by their tensors' names: what transformers and the original code write is read.

Values are compared with a second mapping (tests/models/test_towers.py, test_connectors.py), which is also what those
tests compare with transformers' outputs. Names and shapes of the original code (timm 1.0.31 by way of open_clip 3.3,
LAVIS) are written here as they came from it.
"""

import itertools
import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from paligemma_med.checkpoints import CheckpointError, compose, fit, hf, lazy
from paligemma_med.checkpoints.hf import originals, tensors
from paligemma_med.models import qformer, vit
from paligemma_med.models.leaves import flatten_tree
from tests.checkpoints.trees import assert_same
from tests.models import test_connectors as connectors
from tests.models import test_towers as towers

F32 = np.dtype("float32")


def write(path, state):
    safetensors.numpy.save_file({k: np.ascontiguousarray(v) for k, v in state.items()}, path)
    return str(path)


def state_of(model):
    return {k: v.detach().numpy() for k, v in model.state_dict().items()}


def fitted(tree, expected):
    """The tree with heads as in `expected`."""
    found = compose.for_model(flatten_tree(tree), flatten_tree(expected))
    return {n: np.asarray(x) for n, x in found.items()}


# --- towers ----------------------------------------------------------------------------------------


def as_timm(tree, prefix, *, key_bias=True):
    """Our tower under timm's names, written by hand: q, k and v side by side."""
    flat = {n: np.asarray(x) for n, x in flatten_tree(tree).items()}
    out = {
        "patch_embed.proj.weight": flat["embedding/kernel"].transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": flat["embedding/bias"],
        "cls_token": flat["cls"],
        "pos_embed": flat["pos_embedding"],
    }
    block, attn = "Transformer/encoderblock/", "Transformer/encoderblock/MultiHeadDotProductAttention_0/"
    width = flat["cls"].shape[-1]
    for i in range(len(flat[block + "LayerNorm_0/scale"])):
        qkv = [flat[f"{attn}{n}/kernel"][i].reshape(width, -1).T for n in ("query", "key", "value")]
        out[f"blocks.{i}.attn.qkv.weight"] = np.concatenate(qkv)
        biases = {n: flat[f"{attn}{n}/bias"][i].ravel() for n in ("query", "key", "value") if key_bias or n != "key"}
        if key_bias:
            out[f"blocks.{i}.attn.qkv.bias"] = np.concatenate([*biases.values()])
        else:
            out |= {f"blocks.{i}.attn.{n[0]}_bias": b for n, b in biases.items()}
        out[f"blocks.{i}.attn.proj.weight"] = flat[f"{attn}out/kernel"][i].reshape(-1, width).T
        out[f"blocks.{i}.attn.proj.bias"] = flat[f"{attn}out/bias"][i]
        for theirs, ours in (("norm1", "LayerNorm_0"), ("norm2", "LayerNorm_1")):
            out[f"blocks.{i}.{theirs}.weight"] = flat[f"{block}{ours}/scale"][i]
            out[f"blocks.{i}.{theirs}.bias"] = flat[f"{block}{ours}/bias"][i]
        for theirs, ours in (("fc1", "Dense_0"), ("fc2", "Dense_1")):
            out[f"blocks.{i}.mlp.{theirs}.weight"] = flat[f"{block}MlpBlock_0/{ours}/kernel"][i].T
            out[f"blocks.{i}.mlp.{theirs}.bias"] = flat[f"{block}MlpBlock_0/{ours}/bias"][i]
    norm = "norm" if key_bias else "ln_vision"
    out |= {
        f"{norm}.weight": flat["Transformer/encoder_norm/scale"],
        f"{norm}.bias": flat["Transformer/encoder_norm/bias"],
    }
    return {n if n.startswith("ln_vision") else prefix + n: x for n, x in out.items()}


def tower(kind):
    return towers.to_tree(towers.theirs_of(kind), kind)


def test_vit_as_transformers_writes_it(tmp_path):
    theirs = towers.theirs_of("vit")
    theirs.save_pretrained(tmp_path)
    opened = hf.open_hf(tmp_path)
    assert all(isinstance(x, lazy.Lazy) for x in flatten_tree(opened).values())
    assert_same(lazy.read_all(opened), {"img": tower("vit")})
    model = hf.model_config(tmp_path)
    assert model.keys() == {"img"}
    want = vit.Model(**towers.SMALL, cls=True, gelu="exact")
    assert vit.Model(**model["img"]) == want.clone(mlp_dim=40)


def test_vit_under_the_names_of_modules(tmp_path):
    """Version 5's, and with a classifier's prefix; a pooler is left out, and said."""
    theirs = towers.theirs_of("vit")
    theirs.config.save_pretrained(tmp_path)
    state = state_of(theirs)
    assert "layers.0.attention.q_proj.weight" in state
    extra = {"pooler.dense.weight": np.ones((2, 2), np.float32), "classifier.bias": np.ones(3, np.float32)}
    write(tmp_path / "model.safetensors", {**{f"vit.{k}": v for k, v in state.items()}, **extra})
    assert_same(lazy.read_all(hf.open_hf(tmp_path)), {"img": tower("vit")})


def test_what_is_left_out_is_said(tmp_path, caplog):
    state = {**as_timm(tower("vit"), "visual.trunk."), "logit_scale": np.ones(1, np.float32)}
    state |= {f"text.layer.{i}": np.ones(1, np.float32) for i in range(9)}
    state["visual.head.proj.weight"] = np.ones((2, 24), np.float32)
    file = write(tmp_path / "open_clip_model.safetensors", state)
    hf.open_hf(file)
    (said,) = [r.getMessage() for r in caplog.records if file in r.getMessage()]
    assert said.endswith("no place for it: logit_scale, text.… (9 tensors), visual.head.proj.weight")


@pytest.mark.parametrize("prefix", ["visual.trunk.", ""])
def test_timms_names(tmp_path, prefix):
    want = tower("vit")
    file = write(tmp_path / "x.safetensors", as_timm(want, prefix))
    for path in (file, tmp_path):  # the file, and a folder without config.json
        assert fitted(hf.open_hf(path)["img"], want).keys() == flatten_tree(want).keys()
    opened = hf.open_hf(file)
    assert flatten_tree(opened)["img/Transformer/encoderblock/MultiHeadDotProductAttention_0/key/kernel"].shape == (
        3,
        24,
        24,
    )  # the file doesn't say how many heads
    assert_same_with_heads(opened, {"img": want})


def assert_same_with_heads(opened, want):
    found, want = fitted(opened, want), flatten_tree(want)
    assert found.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)


@pytest.mark.parametrize("prefix", ["visual_encoder.", ""])
def test_evas_names(tmp_path, prefix, caplog):
    want = tower("eva")
    state = as_timm(want, prefix, key_bias=False)
    file = write(tmp_path / "x.safetensors", state)
    assert_same_with_heads(hf.open_hf(file), {"img": want})
    for name in ("weight", "bias"):
        state.pop(f"ln_vision.{name}")
        want["Transformer"]["encoder_norm"][{"weight": "scale", "bias": "bias"}[name]] = np.full(
            24, name == "weight", F32
        )
    state |= {f"{prefix}{n}": np.ones(24, F32) for n in ("norm.weight", "fc_norm.bias", "head.bias", "mask_token")}
    state[f"{prefix}blocks.0.attn.relative_position_bias_table"] = np.ones((5, 3), F32)
    file = write(tmp_path / "without.safetensors", state)
    assert_same_with_heads(hf.open_hf(file), {"img": want})
    said = " ".join(r.getMessage() for r in caplog.records if file in r.getMessage())
    assert "has no ln_vision: the tower's last norm has scale 1 and bias 0" in said
    assert "relative_position_bias_table" in said or "(5 tensors)" in said


def test_blip2s_tower_as_transformers_writes_it(tmp_path):
    theirs = towers.theirs_of("eva")
    theirs.save_pretrained(tmp_path)
    assert_same(lazy.read_all(hf.open_hf(tmp_path)), {"img": tower("eva")})
    theirs.encoder.layers[1].self_attn.qkv.bias.data[30] = 0.5
    theirs.save_pretrained(tmp_path / "biased")
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.qkv\.bias has biases of keys, which are 0"):
        lazy.read_all(hf.open_hf(tmp_path / "biased"))


# --- query transformers and projections --------------------------------------------------------------


def as_blip2(theirs, params, *, own="attention", at="qformer.", norm="qformer.layernorm", proj="language_projection"):
    state = {}
    for name, x in state_of(theirs).items():
        name = name.replace("attention.attention.", f"attention.{own}.")
        state[name.replace("layernorm.", f"{norm}.") if name.startswith("layernorm.") else at + name] = x
    state["query_tokens"] = params["queries"]
    return state | {f"{proj}.weight": params["proj"]["kernel"].T, f"{proj}.bias": params["proj"]["bias"]}


def test_blip2_as_transformers_writes_it(tmp_path, caplog):
    """All of it, with a small OPT, which is left out."""
    theirs, params = connectors.qformer_reference()
    vision = dict(towers.theirs_of("eva").config.to_dict(), hidden_size=16, num_attention_heads=2)
    text = dict(model_type="opt", hidden_size=7, num_hidden_layers=1, ffn_dim=8, num_attention_heads=1, vocab_size=9)
    text |= dict(word_embed_proj_dim=7, max_position_embeddings=16)
    config = dict(vision_config=vision, qformer_config=theirs.config.to_dict(), text_config=text, num_query_tokens=5)
    whole = towers.randomise(transformers.Blip2ForConditionalGeneration(transformers.Blip2Config(**config)), 6)
    whole.load_state_dict({k: torch.tensor(v) for k, v in as_blip2(theirs, params).items()}, strict=False)
    for layer in whole.vision_model.encoder.layers:
        layer.self_attn.qkv.bias.data[16:32] = 0
    whole.save_pretrained(tmp_path)
    whole.vision_model.save_pretrained(tmp_path / "tower")
    opened = lazy.read_all(hf.open_hf(tmp_path))
    assert_same(opened["connector"], params)
    assert_same({"img": opened["img"]}, lazy.read_all(hf.open_hf(tmp_path / "tower")))
    (said,) = [r.getMessage() for r in caplog.records if f"{tmp_path}:" in r.getMessage()]
    assert said.endswith("no place for it: language_model.… (20 tensors)")


def test_a_query_transformer_by_itself(tmp_path):
    theirs, params = connectors.qformer_reference()
    theirs.save_pretrained(tmp_path)
    want = {k: v for k, v in params.items() if k not in ("queries", "proj")}
    assert_same(lazy.read_all(hf.open_hf(tmp_path)), {"connector": want})
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cross_attention_frequency": 1}))
    with pytest.raises(CheckpointError, match="cross_attention_frequency is 1, but this model has 2"):
        hf.open_hf(tmp_path)


@pytest.mark.parametrize("proj", ["opt_proj", "t5_proj", "llm_proj", "llama_proj"])
def test_lavis_names(tmp_path, proj, caplog):
    theirs, params = connectors.qformer_reference()
    state = as_blip2(
        theirs, params, own="self", at="Qformer.bert.", norm="Qformer.bert.embeddings.LayerNorm", proj=proj
    )
    text = "embeddings.word_embeddings.weight", "encoder.layer.0.intermediate.dense.bias", "encoder.layer.3.output.x"
    state |= {f"Qformer.bert.{n}": np.ones(2, F32) for n in text}
    state |= {"Qformer.bert.embeddings.position_ids": np.ones((1, 4), np.int64), "itm_head.bias": np.ones(2, F32)}
    state |= {"Qformer.cls.predictions.bias": np.ones(3, F32), "temp": np.ones(1, F32)}
    file = write(tmp_path / "x.safetensors", state)
    assert_same_with_heads(hf.open_hf(file), {"connector": params})
    (said,) = [r.getMessage() for r in caplog.records if file in r.getMessage()]
    assert said.endswith("no place for it: Qformer.… (5 tensors), itm_head.bias, temp")


@pytest.mark.parametrize(
    "prefix", ["llama_proj", "model.mm_projector", "mm_projector", "base_model.model.model.mm_projector"]
)
def test_projections(tmp_path, prefix):
    """MiniGPT-v2's and LLaVA-Med's; the file has adapters, too, which are another thing's."""
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 3)).astype(F32), rng.normal(size=5).astype(F32)
    lora = {"llama_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": np.ones((2, 5), F32)}
    file = write(tmp_path / "x.safetensors", {f"{prefix}.weight": weight, f"{prefix}.bias": bias, **lora})
    assert_same(lazy.read_all(hf.open_hf(file)), {"connector": {"proj": {"kernel": weight.T, "bias": bias}}})


def test_projections_of_two_layers(tmp_path):
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3)).astype(F32), rng.normal(size=(5, 7)).astype(F32)
    state = {"0.weight": a, "0.bias": a[:, 0], "2.weight": b, "2.bias": b[:, 0]}
    file = write(tmp_path / "x.safetensors", {f"model.mm_projector.{n}": x for n, x in state.items()})
    want = dict(hidden=dict(kernel=a.T, bias=a[:, 0]), proj=dict(kernel=b.T, bias=b[:, 0]))
    assert_same(lazy.read_all(hf.open_hf(file)), {"connector": want})


# --- what isn't read -------------------------------------------------------------------------------


def test_files_that_are_refused(tmp_path):
    good = as_timm(tower("vit"), "")

    def refused(change, says):
        state = dict(good)
        change(state)
        with pytest.raises(CheckpointError, match=says):
            hf.open_hf(write(tmp_path / "x.safetensors", state))

    refused(
        lambda s: s.pop("blocks.1.norm2.bias"), r"is not open_clip's .*1 tensors are missing, such as trunk\.blocks\.1"
    )
    refused(lambda s: s.update({"blocks.0.ls1.gamma": np.ones(24, F32)}), r"ls1\.gamma: unexpected")
    refused(
        lambda s: s.update({"blocks.2.norm1.bias": np.ones(9, F32)}), r"norm1\.bias: expected \(24,\), found \(9,\)"
    )
    refused(lambda s: s.update({"cls_token": np.ones((1, 1, 24), np.int32)}), "cls_token is no tensor of F64")
    refused(
        lambda s: s.update({"pos_embed": np.ones((17, 24), F32)}), r"pos_embed has shape \(17, 24\), expected 3 axes"
    )
    refused(lambda s: (s.clear(), s.update(x=np.ones(2, F32))), "has 1 tensors that are no part known here, such as x")


# --- names and shapes of the original code, at the true size -------------------------------------------


def shapes(*, layers, prefix="", **rows):
    out = {}
    for name, shape in rows.items():
        name = prefix + name.replace("__", ".")
        out |= {name.replace("#", str(i)): shape for i in layers} if "#" in name else {name: shape}
    return out


def block(width, mlp, biases):
    dense = {
        "attn.proj": (width, width),
        "mlp.fc1": (mlp, width),
        "mlp.fc2": (width, mlp),
        "attn.qkv": (3 * width, width),
    }
    out = {f"{n}.weight": shape for n, shape in dense.items()}
    out |= {f"{n}.bias": shape[:1] for n, shape in dense.items() if n != "attn.qkv"}
    out |= {f"{n}.{w}": (width,) for n, w in itertools.product(("norm1", "norm2"), ("weight", "bias"))}
    return out | biases


def timm_shapes(width, mlp, depth, patch, positions, biases, **more):
    out = {"cls_token": (1, 1, width), "pos_embed": (1, positions, width)}
    out |= {"patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,), **more}
    return out | {f"blocks.{i}.{n}": s for i in range(depth) for n, s in block(width, mlp, biases).items()}


def qformer_shapes(encoder):
    """LAVIS' Q-Former, a BERT-base with cross-attention in every second layer."""
    at, out = "Qformer.bert.encoder.layer", {}
    for i in range(12):
        for kind, inner in (("attention", 768), *((("crossattention", encoder),) if i % 2 == 0 else ())):
            for n, inputs in (("query", 768), ("key", inner), ("value", inner)):
                out |= {f"{at}.{i}.{kind}.self.{n}.weight": (768, inputs), f"{at}.{i}.{kind}.self.{n}.bias": (768,)}
            out |= {f"{at}.{i}.{kind}.output.dense.weight": (768, 768), f"{at}.{i}.{kind}.output.dense.bias": (768,)}
            out |= {f"{at}.{i}.{kind}.output.LayerNorm.{n}": (768,) for n in ("weight", "bias")}
        for text in ("", "_query"):
            out |= {
                f"{at}.{i}.intermediate{text}.dense.weight": (3072, 768),
                f"{at}.{i}.intermediate{text}.dense.bias": (3072,),
            }
            out |= {f"{at}.{i}.output{text}.dense.weight": (768, 3072), f"{at}.{i}.output{text}.dense.bias": (768,)}
            out |= {f"{at}.{i}.output{text}.LayerNorm.{n}": (768,) for n in ("weight", "bias")}
    emb = "Qformer.bert.embeddings"
    out |= {f"{emb}.word_embeddings.weight": (30523, 768), f"{emb}.position_embeddings.weight": (512, 768)}
    out |= {f"{emb}.position_ids": (1, 512), f"{emb}.LayerNorm.weight": (768,), f"{emb}.LayerNorm.bias": (768,)}
    return out | {"query_tokens": (1, 32, 768), "opt_proj.weight": (2560, 768), "opt_proj.bias": (2560,)}


OPEN_CLIP = {
    f"visual.trunk.{n}": s
    for n, s in timm_shapes(
        768, 3072, 12, 16, 197, {"attn.qkv.bias": (2304,)}, **{"norm.weight": (768,), "norm.bias": (768,)}
    ).items()
} | {"visual.head.proj.weight": (512, 768), "logit_scale": ()}
EVA = timm_shapes(1408, 6144, 40, 14, 257, {"attn.q_bias": (1408,), "attn.v_bias": (1408,)})
EVA |= {"norm.weight": (1408,), "norm.bias": (1408,), "head.weight": (1000, 1408), "head.bias": (1000,)}


@pytest.mark.parametrize(
    "state, variant, kept, unread",
    [(OPEN_CLIP, "biomedclip_b/16", 150, 2), (EVA, "eva_g/14", 4 + 39 * 13, 4 + 13)],
    ids=["open_clip", "EVA"],
)
def test_towers_of_the_true_size(monkeypatch, state, variant, kept, unread):
    found, said = [tensors.Tensor("w.safetensors", n, s, F32) for n, s in state.items()], []
    monkeypatch.setattr(originals.tensors, "open_all", lambda path: found)
    monkeypatch.setattr(originals.assemble, "tell_unread", lambda where, names: said.extend(names))
    model = vit.Model(variant=variant)
    image = np.zeros((1, 224, 224, 3), np.float32)
    want = {"img": jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]}
    opened = originals.open_original("w.safetensors")
    got = compose.for_model(flatten_tree(opened), flatten_tree(want))
    assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in flatten_tree(want).items()}
    larger = fit.resample_posemb(got["img/pos_embedding"], 32**2 + 1, method="bicubic")
    assert larger.shape == (1, 1025, model.width)  # EVA's for MiniGPT-v2, at 448 px
    asked = {*state} - {*said}
    assert (len(asked), len(said)) == (kept, unread)


def test_a_query_transformer_of_the_true_size(monkeypatch):
    state, said = qformer_shapes(1408), []
    found = [
        tensors.Tensor("w", n, s, F32 if n != "Qformer.bert.embeddings.position_ids" else None)
        for n, s in state.items()
    ]
    monkeypatch.setattr(originals.tensors, "open_all", lambda path: found)
    monkeypatch.setattr(originals.assemble, "tell_unread", lambda where, names: said.extend(names))
    model = qformer.QFormer(2560)
    image = np.zeros((1, 257, 1408), np.float32)
    want = {"connector": jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]}
    got = compose.for_model(flatten_tree(originals.open_original("w")), flatten_tree(want))
    assert {n: x.shape for n, x in got.items()} == {n: x.shape for n, x in flatten_tree(want).items()}
    # The text's layers have six tensors each.
    assert len(said) == 12 * 6 + 3 and all("_query" not in n for n in said)


def test_clips_towers_are_refused_by_their_name(tmp_path):
    """They have a norm before the first layer, and quick GELU: no model here computes that."""
    config = transformers.CLIPVisionConfig(
        hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, image_size=28, patch_size=7
    )
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="config.json has model_type 'clip_vision_model': expected 'bloom' or"):
        hf.open_hf(tmp_path)
