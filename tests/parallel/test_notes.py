"""What a long start says: where it is, and only if it is long."""

import time

import pytest

from paligemma_med.parallel import notes


def test_a_short_stage_says_nothing(capsys):
    with notes.stage("reading weights"):
        pass
    assert capsys.readouterr() == ("", "")


def test_stdout_is_for_results(monkeypatch, capsys):
    monkeypatch.setattr(notes, "_PATIENCE", 0.0)
    with notes.stage("reading weights"):
        time.sleep(0.5)
    out, err = capsys.readouterr()
    assert out == "" and "Reading weights …" in err


def test_a_long_stage_says_what_it_does_while_it_does_it(monkeypatch):
    monkeypatch.setattr(notes, "_PATIENCE", 0.05)
    lines = []
    with notes.stage("reading weights", lines.append):
        deadline = time.monotonic() + 10
        while not lines and time.monotonic() < deadline:
            time.sleep(0.01)
        assert lines == ["Reading weights …"]
    assert lines[1:] == ["Done reading weights: 0 s."]


def test_parts_of_a_stage_are_counted_and_the_rest_is_estimated(monkeypatch):
    """The first part compiles programs: 40 s, the others take 20."""
    now = [0.0]
    monkeypatch.setattr(notes.time, "monotonic", lambda: now[0])
    lines = []
    with notes.stage("computing maps", lines.append) as progress:
        for seconds, done in ((40, 2), (60, 4), (61, 5), (80, 6), (3700, 7), (3720, 8)):
            now[0] = seconds
            progress(done, 8)
    assert lines[:4] == [
        "Computing maps: 2 of 8 in 0:40, about 2:00 left.",
        "Computing maps: 4 of 8 in 1:00, about 0:40 left.",
        "Computing maps: 6 of 8 in 1:20, about 0:20 left.",
        "Computing maps: 7 of 8 in 1:01:40, about 12:12 left.",
    ]


def test_parts_of_a_short_stage_say_nothing(capsys):
    with notes.stage("computing maps") as progress:
        progress(1, 2)
        progress(2, 2)
    assert capsys.readouterr() == ("", "")


def test_a_stage_that_fails_is_not_called_done(monkeypatch):
    monkeypatch.setattr(notes, "_PATIENCE", 60.0)
    lines = []
    with pytest.raises(OSError), notes.stage("reading weights", lines.append):
        raise OSError
    assert lines == []


def test_other_processes_keep_silent(monkeypatch, capsys):
    monkeypatch.setattr(notes.distributed, "is_main", lambda: False)
    notes.say("x")
    assert capsys.readouterr().out == ""
