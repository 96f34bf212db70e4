"""Connectors against transformers, and the way of shares back through them against products of whole matrices."""

import jax
import numpy as np
import pytest
import torch
import transformers

from paligemma_med.models import connector, projector, qformer, vlm
from paligemma_med.models.leaves import flatten_tree
from tests.models.hf import stack
from tests.models.test_decoder_families import TOLERANCE
from tests.models.test_leaves import assert_describes
from tests.models.test_towers import randomise

RNG = np.random.default_rng(0)


def shapes(module, x):
    found = flatten_tree(jax.eval_shape(lambda: module.init(jax.random.key(0), x))["params"])
    return {n: y.shape for n, y in found.items()}


def test_medgemmas_projector():
    vision = dict(hidden_size=24, image_size=56, patch_size=7, num_attention_heads=2, num_hidden_layers=1)
    text = dict(hidden_size=20, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, vocab_size=9)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = randomise(transformers.models.gemma3.modeling_gemma3.Gemma3MultiModalProjector(config), 0)
    state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
    params = {
        "norm": {"scale": state["mm_soft_emb_norm.weight"]},
        "proj": {"kernel": state["mm_input_projection_weight"]},
    }
    x = RNG.normal(size=(2, 64, 24)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x)).numpy()
    kw = dict(reduce="pool", factor=4, norm=True, bias=False)
    ours = projector.Projector(20, **kw)
    got, out = ours.apply({"params": params}, x)
    assert got.shape == (2, 4, 20) and out == {} and connector.tokens(dict(kind="projector", **kw), 64) == 4
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert_describes(ours.leaves, shapes(ours, x), dict(D=24, W=24, E=20))


def test_groups_are_neighbours_in_a_row():
    x = RNG.normal(size=(1, 16, 3)).astype(np.float32)
    kernel = RNG.normal(size=(12, 5)).astype(np.float32)
    ours = projector.Projector(5, reduce="group", factor=4)
    got, _ = ours.apply({"params": {"proj": {"kernel": kernel, "bias": np.ones(5, np.float32)}}}, x)
    for row in range(4):
        want = np.concatenate(x[0, 4 * row : 4 * row + 4]) @ kernel + 1
        np.testing.assert_allclose(got[0, row], want, rtol=0, atol=TOLERANCE)


def test_two_layers():
    ours = projector.Projector(5, hidden=7)
    x = RNG.normal(size=(2, 9, 3)).astype(np.float32)
    assert_describes(ours.leaves, shapes(ours, x), dict(D=3, W=7, E=5))
    params = jax.tree.map(lambda s: RNG.normal(size=s.shape).astype(np.float32), ours.init(jax.random.key(0), x))
    p = params["params"]
    hidden = torch.nn.functional.gelu(torch.tensor(x @ p["hidden"]["kernel"] + p["hidden"]["bias"])).numpy()
    want = hidden @ p["proj"]["kernel"] + p["proj"]["bias"]
    np.testing.assert_allclose(ours.apply(params, x)[0], want, rtol=0, atol=10 * TOLERANCE)


@pytest.mark.parametrize(
    "kw, patches, message",
    [
        (dict(reduce="mean"), 16, "reduce is 'mean'; expected one of"),
        (dict(reduce="pool", factor=3), 16, "16 tokens are no square whose side 3 divides"),
        (dict(reduce="group", factor=2), 15, "15 tokens are no square"),
        (dict(reduce="pool", factor=True), 16, "factor is True"),
    ],
)
def test_what_cannot_be_reduced(kw, patches, message):
    with pytest.raises(ValueError, match=message):
        connector.tokens(dict(kind="projector", **kw), patches)


@pytest.mark.parametrize("kw", [dict(reduce="pool", factor=2), dict(reduce="group", factor=4), dict()])
def test_shares_go_back_to_what_a_token_was_made_of(kw):
    """By the derivative: a token's share goes, in equal parts, to the tokens that change it."""
    kw = dict(kind="projector", **kw)
    width = 5
    module = projector.Projector(width, **{k: v for k, v in kw.items() if k != "kind"})
    x = RNG.normal(size=(1, 16, width)).astype(np.float32)
    params = module.init(jax.random.key(0), x)
    jac = jax.jacobian(lambda x: module.apply(params, x)[0][0])(x)[:, :, 0]
    depends = np.abs(np.asarray(jac)).sum((1, 3)) > 0  # [Q, P]
    shares = np.eye(len(depends), dtype=np.float32)
    np.testing.assert_allclose(connector.to_cells(kw, shares), depends / depends.sum(1, keepdims=True), atol=1e-7)


def test_a_class_token_is_no_patch():
    kw = dict(img=dict(variant="mu/8", cls=True, keep_cls=True), llm=dict(variant="gemma_mu"))
    with pytest.raises(
        ValueError, match="keep_cls goes with a connector that attends to all its tokens, which 'projector' doesn't"
    ):
        vlm.Model(**kw, connector=dict(kind="projector")).leaves  # noqa: B018
    assert vlm.Model(**kw, connector=dict(kind="qformer")).leaves


# --- The query transformer ---

SIZES = dict(queries=5, inner=24, depth=4, mlp_dim=40, num_heads=3)


