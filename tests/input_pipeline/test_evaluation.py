"""Evaluation: one split in order, in whole batches, as often as wanted."""

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from paligemma_med.parallel import sharding
from tests.input_pipeline.tiny_vqa import N_TRAIN, assert_equal, eval_pp, make_pp, question_ids


@pytest.mark.parametrize("batch_size", [1, 8, 23, 32])
def test_evaluation_goes_through_the_split_once_in_order(data, batch_size):
    source = input_pipeline.open_source(data)
    expected = [source[i]["question_id"] for i in range(len(source))]
    batches = input_pipeline.evaluation(data, eval_pp, batch_size)
    assert len(batches) == N_TRAIN
    for _ in range(2):
        seen, texts, count = [], [], 0
        for batch, rows in batches:
            count += 1
            mask = np.asarray(batch["_mask"])
            assert mask.dtype == bool and mask.shape == (min(batch_size, N_TRAIN),)
            assert set(batch) == {"text", "number", "_mask"}
            assert mask.sum() == len(rows) and mask[: len(rows)].all()
            # Padding is a copy of row 0.
            text = np.asarray(batch["text"])
            assert (text[~mask] == text[0]).all()
            assert set(rows[0]) == {"question_id", "boxes"}
            seen += [row["question_id"] for row in rows]
            texts += list(text[mask][:, 0])
        assert seen == expected
        assert [f"q{n}" for n in texts] == expected
        assert count == batches.num_batches == -(-N_TRAIN // batch_size)
        assert batches.stats == {"examples": N_TRAIN, "truncated": 1}


def test_evaluation_can_be_left_and_started_again(data):
    batches = input_pipeline.evaluation(data, eval_pp, 4)
    first = question_ids(next(iter(batches))[1])
    assert question_ids(next(iter(batches))[1]) == first
    assert sum(len(rows) for _, rows in batches) == N_TRAIN


def test_evaluation_on_a_mesh_and_with_workers(data):
    mesh = sharding.make_mesh([("data", -1)])

    def pp(d, rng):
        return {"number": d["number"], "answer": d["answer"]}

    plain = list(input_pipeline.evaluation(data, pp, 8))
    other = list(input_pipeline.evaluation(data, pp, 8, mesh=mesh, num_workers=1))
    assert_equal([b for b, _ in other], [b for b, _ in plain])
    assert [rows for _, rows in other] == [rows for _, rows in plain]
    assert len(other[0][0]["number"].addressable_shards) == 8
    with pytest.raises(InputError, match="batch_size=6"):
        input_pipeline.evaluation(data, pp, 6, mesh=mesh)


def test_evaluation_errors_name_the_row(data):
    with pytest.raises(InputError, match=r"record \d+ \(question_id q4\): pp failed"):
        list(input_pipeline.evaluation(data, make_pp(fail_on=4), 4))
