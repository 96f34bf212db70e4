"""Towers with a class token against transformers: BiomedCLIP's (ViTModel) and EVA's (Blip2VisionModel)."""

import jax
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.models import vit
from paligemma_med.models.leaves import flatten_tree
from tests.models.hf import stack
from tests.models.test_decoder_families import TOLERANCE

SMALL = dict(width=24, depth=3, mlp_dim=40, num_heads=3, patch_size=7)
PIXELS = np.random.default_rng(0).uniform(-1, 1, (2, 28, 28, 3)).astype(np.float32)
MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)


def randomise(model, seed):
    rng = np.random.default_rng(seed)
    for name, p in model.named_parameters():
        if p.ndim == 1:
            x = 0.3 * rng.normal(size=p.shape) + ("norm" in name and name.endswith("weight"))
        else:
            x = rng.normal(size=p.shape) / np.sqrt(np.prod(p.shape[1:]))
        p.data = torch.tensor(x, dtype=torch.float32)
    return model.float().eval()


def theirs_of(kind, **kw):
    common = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    common |= dict(image_size=28, patch_size=7, attn_implementation="eager", hidden_act="gelu", **kw)
    if kind == "vit":
        config = transformers.ViTConfig(layer_norm_eps=1e-6, **common)
        return randomise(transformers.ViTModel(config, add_pooling_layer=False), 1)
    config = transformers.Blip2VisionConfig(layer_norm_eps=1e-6, **common)
    model = randomise(transformers.Blip2VisionModel(config), 2)
    for name, p in model.named_parameters():
        if "qkv.bias" in name:
            p.data[24:48] = 0  # EVA's keys have none
    return model


def torch_pixels(mean=(0.5,) * 3, std=(0.5,) * 3):
    x = ((PIXELS + 1) / 2 - np.array(mean)) / np.array(std)
    return torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32)


def block(state, kind, i):
    if kind == "vit":
        at = next(x for x in (f"layers.{i}", f"encoder.layer.{i}") if any(k.startswith(f"{x}.") for k in state))
        names = {k.removeprefix(f"{at}."): v for k, v in state.items() if k.startswith(f"{at}.")}

        def find(*options):
            return next(o for o in options if f"{o}.weight" in names)

        qkv = {
            ours: find(f"attention.{short}_proj", f"attention.attention.{ours}")
            for ours, short in (("query", "q"), ("key", "k"), ("value", "v"))
        }
        out, norms = find("attention.o_proj", "attention.output.dense"), ("layernorm_before", "layernorm_after")
        mlp = find("mlp.fc1", "intermediate.dense"), find("mlp.fc2", "output.dense")
        w = {k: names[f"{v}.weight"] for k, v in qkv.items()}
        b = {k: names[f"{v}.bias"] for k, v in qkv.items()}
    else:
        names = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in state.items() if f"layers.{i}." in k}
        out, norms, mlp = "self_attn.projection", ("layer_norm1", "layer_norm2"), ("mlp.fc1", "mlp.fc2")
        w = dict(zip(("query", "key", "value"), np.split(names["self_attn.qkv.weight"], 3), strict=True))
        b = dict(zip(("query", "key", "value"), np.split(names["self_attn.qkv.bias"], 3), strict=True))
    attn = {k: {"kernel": w[k].T.reshape(24, 3, 8), "bias": b[k].reshape(3, 8)} for k in w}
    if kind != "vit":
        assert not attn["key"].pop("bias").any()
    attn["out"] = {"kernel": names[f"{out}.weight"].T.reshape(3, 8, 24), "bias": names[f"{out}.bias"]}
    return {
        "MultiHeadDotProductAttention_0": attn,
        **{f"LayerNorm_{j}": {"scale": names[f"{n}.weight"], "bias": names[f"{n}.bias"]} for j, n in enumerate(norms)},
        "MlpBlock_0": {
            f"Dense_{j}": {"kernel": names[f"{n}.weight"].T, "bias": names[f"{n}.bias"]} for j, n in enumerate(mlp)
        },
    }


