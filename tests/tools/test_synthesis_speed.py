"""The synthesis benchmark on a tiny model: both sides answer the same captions, with one work."""

import os

import pytest

from tests.tools.synthesize_qa import tiny_llama
from tools.bench import synthesis_speed

KW = dict(rows=6, tokens=8, rounds=2, batch_size=3, dtype="float32", cores=1)


def test_both_sides_do_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *a: None)
    folder = tiny_llama.save(tmp_path / "tiny")
    rows = tiny_llama.captions(tmp_path / "c.jsonl", 6)
    sizes, real = [], synthesis_speed.local._generate_all

    def spied(asked, *args):
        sizes.append(len(asked))
        return real(asked, *args)

    monkeypatch.setattr(synthesis_speed.local, "_generate_all", spied)
    found = synthesis_speed.run(model=str(folder), input=str(rows), **KW)
    assert sizes == [1] + 2 * [3, 3, 1, 1, 1, 1, 1, 1]
    assert found["new_tokens"]["batched"] == found["new_tokens"]["one_at_a_time"] > 6
    assert found["captions"] == 6 and all(len(x) == 2 for x in found["seconds"].values())
    with pytest.raises(ValueError, match="has 2 captions; expected 3"):
        synthesis_speed.run(model=str(folder), input=str(rows), **{**KW, "rows": 2})
    with pytest.raises(ValueError, match="give --model and --input"):
        synthesis_speed.run(model=None, input=str(rows), **KW)
