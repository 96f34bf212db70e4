"""The journal: nothing that was acknowledged is lost, a torn batch is as if it had never been, and
its memory doesn't grow with the replies."""

import builtins
import json
import os
import tracemalloc

import pytest

from tools.synthesize_qa import journal


def record(key, reply="Q: a?\nA: b", score=1, **kw):
    return dict(key=key, score=score, reply=reply, finish="stop", usage=[3, 4], model="m", **kw)


def replies(opened, keys):
    return {k: [r["reply"] for r in opened.replies(k)] for k in keys}


def test_replies_come_back_whole_and_in_order(tmp_path):
    long = "ä€😀\n\x00" * 5000
    with journal.open_journal(tmp_path / "j") as opened:
        opened.add_many([record("a", long), record("b", "x", None)])
        opened.add(record("b", "y", 2))
        assert replies(opened, "abc") == {"a": [long], "b": ["x", "y"], "c": []}
        assert [opened.count(k) for k in "abc"] == [1, 2, 0]
        assert [opened.score(k) for k in "abc"] == [1, 2, None]
        before = [opened.replies(k) for k in "ab"]
    with journal.open_journal(tmp_path / "j") as opened:
        assert [opened.replies(k) for k in "ab"] == before


def test_a_batch_that_a_crash_cut_off_is_dropped_whole(tmp_path):
    """Wherever it was cut: the replies of a batch depend on each other's lengths, so that half a
    batch asked again might come out otherwise."""
    path = tmp_path / "j"
    with journal.open_journal(path) as opened:
        opened.add_many([record("a"), record("b")])
        sound = path.stat().st_size
        opened.add_many([record(k, f"reply of {k}") for k in "cdef"])
    whole = path.read_bytes()
    ends = {i + d for i, c in enumerate(whole) if c == 10 for d in (0, 1)}  # of lines
    for cut in sorted(c for c in ends | {*range(sound, len(whole), 23)} if sound <= c < len(whole)):
        path.write_bytes(whole[:cut])
        with journal.open_journal(path) as opened:
            assert [opened.count(k) for k in "abcdef"] == [1, 1, 0, 0, 0, 0]
            opened.add(record("g"))
        assert path.read_bytes()[:sound] == whole[:sound]
        with journal.open_journal(path) as opened:
            assert [opened.count(k) for k in "abcg"] == [1, 1, 0, 1]


def test_a_full_disk_takes_a_batch_back(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "j"
    with journal.open_journal(path) as opened:
        opened.add(record("a"))
        before = path.read_bytes()
        with monkeypatch.context() as patch, pytest.raises(OSError, match="can't be written: No"):
            patch.setattr(os, "fsync", full)
            opened.add_many([record("b"), record("c")])
        assert path.read_bytes() == before and opened.count("b") == 0
        opened.add_many([record("c"), record("d")])
        assert replies(opened, "bd") == {"b": [], "d": ["Q: a?\nA: b"]}


def test_a_batch_is_one_fsync_and_reads_nothing(tmp_path, monkeypatch):
    """What a row costs doesn't depend on how many there were before."""
    calls = []
    with journal.open_journal(tmp_path / "j") as opened:
        opened.add_many([record(str(i)) for i in range(100)])
        fsync = os.fsync
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda fd: calls.append(fd) or fsync(fd))
            patch.setattr(os, "pread", lambda *_: pytest.fail("read"))
            patch.setattr(builtins, "open", lambda *_, **__: pytest.fail("opened"))
            opened.add_many([record(f"n{i}") for i in range(16)])
            assert opened.count("n3") == 1 and opened.score("n3") == 1
    assert len(calls) == 1


def test_memory_is_of_rows_not_of_replies(tmp_path):
    n, reply = 3000, "x" * 10_000
    lines = (json.dumps(record(f"{i:064}", reply)) for i in range(n))
    (tmp_path / "j").write_text("".join(line + "\n" for line in lines))
    tracemalloc.start()
    try:
        with journal.open_journal(tmp_path / "j") as opened:
            kept, _ = tracemalloc.get_traced_memory()
            assert opened.replies(f"{7:064}")[0]["reply"] == reply
    finally:
        tracemalloc.stop()
    assert kept < 600 * n  # 30 MB of replies


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        '{"key": "a", "score": 1, "usage": null, "reply": 1}',
        '{"key": 1, "score": 1, "usage": null, "reply": ""}',
    ],
)
def test_a_strange_line_is_named(tmp_path, line):
    (tmp_path / "j").write_text(json.dumps(record("a")) + f"\n{line}\n")
    with pytest.raises(ValueError, match="j, line 2: found .* reply in a journal of"):
        journal.open_journal(tmp_path / "j")


def test_journals_of_an_output_are_found_in_order(tmp_path):
    output = tmp_path / "a[1]" / "qa.jsonl"
    names = ["qa.journal", "qa.journal.0-of-2", "qa.journal.9-of-12", "qa.journal.10-of-12"]
    output.parent.mkdir()
    for name in [*names, "qa.journal.tmp", "qa.journal.1-of-2x", "qa.journal2", "qa.jsonl"]:
        (output.parent / name).touch()
    assert journal.paths_of(output) == [str(output.parent / name) for name in names]
    assert journal.path_of(output) == str(output.parent / names[0])
    assert journal.path_of(output, (0, 2)) == str(output.parent / names[1])


def test_several_journals_read_as_one(tmp_path):
    paths = [tmp_path / "j0", tmp_path / "j1"]
    with journal.open_journal(paths[0]) as a, journal.open_journal(paths[1]) as b:
        a.add(record("a", "first"))
        b.add_many([record("a", "second", 5), record("b", "third", None)])
        with pytest.raises(ValueError, match="j0 is in use"):
            journal.Journals(paths)
    with open(paths[1], "ab") as f:
        f.write(b'{"cut')
    before = [p.read_bytes() for p in paths]
    with journal.Journals(paths) as read, journal.Journals(paths[:1]):
        assert replies(read, "ab") == {"a": ["first", "second"], "b": ["third"]}
        assert (read.score("a"), read.score("b"), read.count("a")) == (1, None, 2)
        with pytest.raises(ValueError, match="j1 is in use"):
            journal.open_journal(paths[1])
    assert [p.read_bytes() for p in paths] == before
    journal.open_journal(paths[1]).close()  # nobody has it any more
    for missing, says in (
        ([], "there is no journal"),
        ([*paths, tmp_path / "x"], "there is no .*x"),
    ):
        with pytest.raises(ValueError, match=says):
            journal.Journals(missing)
