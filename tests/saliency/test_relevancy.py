"""Relevancy: equal to an implementation in PyTorch, and what the rule promises."""

import functools

import jax
import numpy as np
import pytest
import torch

from paligemma_med.models import paligemma
from paligemma_med.saliency import relevancy
from tests.models import hf

CASES = ("mqa", "gqa", "mha", "gemma2", "gemma2_emb_per_head")


def torch_relevancy(model, inputs, query, token, score):
    """The rule, written from the paper on Hugging Face's eager model and torch.autograd, with all
    of R of both towers: (float64[S, S], float64[P, P])."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, _, out: seen.append((module, out[1])))
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    ]
    logits = model(**inputs).logits[0, query]
    for hook in hooks:
        hook.remove()
    y = logits[token] if score == "logit" else logits.log_softmax(-1)[token]
    grads = torch.autograd.grad(y, [attn for _, attn in seen])
    relevancies = {}
    for (module, attn), grad in zip(seen, grads, strict=True):  # the first layer first
        tower = "img" if "Siglip" in type(module).__name__ else "llm"
        cam = (grad * attn)[0].clamp(min=0).mean(dim=0).detach().double().numpy()
        so_far = relevancies.get(tower, np.eye(len(cam)))
        relevancies[tower] = so_far + cam @ so_far
    return relevancies["llm"], relevancies["img"]


def first_row(batch):
    return {k: v[:1] for k, v in batch.items()}


@functools.cache
def setup(name):
    """(our model, parameters, batch of one row, patches, queries and tokens of its answer)."""
    case, _, ours, params, batch = hf.reference(name)
    batch = first_row(batch)
    patches = (case["image"] // case["img"]["patch_size"]) ** 2
    first, count = case["prefix"][0], case["suffix"][0]
    queries = patches + first - 1 + np.arange(count)
    return ours, params, batch, patches, queries, batch["text"][0, first : first + count]


@pytest.mark.parametrize("score", relevancy.SCORES)
@pytest.mark.parametrize("name", CASES)
def test_equals_pytorch(name, score):
    case, theirs, *_ = hf.reference(name)
    ours, params, batch, patches, queries, tokens = setup(name)
    got = relevancy.relevancy(ours, params, batch, queries, tokens, score=score)
    inputs = hf.torch_inputs(case, batch)
    for i, (query, token) in enumerate(zip(queries.tolist(), tokens.tolist())):
        llm, img = torch_relevancy(theirs, inputs, query, token, score)
        # Both bounds: gradients, and with them the map, have no scale of their own.
        for ours_, want in (
            (got.rows[i], llm[query]),
            (got.patches[i], llm[query, :patches] @ img),
        ):
            np.testing.assert_allclose(ours_, want, rtol=1e-4, atol=1e-5 * np.max(want[:patches]))
    assert got.rows.dtype == got.patches.dtype == np.float32
