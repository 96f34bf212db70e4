"""Training batches depend on seed and step alone, and a run continues from its state."""

import json
import time

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from paligemma_med.parallel import sharding
from tests.input_pipeline.tiny_vqa import N_TRAIN, N_VALID, assert_equal, make_pp, mixture, train


def test_an_epoch_holds_each_row_once_and_epochs_differ(data):
    batches = train(data, steps=3 * N_TRAIN, batch_size=1)
    numbers = [int(b["number"][0]) for b in batches]
    epochs = [numbers[k * N_TRAIN : (k + 1) * N_TRAIN] for k in range(3)]
    assert all(sorted(epoch) == list(range(N_TRAIN)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(N_TRAIN))


def test_batches_go_on_across_epochs_without_dropping_rows(data):
    # 23 rows in batches of 8: whatever the batch size, the stream of rows is the same one.
    small = np.concatenate([b["number"] for b in train(data, steps=2 * N_TRAIN, batch_size=1)])
    large = np.concatenate([b["number"] for b in train(data, steps=5, batch_size=8)])
    np.testing.assert_array_equal(small[:40], large)


def test_random_numbers_differ_by_row_and_epoch_and_come_from_the_seed(data):
    one = train(data, steps=6)
    assert_equal(train(data, steps=6), one)
    noise = np.concatenate([b["noise"] for b in one])
    assert len(np.unique(noise[:, 0])) == len(noise)
    other = train(data, steps=6, seed=8)
    assert any((a["number"] != b["number"]).any() for a, b in zip(one, other))


@pytest.mark.parametrize("start", [1, 2, 3, 11])
def test_start_step_skips_exactly(data, start):
    assert_equal(train(data, steps=2, start_step=start), train(data, steps=start + 2)[start:])


@pytest.mark.parametrize("options", [{"num_threads": 3}, {"prefetch": 0}, {"prefetch": 5}])
def test_threads_and_prefetch_change_nothing(data, options):
    assert_equal(train(data, steps=7, **options), train(data, steps=7, num_threads=1))


@pytest.mark.parametrize(
    ("cfg", "word"),
    [
        ({"batch_size": 12}, "input.batch_size=12 doesn't divide by the 8 shards.*use 8 or 16"),
        ({"batch_size": 4}, "use 8$"),
        ({"batch_size": 0}, "positive"),
        ({"batch_size": 8.0}, "positive"),
        ({"batchsize": 8}, "unknown keys.*batchsize"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch": "2"}, "prefetch='2'"),
        ({"on_error": "ignore"}, "input.on_error='ignore': expected 'error' or 'skip'"),
    ],
)
def test_config_errors(data, cfg, word):
    mesh = sharding.make_mesh([("data", -1)])
    with pytest.raises(InputError, match=word):
        train(data, steps=0, mesh=mesh, **cfg)


def test_waiting_is_measured(data):
    def pp(d, rng):
        time.sleep(0.05)
        return {"x": np.zeros(1)}

    cfg = {"data": data, "pp": pp, "batch_size": 2, "allow_missing_eos": True, "num_threads": 1}
    with input_pipeline.training(cfg, seed=0) as batches:
        for _ in range(3):
            next(batches)
        assert batches.step == 3
        assert 0.2 < batches.wait_seconds < 5
    with pytest.raises(StopIteration):
        next(batches)


def test_question_ids_of_any_step_without_pp(data):
    expected = [[f"q{n}" for n in b["number"]] for b in train(data, steps=5)]
    cfg = {"data": data, "pp": make_pp(fail_on=0), "batch_size": 8}
    with input_pipeline.training(cfg, seed=7, start_step=3) as batches:
        assert [batches.question_ids(step) for step in range(5)] == expected
    other = input_pipeline.training(cfg, seed=8)
    assert other.question_ids(0) != expected[0]


def test_records_without_a_question_id_are_called_by_their_place(data, monkeypatch):
    source = input_pipeline.open_source(data)
    places = {int(source[i]["number"]): f"train[{i}]" for i in range(len(source))}
    expected = [places[int(n)] for n in train(data, steps=1)[0]["number"]]
    read = input_pipeline.Source.__getitem__

    def without(self, index):
        return {k: v for k, v in read(self, index).items() if k != "question_id"}

    monkeypatch.setattr(input_pipeline.Source, "__getitem__", without)
    cfg = {"data": data, "pp": make_pp(), "batch_size": 8}
    assert input_pipeline.training(cfg, seed=7).question_ids(0) == expected


def test_question_ids_of_a_mixture_say_the_set(data):
    cfg, options = mixture(data)
    with input_pipeline.training(cfg, **options) as batches:
        for step in range(4):
            numbers = [int(n) for n in next(batches)["number"]]
            expected = [f"{'small' if n >= 100 else 'big'}:q{n}" for n in numbers]
            assert batches.question_ids(step) == expected


@pytest.mark.parametrize("mixed", [False, True])
def test_a_run_goes_on_from_its_state(data, mixed):
    cfg, options = {"data": data, "pp": make_pp(), "batch_size": 8}, {"seed": 7}
    if mixed:
        cfg, options = mixture(data)
    with input_pipeline.training(cfg, **options) as batches:
        whole = [next(batches) for _ in range(3)]
        state = json.loads(json.dumps(batches.state()))
        whole.append(next(batches))
    assert state["next_step"] == 3 and state["batch_size"] == 8
    sets = {"big": ["train", N_TRAIN], "small": ["validate", N_VALID]}
    assert state["sets"] == (sets if mixed else {"tiny_vqa/en": ["train", N_TRAIN]})
    with input_pipeline.training(cfg, **options, start_step=3, state=state) as batches:
        assert_equal([next(batches)], whole[3:])
        assert batches.state() == {**state, "next_step": 4}


@pytest.mark.parametrize(
    ("cfg", "options", "word"),
    [
        ({"batch_size": 4}, {}, "batch_size was 8 and is now 4"),
        ({}, {"seed": 8}, "seed was 7 and is now 8"),
        ({}, {"start_step": 2}, "next_step was 3 and is now 2"),
        ({"data": dict(big=1, small=1)}, {}, "mixture was .*0.66.* and is now .*0.5"),
        ({"data": dict(big=1, small=0)}, {}, "mixture was|sets was"),
        ({"big": "train[:9]"}, {}, r"sets was .*\['train', 23\].* is now .*\['train\[:9\]', 9\]"),
        ({"anneal": [(0.5, dict(big=1, small=2))]}, {}, "mixture was"),
    ],
)
def test_a_run_does_not_go_on_with_another_input(data, cfg, options, word):
    before, at = mixture(data)
    state = input_pipeline.training(before, **at, start_step=3).state()
    # More steps of the same mixture are the same mixture, but not where it is annealed.
    input_pipeline.training(before, **{**at, "total_steps": 20}, start_step=3, state=state)
    if "big" in cfg:
        cfg = {"big": dict(data={**data, "split": cfg["big"]})}
    options = {**at, "start_step": 3, **options}
    with pytest.raises(InputError, match=word):
        input_pipeline.training({**before, **cfg}, **options, state=state)


def test_annealing_refers_to_a_length_that_may_not_change(data):
    cfg, options = mixture(data, anneal=[(0.5, dict(big=1, small=2))])
    state = input_pipeline.training(cfg, **options).state()
    with pytest.raises(InputError, match="total_steps was 9 and is now 20"):
        input_pipeline.training(cfg, **{**options, "total_steps": 20}, state=state)