def to_tree(model, kind):
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    if kind == "vit":
        patches, cls, pos, last = (
            "embeddings.patch_embeddings.projection",
            "embeddings.cls_token",
            "embeddings.position_embeddings",
            "layernorm",
        )
    else:
        patches, cls, pos, last = (
            "embeddings.patch_embedding",
            "embeddings.class_embedding",
            "embeddings.position_embedding",
            "post_layernorm",
        )
    return {
        "embedding": {"kernel": state[f"{patches}.weight"].transpose(2, 3, 1, 0), "bias": state[f"{patches}.bias"]},
        "cls": state[cls],
        "pos_embedding": state[pos],
        "Transformer": {
            "encoderblock": stack([block(state, kind, i) for i in range(3)]),
            "encoder_norm": {"scale": state[f"{last}.weight"], "bias": state[f"{last}.bias"]},
        },
    }


@pytest.mark.parametrize("keep", [True, False])
def test_biomedclips_tower(keep):
    """All tokens after the last norm, the class token with them or without (system 003's, and LLaVA's form of it)."""
    theirs = theirs_of("vit")
    model = vit.Model(**SMALL, cls=True, keep_cls=keep, gelu="exact", mean=MEAN, std=STD)
    params = to_tree(theirs, "vit")
    assert {leaf.path for leaf in model.leaves} == {*flatten_tree(params)}
    got = model.apply({"params": params}, PIXELS)[0]
    with torch.no_grad():
        want = theirs(torch_pixels(MEAN, STD)).last_hidden_state.numpy()
    np.testing.assert_allclose(got, want[:, 1 - keep :], rtol=0, atol=TOLERANCE)


def test_features_before_the_last_layer_without_norm_and_class_token():
    """System 002's form: what layer 2 of 3 gives."""
    theirs = theirs_of("vit")
    model = vit.Model(**{**SMALL, "depth": 2}, cls=True, gelu="exact", final_norm=None)
    params = to_tree(theirs, "vit")
    params["Transformer"] = {"encoderblock": jax.tree.map(lambda x: x[:2], params["Transformer"]["encoderblock"])}
    assert {leaf.path for leaf in model.leaves} == {*flatten_tree(params)}
    got = model.apply({"params": params}, PIXELS)[0]
    with torch.no_grad():
        want = theirs(torch_pixels(), output_hidden_states=True).hidden_states[2].numpy()
    np.testing.assert_allclose(got, want[:, 1:], rtol=0, atol=TOLERANCE)


def test_evas_tower_without_biases_of_keys():
    """The final norm is BLIP-2's `ln_vision`, whose eps (1e-5) isn't the others': features so small that it shows."""
    theirs = theirs_of("eva")
    model = vit.Model(**SMALL, cls=True, gelu="exact", key_bias=False, final_norm=1e-5)
    params = to_tree(theirs, "eva")
    assert {leaf.path for leaf in model.leaves} == {*flatten_tree(params)}
    theirs.post_layernorm.eps = 1e-5
    with torch.no_grad():
        want = theirs(torch_pixels()).last_hidden_state.numpy()
    got = model.apply({"params": params}, PIXELS)[0]
    np.testing.assert_allclose(got, want[:, 1:], rtol=0, atol=TOLERANCE)

    def shrink(tree, x):
        tree["embedding"] = jax.tree.map(lambda a: a * x, tree["embedding"])
        tree["cls"], tree["pos_embedding"] = tree["cls"] * x, tree["pos_embedding"] * x
        return tree

    def norm(eps):
        small = vit.Model(**{**SMALL, "depth": 1}, cls=True, gelu="exact", key_bias=False, final_norm=eps)
        blocks = jax.tree.map(lambda a: 0 * a[:1], params["Transformer"]["encoderblock"])  # x passes unchanged
        whole = params["Transformer"] | {"encoderblock": blocks}
        return small.apply({"params": shrink({**params, "Transformer": whole}, 3e-3)}, PIXELS)[0]

    assert float(abs(norm(1e-5) - norm(1e-6)).max()) > 100 * TOLERANCE


