"""The build command: records as given, whole or not at all, without network or TensorFlow."""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

from data_prep import build as build_lib
from data_prep.build import build
from data_prep.files import DataError
from paligemma_med.pp.files import default_data_dir

KNOWN = ", ".join(sorted(build_lib.BUILDERS))


def _read(data_dir, name, split):
    builder = tfds.builder(name, data_dir=data_dir)
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return {x["question_id"].decode(): x for x in source}


def _command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "data_prep.build", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=120,
    )


def test_records_are_what_the_folder_holds(slake, tmp_path, capsys):
    slake.write()
    made = build("slake", manual_dir=slake.root, data_dir=tmp_path / "d")
    assert list(made) == ["slake/en", "slake/zh", "slake/all"]
    wanted = {str(r["qid"]): r for r in slake.rows["test"] if r["q_lang"] == "en"}
    found = _read(tmp_path / "d", "slake/en", "test")
    assert found.keys() == wanted.keys()
    for qid, example in found.items():
        row = wanted[qid]
        assert example["image"] == slake.image(row["img_id"]).read_bytes()
        assert example["image_id"].decode() == f"xmlab{row['img_id']}"
        for key in "question answer answer_type content_type base_type q_lang location".split():
            assert example[key].decode() == row[key]
        assert [b.decode() for b in example["boxes"]["label"]] == ["Liver", "Lung"]
        np.testing.assert_array_equal(np.stack(example["boxes"]["bbox"]), np.float32([[1, 2, 3.5, 4], [5, 6, 7, 8]]))
    (no_boxes, _) = _read(tmp_path / "d", "slake/en", "validate").values()
    assert len(no_boxes["boxes"]["label"]) == len(no_boxes["boxes"]["bbox"]) == 0
    chinese = _read(tmp_path / "d", "slake/zh", "train")
    assert {x["answer"].decode() for x in chinese.values()} == {"CT", "包含"}

    report = json.loads((made["slake/en"] / "build_report.json").read_text())
    assert report["splits"]["train"]["rows_kept"] == 4
    assert report["folder"] == str(slake.root)
    out = capsys.readouterr().out
    assert "train: 4 rows read, 4 kept" in out and "WARNING: 4 of 4 test images" in out


def test_same_input_same_order(slake, tmp_path):
    slake.write()
    orders = []
    for name in ("a", "b"):
        build("slake", manual_dir=slake.root, data_dir=tmp_path / name, config="en")
        orders.append(list(_read(tmp_path / name, "slake/en", "train")))
    assert orders[0] == orders[1]


def test_second_build_says_so_and_overwrite_builds_again(slake, tmp_path, capsys):
    slake.write()
    build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="en")
    slake.rows["test"] = slake.rows["test"][:2]
    slake.write_rows()
    build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="en")
    assert "already built" in capsys.readouterr().out
    assert len(_read(tmp_path / "d", "slake/en", "test")) == 4
    build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="en", overwrite=True)
    assert len(_read(tmp_path / "d", "slake/en", "test")) == 2


def _left(data_dir):
    """All files but the locks."""
    return sorted(p for p in data_dir.rglob("*") if p.is_file() and p.suffix != ".lock")


@pytest.mark.parametrize("overwrite", [False, True])
def test_failed_build_leaves_everything_as_it_was(slake, tmp_path, overwrite):
    slake.write()
    data_dir = tmp_path / "d"
    data_dir.mkdir()
    if overwrite:
        build("slake", manual_dir=slake.root, data_dir=data_dir, config="en")
    before = {p: p.read_bytes() for p in _left(data_dir)}
    assert bool(before) == overwrite
    slake.image(3).write_bytes(b"broken")
    with pytest.raises(DataError, match="not a readable image"):
        build("slake", manual_dir=slake.root, data_dir=data_dir, config="en", overwrite=overwrite)
    assert {p: p.read_bytes() for p in _left(data_dir)} == before


