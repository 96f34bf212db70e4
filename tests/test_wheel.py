"""The wheel, built and installed into an environment of its own, and used in another folder."""

import importlib.metadata
import os
import shutil
import subprocess
import sys
import venv

import pytest

from tests import environ


def call(*command, cwd, **kw):
    env = environ.of_program() | dict(PIP_DISABLE_PIP_VERSION_CHECK="1")
    env.pop("PYTHONPATH", None)
    return subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=1500, **kw)


def _setuptools():
    try:
        return int(importlib.metadata.version("setuptools").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def installed(repo_root, tmp_path_factory):
    """(environment's bin folder, folder elsewhere). What the package needs is that of this environment."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a build leaves build/ and *.egg-info where it is made
    left = ("*.egg-info", "__pycache__", ".*", "build", "dist", "site", "tests", "docs")
    shutil.copytree(repo_root, source, ignore=shutil.ignore_patterns(*left))
    # Where setuptools is here, and new enough, pip needn't ask a package index for it.
    alone = ["--no-build-isolation"] if _setuptools() >= 77 else []
    words = ["wheel", "--quiet", "--no-deps", *alone, "-w", folder, source]
    build = call(sys.executable, "-m", "pip", *words, cwd=folder)
    assert build.returncode == 0, build.stderr
    [wheel] = folder.glob("*.whl")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    done = call(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    site = call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).stdout.strip()
    ours = [path for path in sys.path if path.endswith("site-packages")]
    with open(os.path.join(site, "dependencies.pth"), "w") as f:
        f.write("\n".join(ours) + "\n")
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    return python.parent, elsewhere


@pytest.mark.slow
def test_the_programs_of_a_wheel(installed):
    binaries, folder = installed
    shown = call(binaries / "paligemma_med", "--help", cwd=folder)
    assert shown.returncode == 0 and "usage: paligemma_med PROGRAM" in shown.stdout
    assert str(binaries.parent) in shown.stdout.splitlines()[-1]  # its configs
    for program in ("train", "evaluate", "ask", "report", "build", "convert", "synthesize"):
        shown = call(binaries / "paligemma_med", program, "--help", cwd=folder)
        assert shown.returncode == 0 and f"paligemma_med {program}" in shown.stdout, program
    bench = call(binaries / "paligemma-med", "bench", cwd=folder)
    assert bench.returncode == 1 and "isn't part of what is installed" in bench.stderr


@pytest.mark.slow
def test_a_config_and_a_model_of_a_wheel_in_another_folder(installed):
    binaries, folder = installed
    program = binaries / "paligemma_med"
    built = call(program, "build", "phantom", "--data_dir=data", "--num_images=9,3,3", cwd=folder)
    assert built.returncode == 0, built.stderr
    dry = call(program, "train", "--config=configs/quickstart.py:data_dir=data", "--dry_run", cwd=folder)
    assert dry.returncode == 0 and "img/head/kernel" in dry.stdout + dry.stderr, dry.stderr
    assert {path.name for path in folder.iterdir()} == {"data"}
