"""How a process ends: which errors mean that another process is gone."""

import jax

from paligemma_med.parallel import ending


def test_only_a_lost_peer_is_called_one(monkeypatch, capsys):
    lost = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    other = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")
    assert not ending.tell_if_peer_lost(lost)  # there is no peer
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(ending, "_told", False)
    assert not ending.tell_if_peer_lost(other)
    assert not ending.tell_if_peer_lost(ValueError("Connection closed by peer"))
    assert not capsys.readouterr().err
    try:
        try:
            raise lost
        except Exception as e:
            raise ValueError("a checkpoint could not be written") from e
    except ValueError as e:
        assert ending.tell_if_peer_lost(e) and ending.tell_if_peer_lost(e)
    err = capsys.readouterr().err
    assert err.count("another process of this run has ended") == 1
    assert "training resumes from its newest checkpoint" in err
