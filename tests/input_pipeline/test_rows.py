"""Rows and batches: what pp may leave, EOS, truncation, and how a bad row is named."""

import sys

import jax
import numpy as np
import pytest
from absl import logging

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from tests.input_pipeline.tiny_vqa import LENGTH, N_TRAIN, make_pp, train


def test_truncation_is_counted_and_reported(data, monkeypatch):
    warned = []
    monkeypatch.setattr(logging, "warning", lambda text, *args: warned.append(text % args))
    pp = make_pp(cut=lambda n: n if n in (3, 20) else 0)
    cfg = {"data": data, "pp": pp, "batch_size": 1}
    with input_pipeline.training(cfg, seed=0) as batches:
        for _ in range(N_TRAIN - 1):
            assert not any(k.startswith("_") for k in next(batches))
        next(batches)
        assert batches.stats == {
            "examples": N_TRAIN,
            "truncated": 2,
            "tokens_cut": 23,
            "longest_cut": 20,
        }
        assert len(warned) == 1 and "2 of 23 examples" in warned[0]
        assert batches.num_examples == N_TRAIN and batches.steps_per_epoch == N_TRAIN
        for _ in range(N_TRAIN // 2):
            next(batches)
    # The end reports what came since, if anything did.
    seen = batches.stats["truncated"]
    assert len(warned) == 1 + (seen > 2)


def test_nothing_truncated_warns_of_nothing(data, monkeypatch):
    monkeypatch.setattr(logging, "warning", lambda *a: pytest.fail(str(a)))
    train(data, steps=6)


def test_missing_eos_is_an_error_unless_allowed(data):
    pp = make_pp(eos_lost_on=11, cut=lambda n: 4 if n == 11 else 0)
    with pytest.raises(InputError) as e:
        train(data, pp, steps=6)
    for word in ("tiny_vqa/en", "question_id q11", "EOS", "text_len", f"now {LENGTH}", "cut 4"):
        assert word in str(e.value), str(e.value)
    assert len(train(data, pp, steps=6, allow_missing_eos=True)) == 6
    with pytest.raises(InputError, match="eos='yes'"):
        train(data, make_pp(eos=False), steps=1)


def test_an_eos_that_is_not_supervised_does_not_count(data):
    def pp(d, rng):
        return {"text": np.array([2, 60, 1]), "mask_loss": np.array([0, 1, 0])}

    with pytest.raises(InputError, match="EOS"):
        train(data, pp, steps=1)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (lambda d: {"answer": d["answer"]}, ["answer (str)", 'keep("text", "mask_loss"']),
        (lambda d: {"boxes": d["boxes"]}, ["boxes (dict)"]),
        (lambda d: {"image": d["image"]}, ["image (bytes)"]),
        (lambda d: {"image": np.zeros(8 + int(d["number"]) % 3)}, ["'image'", "resize", "(8,)"]),
        (lambda d: {"x": 1} if d["number"] % 2 else {}, ["different keys", "'x'"]),
    ],
)
def test_rows_that_make_no_batch(data, extra, words):
    with pytest.raises(InputError) as e:
        train(data, make_pp(extra=extra), steps=6)
    assert all(word in str(e.value) for word in words), str(e.value)


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_pp_that_wants_to_exit_is_an_error(data, prefetch):
    # In a thread it would end that thread, and training would wait for ever.
    with pytest.raises(InputError, match="pp failed: SystemExit: 0"):
        train(data, lambda d, rng: sys.exit(0), steps=1, prefetch=prefetch)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_pp_errors_name_the_row(data, num_workers):
    with pytest.raises(InputError) as e:
        train(data, make_pp(fail_on=17), steps=6, num_workers=num_workers)
    message = str(e.value)
    assert "\n" not in message and message.endswith("there is no such thing")
    assert "tiny_vqa/en split train, record" in message and "(question_id q17)" in message
    # The index is that of the split as opened.
    index = int(message.split("record ")[1].split()[0])
    assert input_pipeline.open_source(data)[index]["question_id"] == "q17"


def test_pp_strings(data):
    concat = (
        'strfmt("answer en {question}", outkey="prefix")|copy("answer", "suffix")'
        '|tok(model="tiny", key="prefix", bos="yes")|tok(model="tiny", key="suffix", eos="yes")'
        '|masked_concat(["prefix", "suffix"], outkey="text", mask_ar=[0, 1], mask_loss=[0, 1])'
    )
    image = "decode|resize(16)|value_range(-1, 1)"
    lengths = '|tolen({n}, pad_value=0, key="text")|tolen({n}, pad_value=0, key="mask_loss")'
    pp = f'{image}|{concat}{lengths.format(n=64)}|keep("image", "text", "mask_loss")'
    batch = train(data, pp, steps=1, batch_size=4)[0]
    assert {k: (v.shape, str(v.dtype)) for k, v in batch.items()} == {
        "image": ((4, 16, 16, 3), "float32"),
        "text": ((4, 64), "int32"),
        "mask_loss": ((4, 64), "int32"),
    }
    assert isinstance(batch["image"], jax.Array)
    with pytest.raises(InputError, match=r"question_id q\d+.*tolen cut \d+ tokens.*now 10"):
        train(data, pp.replace("64", "10"), steps=1)
    with pytest.raises(ValueError, match="unknown pp op 'decoed'"):
        train(data, "decoed|resize(16)", steps=0)