def test_openais_tower():
    """CLIP's, as LLaVA uses it: the layer before the last, without norm and class token. Its patches have no bias, a
    norm is in front of the layers, and its GELU is the quick one."""
    sizes = dict(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=40)
    config = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=7, attn_implementation="eager")
    theirs = randomise(transformers.CLIPVisionModel(config), 3)
    state = {k.removeprefix("vision_model."): v.detach().numpy() for k, v in theirs.state_dict().items()}
    model = vit.Model(
        **{**SMALL, "depth": 2}, cls=True, gelu="quick", patch_bias=False, norm_eps=1e-5, pre_norm=1e-5, final_norm=None
    )
    qkv = {"query": "q", "key": "k", "value": "v"}

    def layer(i):
        names = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in state.items()}
        attn = {
            ours: {
                "kernel": names[f"self_attn.{short}_proj.weight"].T.reshape(24, 3, 8),
                "bias": names[f"self_attn.{short}_proj.bias"].reshape(3, 8),
            }
            for ours, short in qkv.items()
        }
        attn["out"] = {
            "kernel": names["self_attn.out_proj.weight"].T.reshape(3, 8, 24),
            "bias": names["self_attn.out_proj.bias"],
        }
        return {
            "MultiHeadDotProductAttention_0": attn,
            **{
                f"LayerNorm_{j}": {
                    "scale": names[f"layer_norm{j + 1}.weight"],
                    "bias": names[f"layer_norm{j + 1}.bias"],
                }
                for j in (0, 1)
            },
            "MlpBlock_0": {
                f"Dense_{j}": {"kernel": names[f"mlp.fc{j + 1}.weight"].T, "bias": names[f"mlp.fc{j + 1}.bias"]}
                for j in (0, 1)
            },
        }

    params = {
        "embedding": {"kernel": state["embeddings.patch_embedding.weight"].transpose(2, 3, 1, 0)},
        "cls": state["embeddings.class_embedding"].reshape(1, 1, 24),
        "pos_embedding": state["embeddings.position_embedding.weight"][None],
        "pre_norm": {"scale": state["pre_layrnorm.weight"], "bias": state["pre_layrnorm.bias"]},
        "Transformer": {"encoderblock": stack([layer(i) for i in range(2)])},
    }
    assert {leaf.path for leaf in model.leaves} == {*flatten_tree(params)}
    got = model.apply({"params": params}, PIXELS)[0]
    with torch.no_grad():
        want = theirs(torch_pixels(), output_hidden_states=True).hidden_states[2].numpy()
    np.testing.assert_allclose(got, want[:, 1:], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    "variant, kw, count",
    [
        ("biomedclip_b/16", {}, 85_798_656),
        ("eva_g/14", {}, 985_897_344),
    ],
)
def test_towers_have_the_published_size(variant, kw, count):
    """BiomedCLIP as open_clip makes it; EVA by hand: 39 layers of 25,248,768, 1,192,576 before and 2,816 after them."""
    model = vit.Model(variant=variant, **kw)
    image = np.zeros((1, 224, 224, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), image))["params"]
    got = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(shapes))
    assert got == count


@pytest.mark.parametrize(
    "kw, message",
    [
        (dict(gelu="relu"), "gelu is 'relu'; expected one of"),
        (dict(mean=(0.5, 0.5, 0.5)), "mean and std are three numbers each, or neither"),
        (dict(mean=(0.5,), std=(0.5,)), "mean and std are three numbers each"),
        (dict(keep_cls=True), "keep_cls goes with cls=True and with a connector"),
        (dict(keep_cls=True, cls=True, num_classes=3), "keep_cls goes with cls=True and with a connector"),
    ],
)
def test_bad_arguments(kw, message):
    with pytest.raises(ValueError, match=message):
        vit.Model(variant="mu/16", **kw)
