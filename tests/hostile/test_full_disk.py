"""A full disk: one sentence with the file and "No space left", and nothing half-written."""

import errno
import os

import numpy as np
import pytest
import tensorstore

from data_prep import build
from data_prep import files as data_files
from paligemma_med import cli, files
from paligemma_med.checkpoints import CheckpointError, bv
from paligemma_med.evaluation import results
from tools.report.__main__ import write as write_report


def no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def full(monkeypatch):
    """Where a file is flushed to, there is no space. The system's own error names no file."""
    monkeypatch.setattr(os, "fsync", no_space)


@pytest.mark.parametrize("whole_file", [files.whole_file, data_files.whole_file])
def test_the_file_is_named_and_the_old_one_stays(tmp_path, full, whole_file):
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(OSError) as e, whole_file(path) as f:
        f.write(b"new")
    assert cli._told(e.value) == f"{path}: No space left on device."
    assert data_files.told(e.value, "?") == f"{path}: No space left on device"
    assert os.listdir(tmp_path) == ["x"] and path.read_text() == "old"
    with pytest.raises(FileNotFoundError) as e, whole_file(path):
        open(tmp_path / "nosuch").close()  # another file's error keeps its name
    assert e.value.filename == str(tmp_path / "nosuch")


def test_a_folder_is_named_and_does_not_appear(tmp_path, full):
    with pytest.raises(OSError) as e, files.whole_folder(tmp_path / "x") as new:
        with open(os.path.join(new, "a"), "w") as f:
            f.write("a")
    assert e.value.filename == str(tmp_path / "x") and not os.listdir(tmp_path)


def test_a_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_report("Old", [], tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("report.md", "report.html")}
    calls, fsync = [], os.fsync

    def second(handle):
        calls.append(handle)
        (no_space if len(calls) == 1 else fsync)(handle)

    monkeypatch.setattr(os, "fsync", second)
    with pytest.raises(OSError) as e:
        write_report("New", [], tmp_path)
    assert os.path.basename(e.value.filename) in before
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_an_evaluation_names_its_file(tmp_path, monkeypatch):
    part = results.Part(tmp_path, {"a": 1})
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError) as e:
        part.add("model", 0, [])
    assert (e.value.errno, e.value.filename) == (errno.ENOSPC, str(tmp_path / results.PART))
    part.close()


def test_tensorstores_error_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kw):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write 8 bytes: No space left on device [tensorstore_spec='{…}']"
        )

    monkeypatch.setattr(tensorstore, "open", refuse)
    with pytest.raises(CheckpointError, match="can't be written .* No space left on device.; is the disk full") as e:
        bv.save_bv(tmp_path / "checkpoint.bv", 1, {"params": {"a": np.ones(2)}, "opt": {}, "chrono": {}})
    assert "\n" not in str(e.value) and "spec" not in str(e.value) and not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("No space left on x")]
)
def test_a_build_ends_in_a_sentence(tmp_path, monkeypatch, error):
    def failing(*args, **kw):
        raise error

    monkeypatch.setattr(build, "build", failing)
    found = dict.fromkeys(("manual_dir", "config", "overwrite", "num_images", "seed", "beam", "beam_options", "report"))
    monkeypatch.setattr(build.flags, "FLAGS", type("Flags", (dict,), {**found, "data_dir": "D", "file_format": "f"})())
    monkeypatch.setattr(build, "_options", dict)
    with pytest.raises(SystemExit, match="^error: .*No space left on"):
        build.main(["build", "phantom"])
