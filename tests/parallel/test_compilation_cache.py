"""The compilation cache: where it is, that it is used, and what a file cut off does to it."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from paligemma_med.parallel import compilation_cache


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    """JAX's settings as a user has them, and afterwards those of the test run again."""
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)
    jax_cache.set_cache_dir(before)
    jax_cache.reset_cache()


def compiled_anew():
    """(result of a function that no other test compiles, JAX's events of compiling it)."""
    events = []

    def listen(event, **_):
        events.append(event.rpartition("/")[2])

    def watched(x):
        return jnp.sin(x @ x.T) * 1.2345 + x.sum()

    jax.monitoring.register_event_listener(listen)
    try:
        x = np.linspace(0, 1, 35, dtype=np.float32).reshape(5, 7)
        return np.asarray(jax.jit(watched)(x)), events
    finally:
        jax.monitoring.unregister_event_listener(listen)


def entries(folder):
    return sorted(p for p in os.listdir(folder) if p.startswith("jit_watched"))


def test_second_start_compiles_nothing_and_gives_the_same_bits(tmp_path):
    folder = compilation_cache.start(True, str(tmp_path))
    assert folder == str(tmp_path / "compilation_cache")
    first, events = compiled_anew()
    assert "cache_misses" in events and len(entries(folder)) == 1
    compilation_cache.start(True, str(tmp_path))
    second, events = compiled_anew()
    assert "cache_hits" in events and "cache_misses" not in events
    compilation_cache.start(False, str(tmp_path))
    without, events = compiled_anew()
    assert "cache_hits" not in events
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(first, without)


@pytest.mark.parametrize("left", [0, 100, "zeros"])
def test_entry_that_a_kill_cut_off_is_made_again(tmp_path, left, recwarn):
    folder = compilation_cache.start(True, str(tmp_path))
    expected, _ = compiled_anew()
    path = os.path.join(folder, entries(folder)[0])
    whole = os.path.getsize(path)
    with open(path, "r+b") as f:
        f.truncate(left if left != "zeros" else 0)
        f.truncate(left if left != "zeros" else whole)  # as file systems show lost blocks
    compilation_cache.start(True, str(tmp_path))
    found, events = compiled_anew()
    assert "cache_misses" in events and os.path.getsize(path) > whole // 2
    np.testing.assert_array_equal(found, expected)
    assert not [w for w in recwarn if "compilation cache" in str(w.message)]
    compilation_cache.start(True, str(tmp_path))
    assert "cache_hits" in compiled_anew()[1]


def test_other_files_and_whole_entries_stay(tmp_path):
    folder = compilation_cache.start(str(tmp_path / "elsewhere"), "unused")
    assert folder == str(tmp_path / "elsewhere")
    compiled_anew()
    (tmp_path / "elsewhere" / "notes.txt").write_text("mine")
    before = sorted(os.listdir(folder))
    compilation_cache.start(folder, "unused")
    assert sorted(os.listdir(folder)) == before and "notes.txt" in before


def test_the_environment_wins(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/of/the/user")
    assert compilation_cache.start(True, str(tmp_path)) == "/of/the/user"
    assert compilation_cache.start(False, str(tmp_path)) == "/of/the/user"
    assert jax.config.jax_compilation_cache_dir == before  # JAX reads it itself, when imported
    assert not os.listdir(tmp_path)


def test_other_processes_remove_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "compilation_cache"
    folder.mkdir()
    (folder / "jit_x-1-cache").write_bytes(b"being written by process 0")
    monkeypatch.setattr(compilation_cache.distributed, "is_main", lambda: False)
    compilation_cache.start(True, str(tmp_path))
    assert os.listdir(folder) == ["jit_x-1-cache"]


@pytest.mark.parametrize("setting", ["", 1, None, ["a"]])
def test_bad_setting(setting, tmp_path):
    with pytest.raises(ValueError, match="config.compilation_cache is .*; expected True, False or"):
        compilation_cache.start(setting, str(tmp_path))
