"""What the original code computes, from its own state dicts: timm's ViT, LAVIS' EVA and Q-Former.

On demand (`pytest -m slow tests/checkpoints/hf/test_original_code.py`): PALIGEMMA_MED_LAVIS names a checkout of
github.com/salesforce/LAVIS, and timm must be importable, which may be in a folder on PYTHONPATH. LAVIS is made for old
versions of both libraries, so what its two files import and no longer is there stands in here.
"""

import functools
import importlib.util
import os
import pathlib
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from paligemma_med.checkpoints import fit
from paligemma_med.models import qformer, vit
from tests.checkpoints.hf.test_parts_parity import PIXELS, assert_close, read
from tests.models import test_towers as towers

pytestmark = pytest.mark.slow
SMALL = dict(towers.SMALL, mlp_dim=96)


def write(path, state):
    safetensors.numpy.save_file({n: np.array(x.detach().numpy()) for n, x in state.items()}, path)
    return str(path)


@pytest.fixture(scope="module")
def lavis():
    """The function that makes a module of one of LAVIS' files."""
    root = os.environ.get("PALIGEMMA_MED_LAVIS")
    if not root:
        pytest.skip("PALIGEMMA_MED_LAVIS is not set")
    pytest.importorskip("timm")
    for name in ("lavis", "lavis.common", "lavis.common.dist_utils"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["lavis.common.dist_utils"].download_cached_file = None
    for name in ("find_pruneable_heads_and_indices", "prune_linear_layer"):
        if not hasattr(transformers.modeling_utils, name):
            setattr(transformers.modeling_utils, name, None)
    transformers.modeling_utils.apply_chunking_to_forward = lambda forward, size, axis, *x: forward(*x)

    def load(file):
        path = pathlib.Path(root, "lavis", "models", file)
        spec = importlib.util.spec_from_file_location(f"original_{path.stem}", path)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_timms_vit(tmp_path):
    models = pytest.importorskip("timm.models.vision_transformer")
    kw = dict(img_size=28, patch_size=7, embed_dim=24, depth=3, num_heads=3)
    theirs = towers.randomise(models.VisionTransformer(**kw, num_classes=5), 1)
    file, pixels = write(tmp_path / "x.safetensors", theirs.state_dict()), towers.torch_pixels()
    whole = vit.Model(**SMALL, cls=True, keep_cls=True, gelu="exact")
    middle = vit.Model(**{**SMALL, "depth": 2}, cls=True, gelu="exact", final_norm=None)
    with torch.no_grad():
        wants = theirs.forward_features(pixels), theirs.get_intermediate_layers(pixels, n=3)[-2]
    for module, want in zip((whole, middle), wants, strict=True):
        assert_close(module.apply(read(file, "img", module, PIXELS), PIXELS)[0], want.numpy())


def test_lavis_eva(tmp_path, lavis):
    eva = lavis("eva_vit.py")
    norm = functools.partial(torch.nn.LayerNorm, eps=1e-6)
    kw = dict(patch_size=7, use_mean_pooling=False, embed_dim=24, depth=3, num_heads=3, mlp_ratio=4, qkv_bias=True)
    theirs = towers.randomise(eva.VisionTransformer(img_size=28, norm_layer=norm, **kw), 2)
    last = towers.randomise(torch.nn.Sequential(torch.nn.LayerNorm(24)), 3)[0]
    state = {f"visual_encoder.{n}": x for n, x in theirs.state_dict().items()}
    state |= {f"ln_vision.{n}": x for n, x in last.state_dict().items()}
    module = vit.Model(**SMALL, cls=True, keep_cls=True, gelu="exact", key_bias=False, final_norm=1e-5)
    with torch.no_grad():
        want = last(theirs.forward_features(towers.torch_pixels())).numpy()
    params = read(write(tmp_path / "x.safetensors", state), "img", module, PIXELS)
    assert_close(module.apply(params, PIXELS)[0], want)
    old = {"pos_embed": theirs.state_dict()["pos_embed"].clone()}
    before = old["pos_embed"].numpy()
    eva.interpolate_pos_embed(eva.VisionTransformer(img_size=56, **kw), old)
    assert_close(fit.resample_posemb(before, 65, method="bicubic"), old["pos_embed"].numpy())


def test_lavis_qformer(tmp_path, lavis):
    code = lavis("blip2_models/Qformer.py")
    code.BertPreTrainedModel.init_weights = lambda self: None
    config = transformers.BertConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=40, vocab_size=31
    )
    config.encoder_width, config.add_cross_attention, config.cross_attention_freq, config.query_length = 16, True, 2, 5
    theirs = towers.randomise(code.BertLMHeadModel(config), 5)
    theirs.bert.invert_attention_mask = lambda mask: (1 - mask[:, None, None].float()) * -1e9
    theirs.bert.get_head_mask = lambda *args: [None] * 4
    rng = np.random.default_rng(6)
    queries, weight, bias, x = (
        torch.tensor(rng.normal(size=s), dtype=torch.float32) for s in ((1, 5, 24), (7, 24), (7,), (2, 11, 16))
    )
    state = {f"Qformer.{n}": y for n, y in theirs.state_dict().items()}
    state |= {"query_tokens": queries, "opt_proj.weight": weight, "opt_proj.bias": bias}
    with torch.no_grad():
        found = theirs.bert(
            query_embeds=queries.expand(2, -1, -1),
            encoder_hidden_states=x,
            encoder_attention_mask=torch.ones(2, 11, dtype=torch.long),
            return_dict=True,
        ).last_hidden_state
    module = qformer.QFormer(7, queries=5, inner=24, depth=4, mlp_dim=40, num_heads=3)
    params = read(write(tmp_path / "x.safetensors", state), "connector", module, x.numpy())
    assert_close(module.apply(params, x.numpy())[0], (found @ weight.T + bias).numpy())
