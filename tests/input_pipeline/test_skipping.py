"""Records that can't be used: skipped, replaced by others of the set, and listed."""

import json

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from tests.input_pipeline.tiny_vqa import (
    N_TRAIN,
    assert_equal,
    breaks,
    damaged_copy,
    make_pp,
    mix,
    mixture,
    skipping,
    train,
)


def test_skipped_records_are_replaced_counted_and_listed(data):
    plain = train(data, breaks(), steps=6)
    batches, skipped, ids = skipping(data, breaks(4, 11), steps=6)
    source = input_pipeline.open_source(data)
    lost = [(t, int(n)) for t, b in enumerate(plain) for n in b["number"] if n in (4, 11)]
    assert len(lost) == 4
    # Replacements may be bad themselves, and then they are listed, too.
    assert {(s["step"], s["question_id"]) for s in skipped} >= {(t, f"q{n}") for t, n in lost}
    assert [s["step"] for s in skipped] == sorted(s["step"] for s in skipped)
    for s in skipped:
        assert set(s) == {"step", "set", "record", "question_id", "reason"}
        assert source[s["record"]]["question_id"] == s["question_id"]
        assert s["reason"].endswith(
            f"({'question_id ' + s['question_id']}): pp failed: OSError: image file is truncated"
        )
    for step, (a, b) in enumerate(zip(batches, plain)):
        good = ~np.isin(b["number"], (4, 11))
        for key in a:
            np.testing.assert_array_equal(np.asarray(a[key])[good], np.asarray(b[key])[good])
        assert not np.isin(a["number"], (4, 11)).any()
        assert ids[step] == [f"q{n}" for n in a["number"]]


def test_nothing_is_skipped_of_sound_data(data):
    batches, skipped, _ = skipping(data, breaks(), steps=6)
    assert_equal(batches, train(data, breaks(), steps=6))
    assert skipped == []


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"num_workers": 2}, {"prefetch": 0}])
def test_replacements_come_from_seed_and_step_alone(data, options):
    bad = range(0, N_TRAIN, 3)
    batches, skipped, ids = skipping(data, breaks(*bad), steps=6, num_threads=1)
    assert len(skipped) > 15
    other = skipping(data, breaks(*bad), steps=4, start_step=2, **options)
    assert_equal(other[0], batches[2:])
    assert json.dumps(other[1]) == json.dumps([s for s in skipped if s["step"] >= 2])
    assert other[2] == ids[2:]


def test_replacements_in_a_mixture_are_of_the_same_set(data):
    cfg, options = mixture(data, pp=breaks(*range(0, 200, 2)))
    plain, _ = mix(data, dict(big=2, small=1), steps=4, total_steps=9)
    weights = cfg.pop("data")
    batches, skipped, ids = skipping(weights, cfg.pop("pp"), steps=4, total_steps=9, **cfg)
    for a, b in zip(batches, plain):
        np.testing.assert_array_equal(a["number"] >= 100, b["number"] >= 100)
        assert (a["number"] % 2 == 1).all()
    assert {s["set"] for s in skipped} == {"big", "small"}
    assert all(len(s["question_id"]) > 3 for s in skipped if s["set"] == "small")
    assert ids[0] == [f"{'small' if n >= 100 else 'big'}:q{n}" for n in batches[0]["number"]]


def test_only_records_of_batches_handed_out_count_and_the_count_goes_on(data):
    cfg = {"data": data, "pp": breaks(*range(12)), "batch_size": 8, "on_error": "skip"}
    with input_pipeline.training(cfg | {"prefetch": 5}, seed=7) as batches:
        assert batches.skipped() == [] and batches.num_skipped == 0
        counts = []
        for step in range(3):
            next(batches)
            new = batches.skipped()
            assert new and {s["step"] for s in new} == {step}
            counts.append(len(new))
            assert batches.num_skipped == sum(counts)
            if step == 1:
                state = batches.state()
    assert state["skipped"] == sum(counts[:2])
    with input_pipeline.training(cfg, seed=7, start_step=2, state=state) as batches:
        next(batches)
        assert len(batches.skipped()) == counts[2]
        assert batches.num_skipped == sum(counts)


def test_a_run_that_met_an_error_may_go_on_with_skip(data):
    cfg = {"data": data, "pp": make_pp(), "batch_size": 8}
    state = input_pipeline.training(cfg, seed=7).state()
    input_pipeline.training({**cfg, "on_error": "skip"}, seed=7, state=state)


def test_a_record_that_cannot_be_read_is_skipped(data, data_dir, tmp_path):
    sound = train(data, steps=3)
    data, _ = damaged_copy(data, data_dir, tmp_path)
    batches, skipped, ids = skipping(data, make_pp(), steps=3)
    assert skipped and all(s["question_id"] is None for s in skipped)
    assert "can't be read" in skipped[0]["reason"]
    changed = sum(int((a["number"] != b["number"]).sum()) for a, b in zip(batches, sound))
    assert 0 < changed <= len(skipped)
    assert ids == [[f"q{n}" for n in b["number"]] for b in batches]
    with pytest.raises(InputError, match=r"record \d+: can't be read"):
        train(data, steps=3)
    # Its question id can't be known; it goes by its place.
    cfg = {"data": data, "pp": make_pp(), "batch_size": N_TRAIN}
    assert f"train[{skipped[0]['record']}]" in input_pipeline.training(cfg, seed=7).question_ids(0)


def _raises(error):
    def pp(d, rng):
        raise error

    return pp


@pytest.mark.parametrize(
    ("pp", "words"),
    [
        (_raises(KeyError("imgae")), "10 records drawn one after another .*KeyError: 'imgae'"),
        (_raises(MemoryError("no room")), "record .*no room"),
        (make_pp(eos=False), "no supervised EOS"),
        (make_pp(extra=lambda d: {"answer": "left"}), "input.pp leaves keys"),
    ],
)
def test_what_is_no_fault_of_a_record_is_not_skipped(data, pp, words):
    with pytest.raises(InputError, match=words):
        skipping(data, pp, steps=1)


def test_images_that_are_damaged_are_skipped(data, monkeypatch):
    read = input_pipeline.Source.__getitem__

    def damaged(self, index):
        record = read(self, index)
        kinds = {3: b"", 8: record["image"][:40], 9: b"GIF89a" + record["image"][6:]}
        return {**record, "image": kinds.get(int(record["number"]), record["image"])}

    monkeypatch.setattr(input_pipeline.Source, "__getitem__", damaged)
    pp = 'decode|resize(16)|value_range(-1, 1)|keep("image")'
    options = dict(steps=4, allow_missing_eos=True, num_threads=1)
    batches, skipped, _ = skipping(data, pp, **options)
    assert {s["question_id"] for s in skipped} == {"q3", "q8", "q9"}
    assert all(np.isfinite(b["image"]).all() for b in batches)
    with pytest.raises(InputError, match=r"question_id q[389]\): pp failed"):
        train(data, pp, **options)
