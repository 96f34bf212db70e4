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
