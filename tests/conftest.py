"""Settings of every test run: CPU, eight virtual devices, few threads, no network.

They are made before jax is first imported, and through the environment, so that the programs that
tests start in subprocesses run under them too.
"""

import importlib.metadata
import os
import pathlib
import sys

import hypothesis
import pytest

# Two threads are enough for what tests compute, and more only fight each other on small machines.
_THREADS = str(min(2, os.cpu_count() or 1))
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, _THREADS)

os.environ["JAX_PLATFORMS"] = "cpu"
# Eight devices, so that sharded code meets a real mesh. Measured: 20 MB more, compiling 5 % slower.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

# PALIGEMMA_MED_TESTS_OPTIMISED=1 compiles all programs as users' are: once before a release.
_OPTIMISED = os.environ.get("PALIGEMMA_MED_TESTS_OPTIMISED", "") not in ("", "0")

# Most of compiling at this size is XLA's newer emitter of fused loops (measured, one program of
# decoding: 2.1 s with it, 0.8 s without). Later versions have no other, and no such flag.
if importlib.metadata.version("jaxlib").startswith("0.10.") and not _OPTIMISED:
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

# Compiling is most of what these tests spend. A second run, or a program that tests start twice,
# finds it done (measured: 5.9 s -> 1.1 s). `make clean` empties it.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(__file__).resolve().parent.parent / ".pytest_cache" / "jax"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# Programs are small and run once or twice: compiling is nearly all that tests take, and what XLA
# makes of a program is seldom what they test (measured: a third less). Those that look at compiled
# programs ask for a fixture, `optimised` or `optimised_file`.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "0" if _OPTIMISED else "1")

# What a hub has is not what these tests test.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# How long an example takes depends on the machine and on what else it does.
hypothesis.settings.register_profile("paligemma_med", deadline=None)
hypothesis.settings.load_profile("paligemma_med")


@pytest.fixture(scope="session")
def repo_root() -> pathlib.Path:
    """The repository this test suite lies in."""
    return pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder with the real data sets; the test is skipped where there is none."""
    folder = os.environ.get("PALIGEMMA_MED_REAL_DATA", "")
    if not folder:
        pytest.skip("PALIGEMMA_MED_REAL_DATA is not set")
    if not os.path.isdir(folder):
        pytest.fail(f"PALIGEMMA_MED_REAL_DATA={folder} is not a folder")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> pathlib.Path:
    """A TFDS folder with a phantom data set of a few dozen questions."""
    from tests import tiny

    folder = tmp_path_factory.mktemp("tfds")
    tiny.build_data(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Lets go of what a file's tests compiled. Each program takes dozens of memory maps, of which
    Linux gives a process 65,530; beyond them compiling aborts."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


def _optimised():
    import jax

    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


# Compile as users' programs are compiled: for one test, and for all of a file.
optimised = pytest.fixture(_optimised, name="optimised")
optimised_file = pytest.fixture(_optimised, scope="module", name="optimised_file")