def test_killed_build_leaves_no_data_set_and_the_next_one_clears_up(slake, tmp_path):
    slake.write()
    data_dir = tmp_path / "d"
    program = (
        "import data_prep.datasets.slake.slake_dataset_builder as m, time, data_prep.datasets.slake.layout as l\n"
        "from data_prep.build import build\n"
        "old = l.examples\n"
        "def slow(folder, split):\n"
        "    for example in old(folder, split):\n"
        "        yield example\n"
        "        import sys; sys.stderr.write('writing\\n'); sys.stderr.flush()\n"
        "        time.sleep(60)\n"
        "l.examples = slow\n"
        f"build('slake', manual_dir={str(slake.root)!r}, data_dir={str(data_dir)!r}, config='en')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while b"writing" not in child.stderr.readline():
        assert time.monotonic() < deadline and child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stderr.close()
    assert any((data_dir / ".building").rglob("incomplete.*"))  # killed while writing
    assert not (data_dir / "slake").exists()
    build("slake", manual_dir=slake.root, data_dir=data_dir, config="en")
    assert len(_read(data_dir, "slake/en", "test")) == 4
    assert not [p for p in _left(data_dir) if ".building" in p.parts]


def test_no_network(slake, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"network used: {args}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    slake.write()
    build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="en")
    assert len(_read(tmp_path / "d", "slake/en", "test")) == 4


def test_no_tensorflow_no_torch():
    program = (
        "import sys, data_prep.build, data_prep.datasets.slake.slake_dataset_builder\n"
        "data_prep.build._options()  # imports all builders\n"
        "print([m for m in ('tensorflow', 'torch', 'jax', 'paligemma_med.models') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(name="slaek"), f"unknown data set 'slaek'; known ones: {KNOWN}"),
        (dict(name="slake"), "--manual_dir is needed"),
        (dict(name="slake", manual_dir="/nowhere"), "/nowhere: no such folder"),
        (dict(name="phantom", config="en"), "unknown config 'en'; known ones: none"),
        (dict(name="slake", manual_dir="/x", seed=1), "for drawn data sets"),
        (dict(name="phantom", manual_dir="/x", seed=1), "not with a manual_dir"),
        (dict(name="slake", options={"x": 1}), "slake: unknown option x; its options: allow_missing_images"),
    ],
)
def test_arguments_refused(kwargs, message, tmp_path):
    with pytest.raises(DataError, match=message):
        build(**kwargs, data_dir=tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_config(slake, tmp_path):
    slake.write()
    with pytest.raises(DataError, match="unknown config 'fr'; known ones: en, zh, all"):
        build("slake", manual_dir=slake.root, data_dir=tmp_path / "d", config="fr")


def test_default_data_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    assert default_data_dir() == tmp_path
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert default_data_dir().parts[-1] == "tensorflow_datasets"


def test_data_dir_that_cannot_be_written(slake, tmp_path):
    slake.write()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="file: can't write there"):
        build("slake", manual_dir=slake.root, data_dir=tmp_path / "file")


def test_command_line(slake, tmp_path):
    slake.write()
    args = ("slake", "--manual_dir", slake.root, "--config=en")
    run = _command(*args, TFDS_DATA_DIR=str(tmp_path / "d"))
    assert run.returncode == 0, run.stderr
    assert "test: 4 rows read" in run.stdout and run.stderr == ""
    assert (tmp_path / "d" / "slake" / "en" / "1.0.0" / "dataset_info.json").is_file()

    bad = _command("slake", "--manual_dir", slake.root.parent, "--data_dir", tmp_path / "e")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: ") and bad.stderr.count("\n") == 1
    assert "did you mean" in bad.stderr


def test_options_of_the_command_line(slake, tmp_path):
    options = build_lib._options()
    for name, (option, names) in options.items():
        kinds = {type(b.OPTIONS[name].default) for b in map(_builder, names)}
        assert len(kinds) == 1, f"--{name} has more than one type"
        assert option.help.endswith(".")
    shown = _command("--help").stdout
    assert "--[no]shuffle_choices" in shown and "--validate_fraction" in shown
    bad = _command("slake", "--manual_dir", slake.write(), "--shuffle_choices")
    assert bad.stderr == "error: slake: unknown option shuffle_choices; its options: allow_missing_images\n"


def _builder(name):
    return importlib.import_module(build_lib.BUILDERS[name]).Builder


def test_command_line_help_and_unknown_name():
    shown = _command("--help")
    assert "Build a data set" in shown.stdout and "Example:" in shown.stdout
    assert "--manual_dir" in shown.stdout
    for args in ((), ("vqa_rat",), ("slake", "phantom")):
        unknown = _command(*args)
        assert unknown.returncode == 1 and f"known ones: {KNOWN}" in unknown.stderr
