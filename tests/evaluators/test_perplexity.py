"""The evaluation loss: a plain computation gives the same on padded batches over devices; its figures and files."""

import json

import jax
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.evaluation import results
from paligemma_med.evaluators import perplexity
from paligemma_med.metrics import losses, tables
from paligemma_med.models import vlm
from paligemma_med.parallel import distributed, sharding
from tests import tiny

ROWS = [
    dict(question_id=f"q{i}", image_id=f"i{i // 2}", answer_type=("OPEN", "CLOSED")[i % 2], answer="x")
    for i in range(11)
]


def batches(arrays, mesh=None):
    """Like input_pipeline.evaluation's, 8 rows each; fillers are NaN and nonsense, to be seen if they count."""
    place = (lambda x: distributed.place(x, sharding.batch_sharding(mesh))) if mesh else (lambda x: x)
    for start in range(0, len(ROWS), 8):
        count = min(8, len(ROWS) - start)
        batch = {k: np.concatenate([x[start : start + count], x[: 8 - count]]) for k, x in arrays.items()}
        batch["image"][count:] = np.nan
        batch["_mask"] = np.arange(8) < count
        yield {k: place(x) for k, x in batch.items()}, ROWS[start : start + count]


def plain(model, params, arrays):
    """(sums, counts) in float64 from all logits."""
    run = jax.jit(lambda p, *x: model.apply({"params": p}, *x)[0])
    logits = np.asarray(run(params, arrays["image"], arrays["text"][:, :-1], arrays["mask_ar"][:, :-1]), np.float64)
    labels, counted = arrays["text"][:, 1:], arrays["mask_loss"][:, 1:] > 0
    largest = logits.max(axis=-1)
    lse = largest + np.log(np.exp(logits - largest[..., None]).sum(axis=-1))
    nll = lse - np.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return (nll * counted).sum(axis=1), counted.sum(axis=1)


def test_equals_a_plain_computation_on_padded_batches_over_devices(tmp_path):
    model = vlm.Model(**tiny.MODEL)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), *(tiny.batch()[k] for k in ("image", "text", "mask_ar")))
    )
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes["params"])
    arrays = tiny.batch(rows=len(ROWS))
    mesh = sharding.make_mesh([("data", -1)])
    assert mesh.size == 8
    evaluator = perplexity.Evaluator(model, "tiny", inputs=batches(arrays, mesh), outdir=tmp_path, loss_chunk=5)
    figures = evaluator.run(params)

    sums, counts = plain(model, params, arrays)
    rows = results.read_rows(tmp_path / "losses.jsonl")
    np.testing.assert_allclose([row["loss"] for row in rows], sums, rtol=1e-5)
    assert [row["tokens"] for row in rows] == counts.tolist() and {*counts.tolist()} == {1, 2, 3, 4, 5}
    assert figures["avg"] == pytest.approx((sums / counts).mean(), rel=1e-5)
    assert figures["sum"] == pytest.approx(sums.mean(), rel=1e-5)
    assert figures["per_token"] == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    odd = np.arange(len(ROWS)) % 2 == 1
    assert figures["avg/answer_type/CLOSED"] == pytest.approx((sums / counts)[odd].mean(), rel=1e-5)
    assert (figures["n"], figures["n/answer_type/CLOSED"], figures["tokens"]) == (11, 5, counts.sum())
    *_, (last, _) = batches(arrays, mesh)
    padded = [np.asarray(x)[3:].tolist() for x in decode.answer_losses(model, params, last, chunk=5)]
    assert padded == [[0] * 5] * 2


def fake(monkeypatch, sums, tokens):
    """Losses in the model's place; the numbers of the batches that were asked for."""
    left, asked = list(zip(sums, tokens)), []

    def answer_losses(model, params, batch, *, chunk):
        count = int(batch["_mask"].sum())
        asked.append(count)
        taken = [left.pop(0) for _ in range(count)] + [(9e9, 7)] * (len(batch["_mask"]) - count)
        return tuple(np.array(x) for x in zip(*taken))

    monkeypatch.setattr(decode, "answer_losses", answer_losses)
    return asked