def qformer_reference():
    config = transformers.Blip2QFormerConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=3,
        intermediate_size=40,
        encoder_hidden_size=16,
        cross_attention_frequency=2,
        attn_implementation="eager",
    )
    model = randomise(transformers.Blip2QFormerModel(config), 3)
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}

    def dense(name, shape=None, out=False):
        kernel, bias = state[f"{name}.weight"].T, state[f"{name}.bias"]
        if shape and out:
            return {"kernel": kernel.reshape(*shape, -1), "bias": bias}
        return (
            {"kernel": kernel.reshape(-1, *shape), "bias": bias.reshape(shape)}
            if shape
            else dict(kernel=kernel, bias=bias)
        )

    def norm(name):
        return {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}

    def block(j):
        at, heads, out = f"encoder.layer.{j}", (3, 8), {}
        for ours, theirs in (("self", "attention"), *((("cross", "crossattention"),) if j % 2 == 0 else ())):
            inner = f"{at}.{theirs}.attention"
            out[ours] = {n: dense(f"{inner}.{n}", heads) for n in ("query", "key", "value")}
            out[ours]["out"] = dense(f"{at}.{theirs}.output.dense", heads, out=True)
            out[f"{ours}_norm"] = norm(f"{at}.{theirs}.output.LayerNorm")
        out["mlp"] = {"Dense_0": dense(f"{at}.intermediate_query.dense"), "Dense_1": dense(f"{at}.output_query.dense")}
        out["mlp_norm"] = norm(f"{at}.output_query.LayerNorm")
        return out

    queries = RNG.normal(size=(1, 5, 24)).astype(np.float32)
    params = {
        "queries": queries,
        "input_norm": norm("layernorm"),
        "layers": stack([{f"block_{b}": block(2 * i + b) for b in (0, 1)} for i in range(2)]),
        "proj": {
            "kernel": RNG.normal(size=(24, 7)).astype(np.float32) / 5,
            "bias": RNG.normal(size=7).astype(np.float32),
        },
    }
    return model, params


def test_qformer():
    theirs, params = qformer_reference()
    x = RNG.normal(size=(2, 11, 16)).astype(np.float32)
    ours = qformer.QFormer(7, **SIZES)
    assert_describes(ours.leaves, shapes(ours, x), dict(L=2, Q=5, W=24, D=16, N=3, H=8, F=40, E=7))
    got, out = ours.apply({"params": params}, x, capture_attention=True)
    with torch.no_grad():
        found = theirs(
            query_embeds=torch.tensor(params["queries"]).expand(2, -1, -1),
            encoder_hidden_states=torch.tensor(x),
            output_attentions=True,
        )
    want = found.last_hidden_state.numpy() @ params["proj"]["kernel"] + params["proj"]["bias"]
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)
    assert out["self"].shape == (4, 2, 3, 5, 5) and out["cross"].shape == (2, 2, 3, 5, 11)
    np.testing.assert_allclose(ours.apply({"params": params}, x)[0], got, rtol=0, atol=TOLERANCE)
    attentions = [*(found.attentions or ()), *(found.cross_attentions or ())]
    crossed = [a.numpy() for a in attentions if a.shape[-1] == 11]
    own = [a.numpy() for a in attentions if a.shape[-1] == 5]
    for ours_layer, theirs_layer in zip(out["self"], own, strict=True):
        np.testing.assert_allclose(ours_layer, theirs_layer, rtol=0, atol=TOLERANCE)
    for ours_layer, theirs_layer in zip(out["cross"], crossed, strict=False):
        np.testing.assert_allclose(ours_layer, theirs_layer, rtol=0, atol=TOLERANCE)


def joint(own, cross, halve):
    """The product over layers of whole matrices over (queries, image tokens), written plainly: [Q, Q + P]."""
    q, p = cross.shape[1:]
    whole = np.eye(q + p)
    for layer in range(len(own)):
        through_self = np.eye(q + p)
        through_self[:q, :q] = 0.5 * (np.eye(q) + own[layer]) if halve else np.eye(q) + own[layer]
        whole = through_self @ whole
        if layer % 2 == 0:
            through_cross = np.eye(q + p)
            through_cross[:q, :q] *= 0.5 if halve else 1
            through_cross[:q, q:] = (0.5 if halve else 1) * cross[layer // 2]
            whole = through_cross @ whole
    return whole[:q]


@pytest.mark.parametrize("rule", ["rollout", "relevancy"])
def test_shares_through_a_qformer(rule):
    own = RNG.dirichlet(np.ones(5), (4, 3, 5)).astype(np.float32)
    cross = RNG.dirichlet(np.ones(11), (2, 3, 5)).astype(np.float32)
    shares = RNG.dirichlet(np.ones(5), 2).astype(np.float32)
    kw = dict(kind="qformer", **SIZES)
    assert connector.tokens(kw, 11) == 5
    got = connector.to_cells(kw, shares, {"self": own, "cross": cross}, rule=rule)
    whole = shares @ joint(own.mean(1), cross.mean(1), rule == "rollout")
    np.testing.assert_allclose(got, whole[:, 5:], rtol=0, atol=1e-6)
    if rule == "rollout":  # what isn't the image's is the queries' own: 2⁻² after two layers that cross
        np.testing.assert_allclose(got.sum(-1), 1 - 0.25, atol=1e-6)
    raw = connector.to_cells(kw, shares, {"self": own, "cross": cross}, rule="raw")
    np.testing.assert_allclose(raw, shares @ cross[-1].mean(0), atol=1e-6)
