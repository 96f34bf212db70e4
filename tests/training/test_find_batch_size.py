"""The search for the most examples that fit: what it answers, and how seldom it asks."""

import types

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paligemma_med import train
from paligemma_med.training import dry_run, find_batch_size
from tests import tiny

pytestmark = pytest.mark.usefixtures("optimised_file")

HEAD = [("img/head/.*", dict(decay_type="constant")), (".*", None)]


def asked(peak, limit, most=4096):
    """(what the search finds, what it asked for)."""
    seen = []

    def peak_of(n):
        assert 1 <= n <= most and n not in seen
        seen.append(n)
        return peak(n)

    return find_batch_size.search(peak_of, limit, most), seen


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=60),
    st.integers(0, 100),
    st.sampled_from([1.0, 1.1]),
)
def test_finds_the_border_of_anything_that_grows(growth, limit, factor):
    """Flat stretches, jumps and exponentials."""
    values = [0.0]
    for x in growth:
        values.append(values[-1] * factor + x)
    found, _ = asked(lambda n: values[n - 1], limit, most=len(values))
    assert found == sum(x <= limit for x in values)


@given(st.floats(0.01, 3), st.floats(0, 20), st.floats(1, 80))
def test_a_line_takes_four_questions(slope, start, limit):
    found, seen = asked(lambda n: start + slope * n, limit)
    assert (found == 0) == (start + slope > limit)
    assert found == 0 or start + slope * found <= limit
    assert found == 4096 or start + slope * (found + 1) > limit
    assert len(seen) <= 5  # rounding may ask for a neighbour, too


@given(st.floats(0.05, 3), st.floats(0, 10), st.floats(1.0, 2.0), st.floats(1, 80))
def test_a_curve_takes_no_more_than_halving_twice_over(slope, start, power, limit):
    _, seen = asked(lambda n: start + slope * n**power, limit)
    assert len(seen) <= 2 * 12  # 2**12 = 4096


def config(batch_size, accum, **kw):
    c = tiny.config("/no/such/folder", schedule=HEAD, **kw)
    c.input.batch_size = batch_size
    c.grad_accum_steps = accum
    return c


@pytest.fixture
def compiled(monkeypatch):
    """A fake of compilation: 1 GiB, 0.5 a row at a time on each of eight devices, 0.25 if there is
    accumulation. Gives the list of (rows, accumulated steps) asked for."""
    seen = []

    def parts(setup):
        c = setup.config
        accum = c.grad_accum_steps
        rows = c.input.batch_size // (8 * accum)
        seen.append((rows, accum))
        return {"frozen weights": 2**30, "temporary": rows * 2**29 + (accum > 1) * 2**28}

    monkeypatch.setattr(find_batch_size, "_parts", parts)
    return seen


def test_a_config_that_accumulates_keeps_its_batch(compiled, capsys):
    c = config(96 * 8, 16)
    found = find_batch_size.find_batch_size(c, hbm_gib=8.0)
    assert found["rows"] == 13  # 1.25 + 6.5 GiB
    assert (found["rows_of_own"], found["grad_accum_steps"]) == (12, 8)
    assert found["batch_size"] == c.input.batch_size and c.grad_accum_steps == 16
    assert all(rows * accum <= 96 for rows, accum in compiled)
    assert found["peak_of_own"] == 7.25 and found["peaks"][13] == 7.75
    out = capsys.readouterr().out
    assert "--config.grad_accum_steps=8 (12 at a time, 7.25 GiB)" in out
    assert "13 at a time" in out and "As one batch" not in out


def test_a_config_that_does_not_gets_another_batch(compiled, capsys):
    """Alone 14 rows of 8 devices fit; cut in three, 32 rows make 16 that don't, and 8 that do."""
    found = find_batch_size.find_batch_size(config(32 * 8, 1), hbm_gib=8.0)
    assert found["rows"] == 14
    assert (found["rows_of_own"], found["grad_accum_steps"]) == (8, 4)
    assert "--config.input.batch_size=112" in capsys.readouterr().out


def test_accumulating_takes_room_of_its_own(compiled):
    """Ten rows take 6.0 GiB as one batch, but 6.25 as one of two parts."""
    found = find_batch_size.find_batch_size(config(20 * 8, 1), hbm_gib=6.1)
    assert found["rows"] == 10
    assert (found["rows_of_own"], found["grad_accum_steps"]) == (5, 4)
    assert (10, 2) in compiled


def test_nothing_fits(compiled):
    with pytest.raises(ValueError, match="doesn't fit: 1.75 GiB .* largest part is frozen weights"):
        find_batch_size.find_batch_size(config(16, 2), hbm_gib=1.5)


def test_needs_a_size(monkeypatch):
    values = types.SimpleNamespace(find_batch_size=True, dry_run=True, hbm_gib=None, config=None, chip=None)
    monkeypatch.setattr(train.flags, "FLAGS", values)
    monkeypatch.setattr(train.distributed, "start_from_flags", lambda: None)
    monkeypatch.setattr(train.cli, "with_weight_flags", lambda config: config)
    with pytest.raises(ValueError, match="--find_batch_size needs --hbm_gib"):
        train.main.__wrapped__([])


@pytest.mark.slow
def test_what_is_found_is_what_the_dry_run_foretells(capsys):
    """In bfloat16, whose temporary is bounded on a CPU by that of float32."""
    c = config(16, 1, dtype="bfloat16", frozen_dtype="bfloat16")
    c.input.batch_size = 16
    one = dry_run.dry_run(c)["peak_elsewhere"]
    found = find_batch_size.find_batch_size(c, hbm_gib=4 * one)
    rows = found["rows"]
    c.input.batch_size = rows * len(jax.devices())
    dry_run.dry_run(c, hbm_gib=4 * one)
    assert dry_run.dry_run(c)["peak_elsewhere"] == pytest.approx(found["peaks"][rows], rel=0.02)
    c.input.batch_size = (rows + 1) * len(jax.devices())
    assert dry_run.dry_run(c)["peak_elsewhere"] > 4 * one
