"""Checkpoints of Gemma's own library: nested, flat and stacked ones are read as our tree, leaf by leaf."""

import re

import numpy as np
import orbax.checkpoint as ocp
import pytest

from paligemma_med import checkpoints
from paligemma_med.checkpoints import CheckpointError, Lazy, fit, gm, orbax
from paligemma_med.models import vlm
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.checkpoints.trees import assert_same

MODEL = dict(
    img=dict(variant=None, width=12, depth=2, mlp_dim=20, num_heads=2, patch_size=4),
    connector=dict(kind="projector", reduce="pool", factor=2, norm=True, bias=False),
    llm=dict(
        variant=None,
        width=14,
        depth=3,
        mlp_dim=22,
        num_heads=4,
        num_kv_heads=2,
        head_dim=6,
        vocab_size=31,
        post_norms=True,
        qk_norm=True,
    ),
)


@pytest.fixture(scope="module")
def ours():
    rng = np.random.default_rng(0)
    shapes = flatten_tree(vlm.abstract_params(vlm.Model(**MODEL), image_size=16))
    return unflatten_tree({n: rng.normal(size=x.shape).astype(np.float32) for n, x in shapes.items()})


def as_gm(tree):
    """{(module, parameter): array}, as gm's modules are called (gm/nn/_modules.py, _layers.py, vision/_vision.py)."""
    flat, out = flatten_tree(tree), {}
    for name, x in flatten_tree(fit.unstack_layers(tree["img"])).items():
        folder, _, leaf = name.rpartition("/")
        out[f"SigLiPFromPatches_0/siglip_encoder/{folder}".rstrip("/"), leaf] = x
    out["transformer/embedder", "input_embedding"] = flat["llm/embedder/input_embedding"]
    out["transformer/embedder/mm_input_projection", "w"] = flat["connector/proj/kernel"]
    out["transformer/embedder/mm_soft_embedding_norm", "scale"] = flat["connector/norm/scale"]
    out["transformer/final_norm", "scale"] = flat["llm/final_norm/scale"]
    for i in range(3):
        at, layer = f"transformer/layer_{i}", {n: x[i] for n, x in flat.items() if n.startswith("llm/layers/")}
        for name in ("q_einsum", "kv_einsum", "attn_vec_einsum"):
            out[f"{at}/attn/{name}", "w"] = layer[f"llm/layers/attn/{name}/w"]
        for name in ("query", "key"):
            out[f"{at}/attn/_{name}_norm", "scale"] = layer[f"llm/layers/attn/{name[0]}_norm/scale"]
        for name in ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm"):
            out[f"{at}/{name}", "scale"] = layer[f"llm/layers/{name}/scale"]
        out[f"{at}/mlp/gating_einsum", "w"] = layer["llm/layers/mlp/gating_einsum"].swapaxes(-1, -2)
        out[f"{at}/mlp/linear", "w"] = layer["llm/layers/mlp/linear"]
    return out


def flat_form(tree):
    """As the published checkpoints are: modules' paths are keys with slashes."""
    out = {}
    for (module, name), x in as_gm(tree).items():
        out.setdefault(module, {})[name] = x
    return out


def nested_form(tree):
    """As gm's save_params writes them: weights of the MLP without a "w", the tower under another name."""
    out = {}
    for (module, name), x in as_gm(tree).items():
        path = f"{module}/{name}".removeprefix("transformer/").replace("SigLiPFromPatches_0", "vision_encoder")
        out[path.removesuffix("/w") if "/mlp/" in path and path.endswith("/w") else path] = x
    return unflatten_tree(out)


def stacked_form(tree):
    """As `flat_form`, with layers of one kind on an axis in front: here of two kinds, which have two and one."""
    out, kinds = {}, {}
    for module, leaves in flat_form(tree).items():
        if match := re.match(r"transformer/layer_(\d)/(.+)", module):
            i = int(match[1])
            for name, x in leaves.items():
                kinds.setdefault(f"transformer/stacked_layers/attention_type_{i % 2}/{match[2]}", {}).setdefault(
                    name, []
                ).append(x)
        else:
            out[module] = leaves
    return out | {module: {n: np.stack(x) for n, x in leaves.items()} for module, leaves in kinds.items()}


@pytest.mark.parametrize("form", [flat_form, nested_form, stacked_form])
def test_all_forms_are_read(ours, tmp_path, form):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "w", form(ours))
    opened = checkpoints.open_params(tmp_path / "w")
    assert all(isinstance(x, Lazy) for x in flatten_tree(opened).values())
    assert_same(opened, ours)


def test_a_language_model_by_itself(ours, tmp_path):
    text = {k: v for k, v in nested_form(ours).items() if k != "vision_encoder"}
    text["embedder"] = {"input_embedding": text["embedder"]["input_embedding"]}
    orbax.save_orbax(tmp_path / "w", {"params": text})
    assert_same(checkpoints.open_params(tmp_path / "w"), {"llm": ours["llm"]})


def test_what_is_no_such_checkpoint(ours):
    tree = nested_form(ours)
    assert gm.is_gm(tree) and not gm.is_gm(ours)
    for i in range(3):
        tree[f"layer_{i}"]["lora"] = {"a": np.ones(2, np.float32)}
    with pytest.raises(CheckpointError, match="^here: layer/lora/a is no leaf of Gemma 3's"):
        gm.from_gm(tree, "here")
    tree = nested_form(ours)
    del tree["layer_1"]
    with pytest.raises(CheckpointError, match="^here: layer/.*layer 1 is missing"):
        gm.from_gm(tree, "here")
    name, stacked = "attention_type_1/mlp/linear", {n: dict(x) for n, x in stacked_form(ours).items()}
    stacked[f"transformer/stacked_layers/{name}"]["w"] = np.zeros((3, 22, 14), np.float32)
    flat = {f"{module}/{n}": x for module, leaves in stacked.items() for n, x in leaves.items()}
    with pytest.raises(
        CheckpointError, match=r"^here: mlp/linear/w has \(2, 22, 14\), \(3, 22, 14\) in 2 of 2 kinds of"
    ):
        gm.from_gm(unflatten_tree(flat), "here")
