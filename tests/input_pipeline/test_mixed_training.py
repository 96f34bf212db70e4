"""Training on a mixture: shares, annealing, orders, resuming, and what each mistake says."""

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError
from tests.input_pipeline.tiny_vqa import N_TRAIN, N_VALID, assert_equal, make_pp, mix, mixture


def test_each_set_of_a_mixture_has_its_share_of_every_stretch(data):
    batches, epochs = mix(data, dict(big=0.85, small=0.15), steps=30)
    is_small = np.concatenate([b["number"] for b in batches]) >= 100
    drawn = np.cumsum(is_small)
    assert np.abs(drawn - 0.15 * np.arange(1, len(drawn) + 1)).max() <= 0.5
    counts = dict(big=(~is_small).sum() / N_TRAIN, small=is_small.sum() / N_VALID)
    assert epochs == pytest.approx(counts)


def test_annealing_brings_a_set_in_late(data):
    weights, anneal = (
        dict(big=1, small=0),
        [(0.5, dict(big=1, small=1)), (0.75, dict(big=0, small=1))],
    )
    batches, _ = mix(data, weights, anneal=anneal, steps=40)
    small = [int((b["number"] >= 100).sum()) for b in batches]
    assert small == [0] * 20 + [4] * 10 + [8] * 10


def test_sets_of_a_mixture_are_gone_through_whole_and_each_by_its_own_order(data):
    batches, _ = mix(data, dict(big=1, small=1), steps=90, batch_size=1)
    numbers = np.concatenate([b["number"] for b in batches])
    big, small = numbers[numbers < 100], numbers[numbers >= 100]
    assert sorted(big[:N_TRAIN]) == list(range(N_TRAIN))
    assert all(sorted(small[k : k + 9]) == list(range(100, 109)) for k in (0, 9, 18, 27))
    assert small[:9].tolist() != small[9:18].tolist()
    same, _ = mix(data, dict(big=1, other=1), steps=2 * N_TRAIN, batch_size=1)
    same = [int(b["number"][0]) for b in same]
    assert same[::2] != same[1::2]


def test_mixtures_resume_exactly_and_come_from_the_seed(data):
    weights, kw = dict(big=2, small=1), dict(anneal=[(0.6, dict(big=1, small=2))], total_steps=9)
    whole, epochs = mix(data, weights, steps=9, **kw)
    later, epochs_later = mix(data, weights, steps=4, start_step=5, **kw)
    assert_equal(later, whole[5:])
    assert epochs == epochs_later
    other, _ = mix(data, weights, steps=9, seed=8, **kw)
    assert any((a["number"] != b["number"]).any() for a, b in zip(whole, other))
    workers, _ = mix(data, weights, steps=9, num_workers=2, **kw)
    assert_equal(workers, whole)


def test_an_epoch_of_a_mixture_is_all_its_rows(data):
    weights, sections = dict(big=2, small=1), dict(big=dict(data=data))
    sections["small"] = dict(data={**data, "split": "validate"})
    cfg = dict(data=weights, pp=make_pp(), **sections)
    assert input_pipeline.num_examples(cfg) == N_TRAIN + N_VALID
    # A set of weight 0 isn't even opened.
    cfg = {**cfg, "data": dict(big=1, small=0), "small": dict(data=dict(name="none"))}
    assert input_pipeline.num_examples(cfg) == N_TRAIN


def test_sets_that_are_open_are_not_opened_again(data, monkeypatch):
    cfg, options = mixture(data)
    with input_pipeline.training(cfg, **options) as batches:
        expected = [next(batches) for _ in range(2)]
    sets = input_pipeline.TrainingSets(cfg)
    assert sets.num_examples == N_TRAIN + N_VALID
    monkeypatch.setattr(input_pipeline.sets, "open_source", lambda data: pytest.fail(f"opens {data}"))
    for _ in range(2):
        with input_pipeline.training(cfg, **options, sets=sets) as batches:
            assert_equal([next(batches) for _ in range(2)], expected)


@pytest.mark.parametrize(
    "cfg, words",
    [
        (dict(data=dict(big=1)), "so input.big=dict.* is expected"),
        (dict(data=dict(big="1"), big={}), "input.data.big='1'; expected a weight"),
        (dict(data=dict(big=1), big=dict(pq="")), "input.big: unknown keys .*'pq'"),
        (dict(data=dict(big=1), bigg=dict(data={})), "unknown keys.*bigg"),
        (dict(data=dict(name="x", split="y"), anneal=[(0.5, {})]), "input.anneal is for mixtures"),
        (dict(data=dict(big=1), big={}, anneal=[(0.5, dict(small=1))]), r"expected \['big'\]"),
    ],
)
def test_mixture_errors(cfg, words):
    with pytest.raises(InputError, match=words):
        input_pipeline.training({"pp": make_pp(), "batch_size": 8, **cfg}, seed=0, total_steps=5)


def test_a_mixture_must_know_how_long_it_is(data):
    cfg = dict(data=dict(big=1), big=dict(data=data), pp=make_pp(), batch_size=8)
    with pytest.raises(InputError, match="needs total_steps"):
        input_pipeline.training(cfg, seed=0)
