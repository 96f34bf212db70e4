"""All programs under one name, in any folder."""

import importlib.util
import subprocess
import sys

import pytest

from paligemma_med import __main__
from paligemma_med.pp import command_line
from tests import environ


def test_every_program_exists():
    for name, (module, _) in __main__.PROGRAMS.items():
        found = importlib.util.find_spec(module)
        assert found, name
        if found.submodule_search_locations:
            assert importlib.util.find_spec(f"{module}.__main__"), name


@pytest.mark.parametrize(
    "argv, status, said",
    [
        (["fit_scaling_law", "--help"], 0, "--d_scale"),
        (["tools.nosuch"], 1, "error: there is no program 'tools.nosuch'; expected one of train, "),
        ([], 0, "usage: paligemma_med PROGRAM"),
    ],
)
def test_a_folder_may_have_tools_and_configs_of_its_own(tmp_path, repo_root, argv, status, said):
    for name in ("tools", "configs", "data_prep"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong one')")
    run = subprocess.run(
        [sys.executable, "-m", "paligemma_med", *argv],
        cwd=tmp_path,
        env=environ.of_program(PYTHONPATH=str(repo_root)),
        capture_output=True,
        text=True,
    )
    assert (run.returncode, said in run.stdout + run.stderr) == (status, True), run


def test_shipped_configs_are_found_in_any_folder(tmp_path, repo_root, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    shipped = str(repo_root / "configs" / "quickstart.py")
    for argv, found in (
        (["--config=configs/quickstart.py:a=~/x"], [f"--config={shipped}:a=~/x"]),
        (["--config", "configs/quickstart.py"], ["--config", shipped]),
        (["--config=~/x.py:a"], [f"--config={tmp_path}/x.py:a"]),
        (["--config=configs/nosuch.py", "--config.lr=~"], ["--config=configs/nosuch.py", "--config.lr=~"]),
    ):
        assert command_line.located(argv) == found
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "quickstart.py").touch()
    assert command_line.located(["--config=configs/quickstart.py"]) == ["--config=configs/quickstart.py"]


@pytest.fixture(scope="module")
def packaged(repo_root):
    """Paths in a wheel, as setup.py's build names them; nothing is built."""
    code = (
        "import setuptools, runpy, sys; sys.argv = ['setup.py', '--quiet', '--name']\n"
        "made = setuptools.setup\n"
        "def setup(**settings):\n"
        "    build = made(**settings).get_command_obj('build_py'); build.ensure_finalized()\n"
        "    import os; print(*(os.path.relpath(p, build.build_lib) for p in build.get_outputs(0)), sep='\\n')\n"
        "setuptools.setup = setup; runpy.run_path('setup.py')"
    )
    pytest.importorskip("setuptools")
    run = subprocess.run([sys.executable, "-c", code], cwd=repo_root, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split("\n")[1:]) - {""}  # before them stands the name


def test_a_wheel_has_nothing_but_the_package_at_its_top(packaged, repo_root):
    assert {path.split("/")[0] for path in packaged} == {"paligemma_med"}
    below = {path.removeprefix("paligemma_med/_programs/") for path in packaged if "/_programs/" in path}
    assert {"configs/quickstart.py", "tools/report/__main__.py", "data_prep/build.py"} <= below
    assert not [path for path in below if path.startswith("tools/bench")]
    assert "paligemma_med/py.typed" in packaged
    in_checkout = {p.relative_to(repo_root).as_posix() for p in (repo_root / "configs").rglob("*.py")}
    assert in_checkout <= below
