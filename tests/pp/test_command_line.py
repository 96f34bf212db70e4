"""Command lines: paths as flags, output on any terminal, --help; and that every program has them."""

import ast
import os
import subprocess
import sys

import pytest
from absl import flags

from paligemma_med.pp import command_line
from tests import environ
from tests.test_package import OURS, called, python_files


@pytest.fixture
def defined(monkeypatch):
    values = flags.FlagValues()
    monkeypatch.setattr(command_line.flags, "DEFINE", lambda *a, **kw: flags.DEFINE_flag(_flag(*a, **kw), values))
    command_line.define_path("out", "~/x", "")
    command_line.define_paths("runs", ["~/x"], "")
    return values


def _flag(parser, name, default, help, serializer):
    return flags.Flag(parser, serializer, name, default, help)


def test_paths_know_the_home_folder(defined, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    defined(["x", "--out=~/a, b", "--runs=~/a,b"])
    assert defined.out == "/home/me/a, b" and defined.runs == ["/home/me/a", "b"]
    for text, path in (("a~b", "a~b"), ("./~", "./~"), ("", ""), ("~", "/home/me")):
        defined.out = text
        assert command_line._Path().parse(text) == path


def test_a_path_with_a_comma_in_a_list(defined, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a, b").mkdir()
    for text, paths in (
        ("a, b", ["a, b"]),
        ("a, c", ["a", "c"]),
        ('"a, b",c', ["a, b", "c"]),
        ("", []),
    ):
        assert defined["runs"].parser.parse(text) == paths
    defined.unparse_flags()
    defined(["x", '--runs="a, b",c'])
    assert defined["runs"].serialize() == '--runs="a, b",c'


def test_a_terminal_without_a_character_shows_an_escape(repo_root):
    code = "from paligemma_med.pp import command_line; command_line.prepare(); print('a …', 'b \\udcff')"
    for encoding, said in (("ascii", b"a \\u2026 b \\udcff\n"), ("utf-8", "a … b \\udcff\n".encode())):
        run = subprocess.run(
            [sys.executable, "-c", code],
            cwd=repo_root,
            env=environ.of_program(PYTHONIOENCODING=encoding),
            capture_output=True,
        )
        assert run.stdout == said, run.stderr


PATHS = ("workdir", "checkpoint", "adapter", "image", "mask", "png", "npz", "human", "cache", "verdicts", "report")


def test_every_program_has_them(repo_root):
    """Its flags are parsed by ours, and those that are paths know ~, or --workdir=~/x makes a folder ~."""
    wrong = []
    for path in python_files(*OURS):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            where = f"{path.relative_to(repo_root)} line {node.lineno}"
            if called(node) == "app.run" and "parse_flags" not in ast.unparse(node):
                wrong.append(f"{where}: app.run without flags_parser=…parse_flags")
            if called(node) in ("flags.DEFINE_string", "flags.DEFINE_list"):
                name = ast.literal_eval(node.args[0])
                words = (ast.unparse(node.args[2]) if len(node.args) > 2 else "").lower()
                is_path = name in PATHS or name.startswith("out") or name.endswith("_dir")
                if is_path or words.startswith(("'folder", "'where", "'file", "'workdir")):
                    wrong.append(f"{where}: --{name} should be a command_line.define_path")
    assert not wrong


def test_help_names_the_flags_that_other_modules_define(repo_root):
    code = (
        "from absl import app; from paligemma_med import cli; cli.define_source_flags(); "
        "app.run(print, flags_parser=cli.parse_flags)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=repo_root, env=environ.of_program(), capture_output=True, text=True
    )
    assert {"--config:", "--workdir:", "--checkpoint:", "--adapter:"} <= {*run.stdout.split()}, run.stderr
    assert run.returncode == 0


PROGRAM = """
import sys
from absl import app
from paligemma_med import cli
from paligemma_med.pp import command_line

def main(argv):
    for i in range(100_000):
        print(i, file=sys.stderr if "stderr" in argv else sys.stdout)
    print("all is printed", file=open(argv[1], "w"))

app.run(cli.command(main) if "command" in sys.argv else main, flags_parser=command_line.parse_flags)
"""


@pytest.mark.parametrize(
    "argv, status, unbuffered",
    [(["--help"], 0, ""), (["command"], 141, "1"), (["command", "stderr"], 141, ""), (["bare"], 1, "")],
)
def test_a_reader_may_leave(tmp_path, repo_root, argv, status, unbuffered):
    """`… | head` ends a program without a traceback."""
    end, other = os.pipe()
    os.close(end)
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE) | {
        argv[-1] if argv[-1] == "stderr" else "stdout": other
    }
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, tmp_path / "done", *argv],
        cwd=repo_root,
        env=environ.of_program(PYTHONUNBUFFERED=unbuffered),
        text=True,
        **streams,
    )
    os.close(other)
    assert (run.returncode, run.stdout or "", run.stderr or "") == (status, "", "")
    assert not (tmp_path / "done").exists()


def test_another_pipe_may_break_aloud():
    """Such as that to a program which ours started."""
    assert not command_line.reader_is_gone(BrokenPipeError(32, "Broken pipe"))
    assert not command_line.reader_is_gone(OSError(5, "Input/output error"))
