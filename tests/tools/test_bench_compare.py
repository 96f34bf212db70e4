"""tools.bench --base: two commits on the same work, and what is left behind: nothing."""

import os
import signal
import subprocess
import sys

import pytest

from tools.bench import compare, machine, turns

# A side without JAX, in place of those of a true tree; {loss} tells trees apart.
SIDE = """
from tools.bench import workers

class Side:
    about = dict(trained=5, parameters=7, flops_a_step=100)
    def step(self):
        return {loss}
    value = staticmethod(float)
    def result(self):
        return [{loss}]
    def peak(self):
        return 10**9

workers.serve(lambda: dict(platform="gpu", device="a chip"), lambda settings: Side())
"""
NAMES = {"train_step": "peers_ours", "decode": "decode_ours", "input": "input_ours"}


def git(folder, *args):
    names = [y for x in ("user.name=a", "user.email=a@b", "commit.gpgsign=false") for y in ("-c", x)]
    return subprocess.run(["git", "-C", str(folder), *names, *args], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path, repo_root, monkeypatch):
    """A repository with the tags old, which has a training step alone, and equal and other, which have all works."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr(compare.tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    root = tmp_path / "repo"
    bench = root / "tools" / "bench"
    bench.mkdir(parents=True)
    (root / "tools" / "__init__.py").touch()
    (bench / "__init__.py").touch()
    (bench / "workers.py").write_bytes((repo_root / "tools" / "bench" / "workers.py").read_bytes())
    git(root, "init", "-q", "-b", "main")
    for tag, loss, works in (("old", 1.0, 1), ("other", 1.5, 3), ("equal", 1.0, 3)):
        for module in list(NAMES.values())[:works]:
            (bench / f"{module}.py").write_text(SIDE.format(loss=loss), "utf-8")
        git(root, "add", ".")
        git(root, "commit", "-q", "-m", tag)
        git(root, "tag", tag)
    monkeypatch.setattr(compare, "_ROOT", str(root))
    monkeypatch.setattr(machine, "LIMIT", 1e9)  # other tests may run beside these
    monkeypatch.setattr(turns, "draw", lambda *args: None)
    monkeypatch.setattr(turns, "bind", lambda cores: None)
    monkeypatch.setattr(compare.input_sets, "write_table", lambda *args: dict(name="table:x"))
    return root


def run(**kw):
    given = dict(head=None, works=None, size="tiny", dtype=None, batch_size=None, cores=None, rounds=2, steps=1)
    return compare.run(**{**given, **dict(samples=2, tokens=3), **kw})


def left(root):
    """Worktrees besides the repository itself, and what is in the folder for temporary files."""
    trees = git(root, "worktree", "list", "--porcelain").count("worktree ") - 1
    return trees, os.listdir(root.parent / "temporary")


def test_each_side_runs_the_code_of_its_own_tree(repo):
    found = run(base="other", works=["train_step", "decode"])
    step = found["works"]["train_step"]
    assert step["losses"] == {"head": [1.0] * 3, "base": [1.5] * 3}
    assert not step["results_equal"] and step["largest_difference"] == 0.5
    assert step["ratio"] > 0 and set(step["median_cpu_seconds"]) == {"head", "base"}
    assert found["base"].startswith("other (") and "differ by 0.5 of a loss" in found["row"]
    assert found["works"]["decode"]["results_equal"] is False
    assert left(repo) == (0, [])
    # Both by name: the folder as it is plays no part.
    (repo / "tools" / "bench" / "peers_ours.py").write_text("broken", "utf-8")
    found = run(base="old", head="equal", works=["train_step"])
    assert found["works"]["train_step"]["results_equal"] and "| equal |" in found["row"]


def test_changes_of_the_folder_are_the_head(repo):
    side = SIDE.format(loss=4.0)
    (repo / "tools" / "bench" / "peers_ours.py").write_text(side, "utf-8")
    found = run(base="equal", works=["train_step"])
    assert found["works"]["train_step"]["losses"]["head"] == [4.0] * 3
    assert found["head"].endswith(" with changes")


def test_a_tree_without_the_work_is_told_and_the_others_go_on(repo):
    found = run(base="old")
    assert found["works"]["decode"] == {
        "error": "the tree of base lacks this work: it has no tools/bench/decode_ours.py."
    }
    assert found["works"]["train_step"]["results_equal"]
    # The input's side is put into the older tree, and there alone.
    assert found["works"]["input"]["results_equal"]
    assert "| decode |" in found["row"] and "not compared: the tree of base lacks" in found["row"]
    with pytest.raises(ValueError, match="nothing could be compared: decode: the tree of base lacks"):
        run(base="old", works=["decode"])
    assert left(repo) == (0, [])


def test_a_side_that_fails_is_told(repo):
    (repo / "tools" / "bench" / "peers_ours.py").write_text("import no_such_module", "utf-8")
    with pytest.raises(ValueError, match="train_step: the tree of head can't do this work: head ended early"):
        run(base="equal", works=["train_step"])
    assert left(repo) == (0, [])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(base="no-such"), "'no-such' is no commit of .*; expected one that git knows"),
        (dict(base="-f"), "found '-f'; expected a commit"),
        (dict(base=None), "give --base"),
        (dict(base="old", works=["walk"]), r"--works has \['walk'\]; expected some of \['train_step'"),
    ],
)
def test_wrong_arguments_are_told(repo, wrong, message):
    with pytest.raises(ValueError, match=message):
        run(**wrong)
    assert left(repo) == (0, [])


def test_no_checkout_is_told(repo, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_ROOT", str(tmp_path / "temporary"))
    with pytest.raises(ValueError, match="'HEAD' is no commit of .*not a git repository"):
        run(base="HEAD")


RUNNER = """
import time
from tools.bench import compare
with compare.worktree({root!r}, "old") as (tree, commit):
    print(tree, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_nothing_is_left_after_a_signal(repo, repo_root, number):
    command = [sys.executable, "-c", RUNNER.format(root=str(repo))]
    with subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        tree = process.stdout.readline().strip()
        assert os.path.isfile(os.path.join(tree, "tools", "bench", "peers_ours.py")) and left(repo)[0] == 1
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
    assert left(repo) == (0, [])
