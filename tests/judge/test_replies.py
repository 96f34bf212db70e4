"""The file of replies: one process at a time, no half lines, and strange ones are named."""

import os

import pytest

from paligemma_med.judge import replies


def test_a_cache_is_one_processs(tmp_path):
    with replies.Cache(tmp_path / "cache"):
        with pytest.raises(ValueError, match="in use by another process"):
            replies.Cache(tmp_path / "cache")
    replies.Cache(tmp_path / "cache").close()


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "{}",
        "[]",
        '{"key": "k", "score": "1", "usage": null}',
        '{"key": "k", "score": true, "usage": null}',
        '{"key": "k", "score": 1, "usage": [1, -1]}',
    ],
)
def test_a_strange_line_in_the_cache_is_named(tmp_path, line):
    (tmp_path / "cache").write_text(line + "\n")
    with pytest.raises(ValueError, match="cache, line 1"):
        replies.Cache(tmp_path / "cache")


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    record = dict(key="k", score=1, usage=None, model=None)
    with replies.Cache(tmp_path / "cache") as cache:
        cache.add(record)

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch, pytest.raises(OSError, match="cache can't be written"):
            patch.setattr(os, "fsync", full)
            cache.add({**record, "key": "l"})
        assert cache.score("l") is None
        cache.add({**record, "key": "m"})
    with replies.Cache(tmp_path / "cache") as cache:
        assert [cache.score(k) for k in "klm"] == [1, None, 1]
