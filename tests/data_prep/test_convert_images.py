"""The command that makes readable images of others."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from data_prep.convert_images import convert_files
from data_prep.files import DataError
from paligemma_med.pp import images as reader
from tests.data_prep.images.test_convert import COLOUR, DEEP, encode


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / ".hidden" / "scans"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "plain.png").write_bytes(encode(COLOUR, "PNG"))
    (folder / "a" / "deep.png").write_bytes(encode(DEEP, "PNG"))
    (folder / "deep.tif").write_bytes(encode(DEEP, "TIFF"))
    (folder / "notes.txt").write_text("no image")
    (folder / ".DS_Store").write_bytes(b"x")
    return folder


def test_folder(scans, tmp_path):
    written, errors, notes = convert_files([scans], tmp_path / "out")
    assert not notes
    out = {str(p.relative_to(tmp_path / "out")): p for p in (tmp_path / "out").rglob("*.*")}
    assert written == 3 and set(out) == {"a/plain.png", "a/deep.png.png", "deep.tif.png"}
    assert len(errors) == 1 and "notes.txt: not a readable image" in errors[0]
    assert out["a/plain.png"].read_bytes() == (scans / "a" / "plain.png").read_bytes()
    grey = np.asarray(PIL.Image.open(out["deep.tif.png"]))
    np.testing.assert_array_equal(grey, np.floor(DEEP / 257 + 0.5))


def test_names_that_clash_and_places_that_cannot_be_written(scans, tmp_path):
    with pytest.raises(DataError, match="a/deep.png: more than one input"):
        convert_files([scans, scans], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="can't be written"):
        convert_files([scans], tmp_path / "file")
    written, errors, _ = convert_files([scans / "no.png"], tmp_path / "out")
    assert written == 0 and "no.png: an image is missing" in errors[0]


def test_what_looks_wrong_is_told_with_the_files_name(scans, tmp_path):
    (scans / "twelve.tif").write_bytes(encode(DEEP // 16, "TIFF"))
    written, _, notes = convert_files([scans], tmp_path / "out")
    assert written == 4 and notes == [f"{scans}/twelve.tif: {reader.UNSTRETCHED}"]


def test_command(scans, tmp_path):
    def command(*args):
        return subprocess.run(
            [sys.executable, "-m", "data_prep.convert_images", *map(str, args)],
            capture_output=True,
            text=True,
            timeout=60,
        )

    out = f"--output_dir={tmp_path}/out"
    good = command(scans / "deep.tif", out)
    assert good.returncode == 0 and "1 images written" in good.stdout and not good.stderr
    bad = command(scans, out)
    assert bad.returncode == 1 and bad.stderr.startswith("left out: ") and "3 images" in bad.stdout
    assert command(out).stderr.startswith("error: no input")
    assert "--output_dir" in command("--help").stdout
