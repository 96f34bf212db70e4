"""Builds for TensorFlow's readers: the same records in the same order, no TensorFlow needed."""

import importlib.util
import json
import subprocess
import sys

import pytest
import tensorflow_datasets as tfds

from data_prep import report
from data_prep.build import build
from data_prep.builders import tfrecord
from data_prep.curate import rows
from data_prep.files import DataError
from paligemma_med import input_pipeline


def _records(folder, split):
    """The serialised examples of a built split, in order, whatever its format."""
    builder = tfds.builder_from_directory(folder)
    if builder.info.file_format.value == "array_record":
        source = builder.as_data_source(split).data_source
        return [source[i] for i in range(len(source))]
    return [r for path in builder.info.splits[split].filepaths for r in tfrecord.read(path)]


def test_same_records_in_the_same_order(slake, tmp_path):
    slake.write()
    made = {f: build("slake", manual_dir=slake.root, data_dir=tmp_path / f, file_format=f) for f in tfrecord.FORMATS}
    assert made["tfrecord"].keys() == made["array_record"].keys()
    for name, folder in made["tfrecord"].items():
        assert len(list(folder.glob("*.tfrecord-*"))) == 3 and not list(folder.glob("*.array_*"))
        for split in ("train", "validate", "test"):
            found = _records(folder, split)
            assert found == _records(made["array_record"][name], split) and len(found) > 1
        infos = [json.loads((made[f][name] / "dataset_info.json").read_text()) for f in made]
        for info in infos:
            info.pop("fileFormat")
        assert infos[0] == infos[1]
        reports = [json.loads((made[f][name] / "build_report.json").read_text()) for f in made]
        assert reports[0] == reports[1]


def test_options_reach_either_format(tmp_path):
    """A drawn set, whose settings are asked about when it is built again."""
    kw = dict(num_images=(2, 1, 1), data_dir=tmp_path, file_format="tfrecord")
    (folder,) = build("phantom", seed=5, **kw).values()
    assert build("phantom", seed=5, **kw) == {"phantom": folder}
    with pytest.raises(DataError, match="already built with seed=5, asked for seed=6"):
        build("phantom", seed=6, **kw)


def test_known_bytes(tmp_path):
    """As TensorFlow writes them: two records, one of them empty."""
    tfrecord.write(tmp_path / "x", [b"hello", b""])
    assert (tmp_path / "x").read_bytes().hex() == EXPECTED
    assert list(tfrecord.read(tmp_path / "x")) == [b"hello", b""]


# of tf.io.TFRecordWriter, TensorFlow 2.21
EXPECTED = "0500000000000000eab2043e68656c6c6fbb1f1c19000000000000000029039807d8ea82a2"


@pytest.mark.parametrize("place", range(0, 21, 4))
def test_damage_is_found(tmp_path, place):
    path = tmp_path / "x"
    tfrecord.write(path, [b"hello"])
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(DataError, match="x: record 0 is damaged or cut off"):
        list(tfrecord.read(path))
    path.write_bytes(whole + whole[: place + 1][:20])
    with pytest.raises(DataError, match="record 1 is damaged or cut off"):
        list(tfrecord.read(path))


def test_one_format_a_folder(slake, tmp_path, capsys):
    """Another format is refused, or takes the place of the old one when that is asked for."""
    slake.write()
    kw = dict(manual_dir=slake.root, data_dir=tmp_path / "d", config="en")
    (folder,) = build("slake", **kw).values()
    before = {p: p.read_bytes() for p in folder.iterdir()}
    with pytest.raises(DataError, match="en/1.0.0: already built as array_record, asked for fi"):
        build("slake", **kw, file_format="tfrecord")
    assert {p: p.read_bytes() for p in folder.iterdir()} == before
    records = _records(folder, "train")
    assert build("slake", **kw, file_format="tfrecord", overwrite=True) == {"slake/en": folder}
    assert not list(folder.glob("*.array_record*")) and _records(folder, "train") == records
    with pytest.raises(DataError, match="already built as tfrecord, asked for file_format=array"):
        build("slake", **kw)
    build("slake", **kw, file_format="tfrecord")
    assert "is already built at" in capsys.readouterr().out


def test_readers_of_array_record_say_so(slake, tmp_path):
    slake.write()
    kw = dict(manual_dir=slake.root, data_dir=tmp_path, config="en", file_format="tfrecord")
    made = build("slake", **kw)
    with pytest.raises(input_pipeline.InputError, match="holds tfrecord files, expected array_r"):
        input_pipeline.open_source(dict(name="slake/en", split="train", data_dir=tmp_path))
    with pytest.raises(DataError, match="holds tfrecord files, expected array_record"):
        report.describe_set("slake/en", made["slake/en"], None)
    with pytest.raises(DataError, match="holds tfrecord files, expected array_record"):
        rows._tfds("tfds:slake/en:train", tmp_path)
    with pytest.raises(DataError, match="a report is made of array_record files"):
        build("slake", **kw, report=tmp_path / "report")


def test_refused_arguments(slake, tmp_path, monkeypatch):
    kw = dict(manual_dir=slake.write(), data_dir=tmp_path / "d")
    with pytest.raises(DataError, match="unknown file_format 'riegeli'; known ones: array_record, "):
        build("slake", **kw, file_format="riegeli")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "google_crc32c" else find(name))
    with pytest.raises(DataError, match=r"needs google-crc32c; pip install 'paligemma_med\[tfr"):
        build("slake", **kw, file_format="tfrecord")
    assert not (tmp_path / "d").exists()
    build("slake", **kw, config="en")  # which doesn't need it


def test_command_line_without_tensorflow(slake, tmp_path):
    """It isn't imported, even where it is installed."""
    slake.write()
    program = (
        "import sys\n"
        "from absl import app\n"
        "from data_prep import build\n"
        "build._define_flags()\n"
        "try:\n"
        "    app.run(build.main)\n"
        "finally:\n"
        "    print([m for m in ('tensorflow', 'paligemma_med.models') if m in sys.modules])\n"
    )
    args = [
        "slake",
        "--config=en",
        "--file_format=tfrecord",
        f"--manual_dir={slake.root}",
        f"--data_dir={tmp_path / 'd'}",
    ]
    run = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.endswith("\n[]\n")
    assert len(_records(tmp_path / "d" / "slake" / "en" / "1.0.0", "train")) == 4
