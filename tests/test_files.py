"""Files and folders that appear whole or not at all."""

import contextlib
import errno
import fcntl
import os
import socket
import subprocess
import sys

import pytest

from paligemma_med import files


def test_file_appears_whole_or_not_at_all(tmp_path):
    with files.whole_file(tmp_path / "a" / "x") as f:
        f.write(b"old")
        assert os.listdir(tmp_path / "a") != ["x"]
    with pytest.raises(KeyboardInterrupt), files.whole_file(tmp_path / "a" / "x") as f:
        f.write(b"new")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path / "a") == ["x"]
    assert (tmp_path / "a" / "x").read_bytes() == b"old"


def test_files_of_one_with_take_their_places_from_the_last_to_the_first(tmp_path, monkeypatch):
    replace, order = os.replace, []

    def watched(a, b):
        order.append(os.path.basename(b))
        if len(order) == 2:
            raise OSError("disk full")
        replace(a, b)

    monkeypatch.setattr(os, "replace", watched)
    with pytest.raises(OSError, match="disk full"), contextlib.ExitStack() as stack:
        for name in ("rows", "drops", "x"):
            stack.enter_context(files.whole_file(tmp_path / name))
        assert not {"rows", "drops", "x"} & {*os.listdir(tmp_path)}
    assert order == ["x", "drops"] and os.listdir(tmp_path) == ["x"]


def test_text_is_utf8_whole_and_its_errors_are_the_callers_choice(tmp_path):
    files.write_text(tmp_path / "new" / "x", "é\n")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "new" / "x", "half a pair: \ud800")
    assert (tmp_path / "new" / "x").read_bytes() == "é\n".encode()
    files.write_text(tmp_path / "new" / "x", "\ud800", errors="replace")
    assert (tmp_path / "new" / "x").read_bytes() == b"?" and os.listdir(tmp_path / "new") == ["x"]


def fill(path, text, **kw):
    with files.whole_folder(path, **kw) as new:
        os.mkdir(os.path.join(new, "sub"))
        for name in ("mark", "sub/x"):
            with open(os.path.join(new, name), "w") as f:
                f.write(text)


def test_folder_appears_whole_or_not_at_all(tmp_path):
    fill(tmp_path / "a" / "w", "1")
    assert (tmp_path / "a/w/sub/x").read_text() == "1"
    assert os.listdir(tmp_path / "a") == ["w"]
    with pytest.raises(ZeroDivisionError), files.whole_folder(tmp_path / "v") as new:
        open(os.path.join(new, "x"), "w").close()
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == ["a"]


def test_folder_replaces_its_own_kind_alone(tmp_path, monkeypatch):
    fill(tmp_path / "w", "1")
    with pytest.raises(FileExistsError, match="w exists"):
        fill(tmp_path / "w", "2")
    with pytest.raises(FileExistsError, match="holds no other or another"):
        fill(tmp_path / "w", "2", replaces=("other", "another"))
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="file exists"):
        fill(tmp_path / "file", "2", replaces=("mark",))
    assert (tmp_path / "w/sub/x").read_text() == "1"
    fill(tmp_path / "w", "3", replaces=("mark",))
    assert (tmp_path / "w/sub/x").read_text() == "3"

    # The second of the two moves fails: the old folder is put back.
    rename, calls = os.rename, []

    def failing(a, b):
        calls.append(b)
        if len(calls) == 2:
            raise OSError("disk full")
        rename(a, b)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk full"):
        fill(tmp_path / "w", "4", replaces=("mark",))
    assert (tmp_path / "w/sub/x").read_text() == "3"
    assert sorted(os.listdir(tmp_path)) == ["file", "w"]


HOLD = """
import sys, time
from paligemma_med import files
with files.sole_use(sys.argv[1], "x"):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_folder_has_one_user_and_a_killed_one_leaves_it_free(tmp_path, repo_root):
    user = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], cwd=repo_root, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert user.stdout.readline() == "held\n"
        said = (
            rf"{tmp_path} is in use by process {user.pid} on {socket.gethostname()} since .*: .*, or give another one\."
        )
        with pytest.raises(OSError, match=said) as e, files.sole_use(tmp_path, "give another one"):
            pass
        assert "\n" not in str(e.value)
    finally:
        user.kill()
        user.communicate()
    assert os.path.exists(tmp_path / ".lock")
    for _ in range(2):
        with files.sole_use(tmp_path, "x"):
            assert f"process {os.getpid()} on" in (tmp_path / ".lock").read_text()
        assert not os.listdir(tmp_path)
    with pytest.raises(ZeroDivisionError), files.sole_use(tmp_path, "x"):
        raise ZeroDivisionError
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name, refused", [("process PID on HOST", True), ("process 999999999 on HOST", False), ("", False)]
)
def test_without_locks_what_can_be_seen_is_told(tmp_path, monkeypatch, caplog, name, refused):
    """Some network file systems have none; then a process of this host is still noticed."""

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    name = name.replace("PID", str(os.getppid())).replace("HOST", socket.gethostname())
    (tmp_path / ".lock").write_text(f"{name} since 2026-01-01 00:00")
    with pytest.raises(OSError, match="is in use by") if refused else contextlib.nullcontext():
        with files.sole_use(tmp_path, "x"):
            assert "a second run there would not be noticed" in caplog.text


def test_a_user_on_another_host_that_left_its_lock_is_named(tmp_path, caplog):
    (tmp_path / ".lock").write_text("process 7 on another.host since 2026-01-01 00:00")
    with files.sole_use(tmp_path, "x"):
        pass
    assert "process 7 on another.host since 2026-01-01 00:00 didn't end by itself" in caplog.text


WRITE = """
import os, sys, time
from paligemma_med import files
what = files.whole_folder if sys.argv[2] == "folder" else files.whole_file
with what(sys.argv[1]) as new:
    if sys.argv[2] == "folder":
        open(os.path.join(new, "a"), "w").close()
    print("writing", flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_a_killed_writer_left_is_swept_and_what_is_written_now_is_not(tmp_path, repo_root, kind):
    path, others = tmp_path / "w", [".w.0123.tmp", ".x.01234567.tmp", "w"]
    for name in others:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", WRITE, tmp_path / "w2", kind]
    user = subprocess.Popen(command, cwd=repo_root, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert user.stdout.readline() == "writing\n"
        (left,) = {*os.listdir(tmp_path)} - {*others}
        files.sweep(tmp_path / "w2")  # it is young
        os.utime(tmp_path / left, (0, 0))
        files.sweep(tmp_path / "w2")  # and locked
        assert left in os.listdir(tmp_path)
    finally:
        user.kill()
        user.communicate()
    for name in others:
        os.utime(tmp_path / name, (0, 0))
    files.sweep(path)
    assert left in os.listdir(tmp_path)  # of another file
    with files.whole_folder(tmp_path / "w2"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([*others, "w2"])
