"""Training with the image amid the text: the loss is that of the logits there, by hand."""

import jax
import numpy as np
import pytest

from paligemma_med.models import loss as losses
from paligemma_med.models import vlm
from paligemma_med.models.leaves import flatten_tree
from paligemma_med.training import step as train_step
from tests import tiny


@pytest.mark.parametrize("image_ar", ["block", "causal"])
def test_the_loss_reads_the_answer_where_it_stands(image_ar):
    model = vlm.Model(img=tiny.MODEL["img"], llm=tiny.MODEL["llm"], image_ar=image_ar)
    rng = np.random.default_rng(0)
    shapes = vlm.abstract_params(model, image_size=tiny.RES)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)
    batch = tiny.batch(rows=4)
    prompt = batch["mask_loss"].argmax(axis=1)
    # In front, within the prompt, and at its end, where the image's last token predicts the answer.
    batch |= dict(mask_ar=np.ones_like(batch["mask_ar"]), image_at=np.array([0, 1, 2, prompt[3]], np.int32))
    weight = losses.row_weights(batch["mask_loss"][:, 1:], "example")

    def loss_of(batch, **kw):
        loss_fn = jax.jit(train_step.make_loss_fn(tiny.config(**kw), model))
        inputs = dict(trained=flatten_tree(params), frozen={}, rng=jax.random.key(0))
        return float(loss_fn(batch={**batch, "row_weight": weight}, **inputs)[0])

    inputs = {k: batch[k] for k in ("image", "text", "mask_ar", "image_at")}
    logits, _ = jax.jit(model.apply)({"params": params}, **inputs)
    logp = np.asarray(losses.token_logprobs(logits[:, :-1], batch["text"][:, 1:]))
    mask = batch["mask_loss"][:, 1:]
    want = -np.mean((logp * mask).sum(axis=1) / mask.sum(axis=1))
    assert loss_of(batch) == pytest.approx(want, rel=1e-5)
    assert loss_of(batch, supervised_len=5, loss_chunk=2) == pytest.approx(want, rel=1e-5)
    front = {k: v for k, v in batch.items() if k != "image_at"}
    assert abs(loss_of(front) - want) > 1e-4
