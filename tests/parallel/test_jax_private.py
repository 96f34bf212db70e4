"""Private names of JAX: what they give with the installed JAX, and that the programs live without."""

import subprocess
import sys
import types

import pytest
from jax._src import compilation_cache

from paligemma_med.parallel import jax_private

# Names of `jax._src` that a later JAX may not have.
HIDDEN = ("distributed", "cloud_tpu_init", "compilation_cache")


@pytest.fixture
def moved(monkeypatch):
    """JAX, without the private modules that we use."""
    for name in HIDDEN:
        monkeypatch.setitem(sys.modules, f"jax._src.{name}", None)
    # `from jax._src import x` asks the package first, and only then the list of modules.
    monkeypatch.setitem(sys.modules, "jax._src", types.ModuleType("jax._src"))


def test_with_this_jax(monkeypatch):
    """The private names exist, so that what follows isn't told by the fallbacks."""
    from jax._src import cloud_tpu_init, distributed

    monkeypatch.setattr(distributed.global_state, "process_id", 3)
    assert jax_private.process_index() == 3
    for found in (True, False):
        monkeypatch.setattr(cloud_tpu_init, "running_in_cloud_tpu_vm", found)
        assert jax_private.is_cloud_tpu() is found
    whole = compilation_cache.compress_executable(b"program" * 100)
    assert jax_private.is_whole_cache_entry(whole)
    assert not jax_private.is_whole_cache_entry(whole[:-9])


def test_names_that_moved(moved, monkeypatch):
    assert jax_private.process_index() is None
    monkeypatch.delenv("TPU_ML_PLATFORM", raising=False)
    assert jax_private.is_cloud_tpu() is False
    monkeypatch.setenv("TPU_ML_PLATFORM", "JAX")
    assert jax_private.is_cloud_tpu() is True
    assert jax_private.is_whole_cache_entry(b"cut off")


def test_attributes_that_moved(monkeypatch):
    for name in HIDDEN[:2]:
        monkeypatch.setitem(sys.modules, f"jax._src.{name}", types.ModuleType(name))
        monkeypatch.setattr(f"jax._src.{name}", types.ModuleType(name))
    monkeypatch.delenv("TPU_ML_PLATFORM", raising=False)
    assert jax_private.process_index() is None
    assert jax_private.is_cloud_tpu() is False


def test_programs_start_without_the_private_names(repo_root):
    """In a process of its own, as a JAX of later would have it: after JAX's own import."""
    hide = "".join(f"sys.modules['jax._src.{n}'] = None; delattr(jax._src, '{n}');" for n in HIDDEN)
    code = (
        f"import sys, jax, jax._src, jax.experimental.multihost_utils;"
        f"import jax.experimental.compilation_cache.compilation_cache; {hide}"
        "from paligemma_med.parallel import compilation_cache, distributed, ending;"
        "distributed.start(); compilation_cache.start(False, 'unused'); print(ending.is_alone())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["True"]
