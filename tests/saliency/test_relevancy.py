"""Relevancy: equal to an implementation in PyTorch, and what the rule promises."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from paligemma_med.models.layers import capture
from paligemma_med.saliency import relevancy
from tests.models import hf
from tests.rounding import assert_close
from tools.bench import saliency_memory


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


def check_equals_pytorch(name, score):
    case, theirs, *_ = hf.reference(name)
    ours, params, batch, patches, queries, tokens = setup(name)
    got = relevancy.relevancy(ours, params, batch, queries, tokens, score=score)
    inputs = hf.torch_inputs(case, batch)
    for i, (query, token) in enumerate(zip(queries.tolist(), tokens.tolist())):
        llm, img = torch_relevancy(theirs, inputs, query, token, score)
        want = llm[query], llm[query, :patches] @ img
        # A map has no scale of its own: the bound is relative to its largest value in the image.
        assert 1e-3 < np.max(want[1]) < 1
        for a, b in zip((got.rows[i], got.patches[i]), want):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.max(want[1]))
    assert got.rows.dtype == got.patches.dtype == np.float32


def test_equals_pytorch():
    """Soft-caps of attention and of logits, norms after each sublayer, a grouped cache."""
    check_equals_pytorch("gemma2_emb_per_head", "logit")


@pytest.mark.slow
@pytest.mark.parametrize("score", relevancy.SCORES)
@pytest.mark.parametrize("name", ("mqa", "gqa", "mha", "gemma2", "gemma2_emb_per_head"))
def test_all_equal_pytorch(name, score):
    check_equals_pytorch(name, score)


def test_carry_down_is_the_query_s_row_of_the_product_from_the_first_layer_up():
    """By hand. Three layers of two positions that don't commute:
    (I+A3)(I+A2)(I+A1) = [[1 0][3 1]] · [[1 2][0 1]] · [[1 0][1 1]] = [[3 2][10 7]]."""
    weights = np.zeros((3, 2, 2), np.float32)
    weights[0, 1, 0], weights[1, 0, 1], weights[2, 1, 0] = 1, 2, 3
    got = [relevancy.carry_down(row, weights).tolist() for row in np.eye(2, dtype=np.float32)]
    assert got == [[3, 2], [10, 7]]


def test_weights_are_the_mean_over_heads_of_what_speaks_for_the_token():
    probs = jnp.full((1, 1, 2, 1, 2), 0.5)
    grads = jnp.array([[4.0, -8.0], [2.0, 2.0]]).reshape(probs.shape)
    slot = jnp.ones((1, 1, 2))
    same, pull = jax.vjp(capture.weigh, probs, slot)
    through, weights = pull(grads)
    assert (same == probs).all() and (through == grads).all()
    assert weights.tolist() == [[[1.5, 0.5]]]  # the -4 isn't set off against the 1


def test_rows_start_at_their_query_and_see_nothing_after_it():
    ours, params, batch, patches, queries, tokens = setup("gemma2_emb_per_head")
    got = relevancy.relevancy(ours, params, batch, queries, tokens)
    assert len(queries) == 5
    for row, query in zip(got.rows, queries):
        assert row[query] >= 1
        assert row[query + 1 :].max(initial=0) == 0
        assert row[:query].min() > 0  # all before: the prompt has one block, the answer follows
    assert got.patches.min() > 0
    # What the tower adds, it adds: relevancy never leaves a patch again.
    assert (got.patches >= got.rows[:, :patches]).all()


def test_tokens_are_explained_each_for_itself_and_differ():
    ours, params, batch, _, queries, tokens = setup("gemma2_emb_per_head")
    together = relevancy.relevancy(ours, params, batch, queries, tokens)
    for i in (0, 3):
        alone = relevancy.relevancy(ours, params, batch, queries[i : i + 1], tokens[i : i + 1])
        for a, b in zip(alone, together):
            assert_close(a[0], b[i], units=32)
    # Five tokens at once, in fours, and in twos.
    for size, steps in ((8, [5]), (None, [4, 5]), (2, [2, 4, 5])):
        told = []
        kw = dict(together=size, progress=lambda done, of, told=told: told.append((done, of)))
        again = relevancy.relevancy(ours, params, batch, queries, tokens, **kw)
        assert told == [(done, 5) for done in steps]
        for a, b in zip(again, together):
            assert_close(a, b, units=32)
    # The class explained decides: another token at the same place has another map.
    other = relevancy.relevancy(ours, params, batch, queries, (tokens + 1) % 61)
    for a, b in zip(other.patches, together.patches):
        assert np.corrcoef(a, b)[0, 1] < 0.99


def test_between_passes_no_copy_of_the_weights_is_held():
    """A forward pass hands the backward passes what they need of it: layers' inputs, and no weight."""
    ours, params, batch, _, queries, tokens = setup("gemma2_emb_per_head")
    arrays = {k: batch[k] for k in ("image", "text", "mask_ar")}
    pull = relevancy._forward(relevancy._lean(ours), params, arrays, queries, tokens, score="logit")
    held = {np.asarray(x).tobytes() for x in jax.tree.leaves(pull)}
    kernels = [x for x in jax.tree.leaves(params) if x.ndim > 2]
    assert len(kernels) > 10 and not held & {np.asarray(x).tobytes() for x in kernels}


def test_how_layers_are_run_in_training_changes_nothing():
    ours, params, batch, _, queries, tokens = setup("gemma2_emb_per_head")
    want = relevancy.relevancy(ours, params, batch, queries, tokens)
    how = dict(scan=False, remat_policy="none")
    model = ours.clone(img={**ours.img, **how}, llm={**ours.llm, **how})
    got = relevancy.relevancy(model, params, batch, queries, tokens)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_no_layer_s_heads_are_kept_at_448_px_and_the_shapes_of_3b(optimised):
    """All probabilities are 2.4 GiB, and so are their gradients."""
    found = saliency_memory.run(448, 64, 8, "So400m/14", "gemma_2b", dtypes=())
    assert found["all probabilities"] > 2300
    assert found["relevancy"] < 2000


def test_mistakes_are_told():
    ours, params, batch, patches, queries, tokens = setup("mqa")

    def run(model=ours, batch=batch, queries=queries, tokens=tokens, **kw):
        return relevancy.relevancy(model, params, batch, queries, tokens, **kw)

    with pytest.raises(ValueError, match="score is 'loss'; expected one of"):
        run(score="loss")
    with pytest.raises(ValueError, match="batch has 2 rows; expected one"):
        run(batch={k: np.repeat(v, 2, axis=0) for k, v in batch.items()})
    with pytest.raises(ValueError, match="1 queries and 3 tokens"):
        run(queries=queries[:1])
    with pytest.raises(ValueError, match=r"queries are \[8\]; expected positions of the text, 9 to"):
        run(queries=[patches - 1], tokens=[1])
    with pytest.raises(ValueError, match="vocabulary of 97"):
        run(queries=queries[:1], tokens=[97])
    with pytest.raises(ValueError, match="can't be captured under attn_impl='cudnn'"):
        run(model=ours.clone(attn_impl="cudnn"))
