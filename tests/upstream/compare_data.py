"""The same rows and batches through big_vision's data reader and ours: a program for test_data.

    python -m tests.upstream.compare_data TFRECORD_DIR ARRAY_RECORD_DIR NAME SPLIT...

Both folders hold data set NAME, in the format each is called by. Compares every row of the splits,
all evaluation batches of the last one, and a training batch of it. Ends with an error at the first
difference; else prints what it compared as JSON.
"""

import importlib
import json
import sys

import jax
import numpy as np

from configs import common
from paligemma_med import input_pipeline, upstream
from paligemma_med.pp import get_preprocess_fn
from tests.upstream.compare_pp import GREY

upstream.install()
import big_vision.input_pipeline as bv_input  # noqa: E402  after install
import ml_collections  # noqa: E402
from big_vision.datasets import core as bv_datasets  # noqa: E402
from big_vision.pp import builder as bv_builder  # noqa: E402

from paligemma_med.upstream.config import PP_MODULES  # noqa: E402

RES, TEXT_LEN, BATCH = 64, 24, 16


def same(ours, theirs, where):
    """Equal values: text as str here and bytes there, lists and arrays, nested dicts."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            same(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, str):
        assert ours == theirs.decode(), where
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for a, b in zip(ours, theirs):
            same(a, b, where)
    elif isinstance(ours, bytes):
        assert ours == theirs, where
    else:
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype, where
        np.testing.assert_array_equal(ours, theirs, err_msg=where)


def rows_agree(theirs, ours):
    """Every row, in order. Their reader adds ids of its own, which must all differ."""
    ids, count = set(), 0
    for row in theirs.get_tfdata(ordered=True).as_numpy_iterator():
        ids |= {row.pop("tfds_id")}
        row.pop("_id")
        same(ours[count], row, f"{ours}, record {count}")
        count += 1
    assert count == len(ours) == len(ids) == theirs.total_examples
    return count


def eval_batches_agree(theirs, data, pp):
    """All batches of an evaluation: arrays, padding of the last one, and texts."""
    batches, steps = bv_input.make_for_inference(
        theirs.get_tfdata(ordered=True),
        bv_builder.get_preprocess_fn(pp, log_data=False),
        BATCH,
        theirs.num_examples_per_process(),
    )
    ours, questions = list(input_pipeline.evaluation(data, pp, BATCH)), 0
    assert len(ours) == steps
    for (batch, rows), their in zip(ours, batches.as_numpy_iterator()):
        valid = np.asarray(batch["_mask"])
        np.testing.assert_array_equal(their["_mask"], valid)
        for key in ("text", "mask_ar", "mask_input"):
            np.testing.assert_array_equal(np.asarray(batch[key])[valid], their[key][valid])
        image = np.asarray(batch["image"])[valid]
        assert np.abs(image - their["image"][valid]).max() <= GREY
        for key in common.EVAL_KEYS:
            assert [row[key] for row in rows] == [v.decode() for v in their[key][valid]], key
        questions += len(rows)
    return questions


def train_batch_agrees(data, their_data, pp):
    """A batch of shuffled rows: each is one of ours, and they aren't the first ones in order."""
    cfg = dict(data=their_data, pp=pp, batch_size=BATCH, shuffle_buffer_size=1000)
    batches, total = bv_input.training(ml_collections.ConfigDict(cfg))
    batch = next(batches.as_numpy_iterator())
    source, fn, ours = input_pipeline.open_source(data), get_preprocess_fn(pp), {}
    assert total == len(source)
    for i in range(len(source)):
        row = fn(source[i])
        ours.setdefault(row["text"].tobytes(), []).append((i, row))
    found = []
    for k in range(BATCH):
        their = {key: value[k] for key, value in batch.items()}
        match = [
            i
            for i, row in ours[their["text"].tobytes()]
            if np.abs(row["image"] - their["image"]).max() <= GREY
            and all((row[m] == their[m]).all() for m in ("mask_ar", "mask_loss"))
        ]
        assert match, f"row {k} of their batch is none of ours"
        found.append(match[0])
    assert sorted(found) != found
    return BATCH


def main(tfrecord_dir, array_record_dir, name, *splits):
    jax.config.update("jax_platforms", "cpu")
    for module in PP_MODULES:
        importlib.import_module(f"big_vision.pp.{module}")
    out = dict(rows={})
    for split in splits:
        data = dict(name=name, split=split, data_dir=array_record_dir)
        their_data = dict(name=name, split=split, data_dir=tfrecord_dir)
        theirs = bv_datasets.get(**their_data)
        out["rows"][split] = rows_agree(theirs, input_pipeline.open_source(data))
    eval_pp = common.eval_pp(RES, TEXT_LEN, "tiny")
    out["eval"] = eval_batches_agree(theirs, data, eval_pp)
    train_pp = common.train_pp(RES, TEXT_LEN, "tiny")
    out["train"] = train_batch_agrees(data, their_data, train_pp)
    print(json.dumps(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
