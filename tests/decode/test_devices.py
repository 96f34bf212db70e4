"""Decoding on several devices and in several processes."""

import json

import jax
import numpy as np
import pytest

from paligemma_med import decode
from paligemma_med.parallel import sharding
from tests import processes
from tests.decode.tiny_models import NO_EOS, SAMPLING, make, make_batch
from tests.rounding import assert_close


@pytest.mark.parametrize("calls", ["generate", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategy",
    [
        pytest.param("replicate", marks=pytest.mark.slow),
        'fsdp(axis="data", min_size_to_shard_mb=0)',
    ],
)
def test_on_a_mesh(strategy, calls):
    model, params = make()
    mesh = sharding.make_mesh()
    batch = make_batch([1, 2, 3, 4, 4, 3, 2, 1]) | {"_mask": np.arange(8) < 7}
    placed = jax.device_put(batch, sharding.batch_sharding(mesh))
    where = sharding.infer_sharding(params, [(".*", strategy)], mesh)
    got = decode.generate(model, jax.device_put(params, where), placed, num_samples=2, **SAMPLING)
    want = decode.generate(model, params, batch, num_samples=2, **SAMPLING)
    np.testing.assert_array_equal(got[0], want[0])
    assert_close(got[1], want[1], units=32)
    if calls == "generate":
        return

    kw = dict(beams=2, max_new_tokens=3, eos_token=NO_EOS)
    got = decode.beam_search(model, jax.device_put(params, where), placed, **kw)
    want = decode.beam_search(model, params, batch, **kw)
    np.testing.assert_array_equal(got[0], want[0])
    assert_close(got[1], want[1], units=32)
    options, on = np.asarray(want[0]), np.ones(want[0].shape, bool)
    sums = [decode.score_options(model, params, b, options, on)[0] for b in (placed, batch)]
    assert_close(*sums, units=32)


@pytest.mark.slow
def test_two_processes_decode_as_one(tmp_path):
    for num in (1, 2):
        processes.run("tests.decode.two_processes", [tmp_path], num=num)
    alone, *each = (json.loads((tmp_path / f"{x}.json").read_text()) for x in ("alone", 0, 1))
    assert len(alone) == 8
    for found in each:
        for a, b in zip(alone, found, strict=True):
            assert_close(a, b, units=32)
