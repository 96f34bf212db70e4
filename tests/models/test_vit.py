"""The image tower: parity with Hugging Face's SigLIP, patches, sizes and errors."""

import jax
import numpy as np
import pytest
import torch

from paligemma_med.models import vit, vlm
from tests.models import hf

TOLERANCE = 1e-5


@pytest.mark.parametrize("name", ["mqa", "gqa", "gemma2"])
def test_tower_projection_and_attention_equal_hugging_face(name):
    case, theirs, _, params, batch = hf.reference(name)
    pixels = hf.torch_inputs(case, batch)["pixel_values"]
    with torch.no_grad():
        want = theirs.model.vision_tower(pixels, output_attentions=True)
        want_head = theirs.model.multi_modal_projector(want.last_hidden_state).numpy()

    model = vit.Model(case["llm"]["width"], **case["img"])
    tokens, out = jax.jit(lambda p, x: model.apply({"params": p}, x, capture_attention=True))(
        params["img"], batch["image"]
    )
    np.testing.assert_allclose(out["encoded"], want.last_hidden_state.numpy(), atol=TOLERANCE)
    np.testing.assert_allclose(tokens, want_head, atol=TOLERANCE)
    attn = np.stack([a.numpy() for a in want.attentions])
    assert out["attn"].shape == attn.shape
    np.testing.assert_allclose(out["attn"], attn, atol=TOLERANCE)
    assert want_head.std() > 0.1


def test_tokens_follow_the_patches_row_by_row():
    """With no layers mixing tokens, changing one patch changes its own token only."""
    model = vit.Model(None, width=6, depth=0, mlp_dim=8, num_heads=2, patch_size=4)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 8, 12, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)
    apply = jax.jit(lambda image: model.apply(params, image)[0])
    before = apply(image)
    assert before.shape == (1, 6, 6)
    for token in range(6):
        row, col = divmod(token, 3)
        changed = image.copy()
        changed[0, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4] += 1
        differs = np.abs(apply(changed) - before).max(axis=(0, 2)) > 0
        assert differs.tolist() == [i == token for i in range(6)]


def test_a_stem_keeps_the_grid_and_sees_a_little_of_the_neighbours():
    model = vit.Model(None, width=6, depth=0, mlp_dim=8, num_heads=2, patch_size=8, stem=4)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, 16, 40, 3)).astype(np.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)
    shapes = shapes_of(model, image.shape)
    assert (shapes["stem_0/kernel"], shapes["stem_1/kernel"]) == ((3, 3, 3, 4), (3, 3, 4, 4))
    assert shapes["stem_norm_1/scale"] == (4,) and shapes["embedding/kernel"] == (2, 2, 4, 6)
    apply = jax.jit(lambda image: model.apply(params, image)[0])
    before = apply(image)
    assert before.shape == (1, 10, 6) and model.grid(16, 40) == (2, 5)
    changed = image.copy()
    changed[0, 8:16, 16:24] += rng.normal(size=(8, 8, 3))
    differs = np.abs(apply(changed) - before).max(axis=(0, 2)).reshape(2, 5) > 0
    assert differs[1, 2] and not differs[:, [0, 4]].any()  # a convolution reads one more row and column
    leaves = {f"img/{leaf.path}": leaf._replace(path=f"img/{leaf.path}") for leaf in model.leaves}
    square = {f"img/{n}": np.zeros(x) for n, x in shapes_of(model, (1, 24, 24, 3)).items()}
    assert vlm.image_size(leaves, square) == 24


@pytest.mark.parametrize(
    "variant,want",
    [
        ("So400m/14", dict(width=1152, depth=27, mlp_dim=4304, num_heads=16, patch_size=(14, 14))),
        ("B/16", dict(width=768, depth=12, mlp_dim=3072, num_heads=12, patch_size=(16, 16))),
        ("mu", dict(width=32, depth=1, mlp_dim=128, num_heads=2)),
    ],
)
def test_variants(variant, want):
    assert vit.decode_variant(variant) == want


@pytest.mark.parametrize("variant", ["So400/14", "B/x", "b/16", ""])
def test_unknown_variant(variant):
    with pytest.raises(ValueError, match="is unknown; expected NAME or NAME/PATCH with NAME one"):
        vit.decode_variant(variant)


def test_every_size_stands_on_top_of_a_variant():
    model = vit.Model(10, variant="B/16", width=12, depth=2, mlp_dim=7, num_heads=3, patch_size=5)
    shapes = shapes_of(model, (1, 10, 15, 3))
    assert shapes["embedding/kernel"] == (5, 5, 3, 12)
    assert shapes["pos_embedding"] == (1, 6, 12)
    block = "Transformer/encoderblock"
    assert shapes[f"{block}/MlpBlock_0/Dense_0/kernel"] == (2, 12, 7)
    assert shapes[f"{block}/MultiHeadDotProductAttention_0/query/kernel"] == (2, 12, 3, 4)
    assert shapes["head/kernel"] == (12, 10)
    assert "head/kernel" not in shapes_of(vit.Model(None, variant="mu/4"), (1, 8, 8, 3))


def shapes_of(model, image_shape):
    tree = jax.eval_shape(lambda: model.init(jax.random.key(0), np.zeros(image_shape, np.float32)))
    leaves = jax.tree_util.tree_flatten_with_path(tree["params"])[0]
    return {"/".join(k.key for k in path): leaf.shape for path, leaf in leaves}


@pytest.mark.parametrize(
    "kw,image,message",
    [
        ({}, (1, 30, 28, 3), "Image is 30×28 px, which patches of 14×14 px don't tile"),
        ({}, (1, 28, 30, 3), "Image is 28×30 px, which patches of 14×14 px don't tile"),
        (dict(pool_type="map"), (1, 28, 28, 3), "pool_type is 'map'"),
        (dict(num_heads=3), (1, 28, 28, 3), "width=32 is no multiple of num_heads=3"),
        (dict(remat_policy="some"), (1, 28, 28, 3), "remat_policy is 'some'; expected 'none' or"),
        (dict(attn_impl="flash"), (1, 28, 28, 3), "attn_impl is 'flash'"),
        (dict(stem=8), (1, 28, 28, 3), r"stem goes with patches of a multiple of 4 px, found \(14, 14\)"),
    ],
)
def test_bad_arguments(kw, image, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(vit.Model(None, **{"variant": "mu/14", **kw}), image)