def make(outdir=None, **kw):
    kw = (
        dict(inputs=batches(tiny.batch(rows=len(ROWS))), about=lambda params: dict(fingerprint="a"), outdir=outdir) | kw
    )
    return perplexity.Evaluator(None, "tiny", **kw)


def test_figures_and_files(monkeypatch, tmp_path):
    fake(monkeypatch, [2.0] * 10 + [0.0], [1] * 5 + [4] * 5 + [0])
    figures = make(tmp_path).run({})
    assert figures["avg"] == pytest.approx((5 * 2 + 5 * 0.5) / 10) and figures["avg_low"] < 1.25 < figures["avg_high"]
    assert figures["per_token"] == pytest.approx(20 / 25)
    assert figures["perplexity"] == pytest.approx(np.exp(0.8))
    assert (figures["n"], figures["no_answer"]) == (10, 1)  # a row without an answer has no loss
    written, about = results.read_metrics(tmp_path / "metrics.json")
    assert written == figures and about["fingerprint"] == "a" and len(about["split_hash"]) == 64
    rows = results.read_rows(tmp_path / "losses.jsonl")
    assert rows[0] == ROWS[0] | dict(loss=2.0, tokens=1)
    assert losses.summarise(rows) == figures
    table = tables.format_table(figures)
    assert "| 1.2500 (" in table and "| CLOSED " in table and "1 rows have no answer" in table


def test_an_interrupted_one_resumes_and_a_finished_one_is_taken(monkeypatch, tmp_path):
    sums = [float(i) for i in range(1, 12)]
    fake(monkeypatch, sums, [1] * 11)
    whole = make(tmp_path / "whole").run({})

    def interrupted():
        parts = batches(tiny.batch(rows=len(ROWS)))
        yield next(parts)
        yield next(parts)
        raise KeyboardInterrupt

    fake(monkeypatch, sums, [1] * 11)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "again", inputs=interrupted()).run({})
    asked = fake(monkeypatch, sums[8:], [1] * 3)
    assert make(tmp_path / "again").run({}) == whole
    assert asked == [3]  # the first batch was there
    names = ("losses.jsonl", "metrics.json")
    assert [(tmp_path / "again" / n).read_bytes() for n in names] == [
        (tmp_path / "whole" / n).read_bytes() for n in names
    ]
    asked = fake(monkeypatch, [], [])
    assert make(tmp_path / "again").run({}) == whole and asked == []
    asked = fake(monkeypatch, sums, [1] * 11)
    make(tmp_path / "again", about=lambda params: dict(fingerprint="b")).run({})
    assert asked == [8, 3]


def test_what_cannot_be_evaluated_is_refused(monkeypatch):
    fake(monkeypatch, [0.0] * 11, [0] * 11)
    with pytest.raises(ValueError, match="none of 11 rows has a supervised token"):
        make().run({})
    with pytest.raises(ValueError, match="there are no rows"):
        make(inputs=[]).run({})
    batch, _ = next(batches(tiny.batch(rows=len(ROWS))))
    with pytest.raises(ValueError, match="no 'question_id'.*keep"):
        make(inputs=[(batch, [{}] * 8)]).run({})
    batch["_mask"] = batch["_mask"][::-1] & (np.arange(8) > 0)
    with pytest.raises(ValueError, match="expected the valid ones first"):
        make(inputs=[(batch, ROWS[:7])]).run({})


def test_its_lines_are_json(monkeypatch, tmp_path):
    fake(monkeypatch, [float("inf")] * 11, [1] * 11)  # a model that finds an answer impossible
    figures = make(tmp_path).run({})
    assert figures["avg"] == float("inf") and "avg_low" not in figures
    assert json.loads((tmp_path / "losses.jsonl").read_text().splitlines()[0])["loss"] == float("inf")
