"""Towers and query transformers from transformers' own folders: what they compute is what transformers computes."""

import jax
import numpy as np
import pytest
import torch

from paligemma_med.checkpoints import compose, hf, lazy
from paligemma_med.models import qformer, vit
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from tests.models import test_connectors as connectors
from tests.models import test_towers as towers

TOLERANCE = 1e-5  # of the scale
PIXELS = towers.PIXELS


def read(folder, part, module, x):
    """The folder's weights for a module; all of them."""
    opened = flatten_tree(lazy.read_all(hf.open_hf(folder)))
    want = flatten_tree({part: jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"]})
    got = compose.for_model(opened, want)
    assert {n: a.shape for n, a in got.items()} == {n: a.shape for n, a in want.items()}
    return {"params": unflatten_tree(got)[part]}


def assert_close(got, want):
    scale = float(np.abs(want).max())
    np.testing.assert_allclose(np.asarray(got), want, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("depth", [3, 2])
def test_biomedclips_tower(tmp_path, depth):
    """003's form with all tokens after the last norm, and 002's: what the last layer but one gives, without norm."""
    theirs = towers.theirs_of("vit")
    theirs.save_pretrained(tmp_path)
    whole = depth == 3
    kw = dict(keep_cls=True) if whole else dict(final_norm=None)
    module = vit.Model(**{**towers.SMALL, "depth": depth}, cls=True, gelu="exact", **kw)
    with torch.no_grad():
        out = theirs(towers.torch_pixels(), output_hidden_states=True)
    want = out.last_hidden_state if whole else out.hidden_states[2][:, 1:]
    assert_close(module.apply(read(tmp_path, "img", module, PIXELS), PIXELS)[0], want.numpy())


def test_evas_tower_where_the_eps_of_its_last_norm_shows(tmp_path):
    """Features of variance 1e-4: at 1, the eps of ln_vision, 1e-5 where all others have 1e-6, would change 5e-6."""
    theirs = towers.theirs_of("eva")
    for name, p in theirs.named_parameters():
        if "projection" in name or "fc2" in name or name.startswith("embeddings."):
            p.data = 0.01 * p.data
    theirs.save_pretrained(tmp_path)
    theirs.post_layernorm.eps = 1e-5
    with torch.no_grad():
        out = theirs(towers.torch_pixels(), output_hidden_states=True)
    variance = float(out.hidden_states[-1].var(-1).mean())
    assert 1e-5 < variance < 1e-3
    module = vit.Model(**towers.SMALL, cls=True, gelu="exact", key_bias=False, final_norm=1e-5)
    params = read(tmp_path, "img", module, PIXELS)
    want = out.last_hidden_state[:, 1:].numpy()
    assert_close(module.apply(params, PIXELS)[0], want)
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_close(module.clone(final_norm=1e-6).apply(params, PIXELS)[0], want)


def test_a_query_transformer_of_a_tower_of_another_width(tmp_path):
    theirs, rest = connectors.qformer_reference()
    theirs.save_pretrained(tmp_path)
    x = np.random.default_rng(1).normal(size=(2, 11, 16)).astype(np.float32)
    module = qformer.QFormer(7, **connectors.SIZES)
    params = lazy.read_all(hf.open_hf(tmp_path))["connector"] | {k: rest[k] for k in ("queries", "proj")}
    with torch.no_grad():
        queries = torch.tensor(rest["queries"]).expand(2, -1, -1)
        found = theirs(query_embeds=queries, encoder_hidden_states=torch.tensor(x)).last_hidden_state.numpy()
    want = found @ rest["proj"]["kernel"] + rest["proj"]["bias"]
    assert_close(module.apply({"params": params}, x)[0], want)
