"""Durations in every unit, and what can't be one."""

import pytest

from paligemma_med.config import durations


def steps(config, name="total", **kw):
    kw = {"num_examples": 100, "batch_size": 8, **kw}
    return durations.to_steps(config, name, **kw)


@pytest.mark.parametrize(
    "config, expected",
    [
        (dict(total_steps=7), 7),
        (dict(total_epochs=2), 25),
        (dict(total_epochs=0.5), 6),
        (dict(total_examples=80), 10),
        (dict(total_examples=1), 1),  # never rounded away
        (dict(total_percent=0.25), 10),
        (dict(total_percent=0), 0),
        (dict(total_steps=0), 0),
        (dict(total_steps=None, total_epochs=2), 25),
        (dict(ckpt_steps=5), None),
        ({}, None),
    ],
)
def test_units(config, expected):
    assert steps(config, total_steps=40) == expected


def test_default():
    assert steps({}, default=3) == 3
    assert steps(dict(total_steps=4), default=3) == 4


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(total_steps=1, total_epochs=1), "Only one of.*total_steps.*total_epochs"),
        (dict(total_steps=-1), "total_steps is -1"),
        (dict(total_epochs="5"), "total_epochs is '5'"),
        (dict(total_steps=True), "total_steps is True"),
        (dict(total_steps=float("nan")), "total_steps is nan"),
        (dict(total_epochs=float("inf")), "total_epochs is inf"),
        (dict(total_steps=2.5), "total_steps is 2.5"),
        (dict(total_percent=0.5), "total_percent can't be used here"),
    ],
)
def test_errors(config, message):
    with pytest.raises(ValueError, match=message):
        steps(config)
