"""The decoding benchmark on a model of few parameters: both sides do the same work, and a
difference between them is found out."""

import os

import numpy as np
import pytest

from tools.bench import decode_speed

MODEL = dict(
    img=dict(width=16, depth=1, mlp_dim=24, num_heads=2, patch_size=(14, 14)),
    llm=dict(width=16, depth=2, mlp_dim=24, num_heads=4, num_kv_heads=1, head_dim=8, vocab_size=50),
)
KW = dict(res=28, batch_size=2, rounds=2, samples=3, tokens=4, cores=2)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(decode_speed, "MODEL", MODEL)
    monkeypatch.setattr(decode_speed, "VOCAB", 50)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *a: None)


def test_both_sides_do_the_same(monkeypatch):
    import torch

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    shapes = []
    side = decode_speed.transformers_side

    def spied(*args):
        call = side(*args)

        def counted(**kw):
            shapes.append(call(**kw).shape)
            return call(**kw)

        return counted

    monkeypatch.setattr(decode_speed, "transformers_side", spied)
    found = decode_speed.run(peer="hf", **KW)
    assert found["ratio"] > 0 and len(found["seconds_a_call"]["hf"]) == 2
    assert shapes[0] == (2, 4) and {*shapes[1:]} == {(2 * 3, 4)}
    assert found["answers_per_second"]["ours"] == pytest.approx(
        6 / found["median_seconds"]["ours"], rel=0.2, abs=1
    )

    monkeypatch.setattr(
        decode_speed, "transformers_side", lambda *a: lambda **kw: np.zeros((2, 4), int)
    )
    with pytest.raises(ValueError, match="greedy answers of hf differ from ours: 0.0%"):
        decode_speed.run(peer="hf", **KW)
