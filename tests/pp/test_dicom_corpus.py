"""All files of pydicom, pydicom-data and pylibjpeg-data, from real machines and of tests of decoders: read as pydicom's
functions do, or refused in one sentence.

On demand: `pytest -m slow tests/pp/test_dicom_corpus.py`. The two packages, and decoders, are installed in a temporary
folder; PALIGEMMA_MED_DICOM_FILES names folders that hold the data already (separated like those of PATH), and an
environment with decoders can be used as it is. What can't be had is left out, and the test says so by its skip.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
pytestmark = pytest.mark.slow

DECODERS = ("python-gdcm", "pylibjpeg", "pylibjpeg-libjpeg", "pylibjpeg-openjpeg", "pylibjpeg-rle")
# Package, its import name, where its files are. pylibjpeg-data isn't on PyPI.
DATA = (
    ("pydicom-data", "data_store", "data"),
    ("git+https://github.com/pydicom/pylibjpeg-data", "ljdata", "ds"),
)
# We differ from pydicom's functions: the window misses all values …
OTHERWISE = {"17166", "17196", "JPEG2KLossless_1s_1f_u_16_16.dcm"}
# … or it reads a big-endian palette as if it were little-endian, or believes a label that the stream contradicts.
OTHERWISE |= {"OBXXXX1A_expb.dcm", "OBXXXX1A_expb_2frame.dcm"}
OTHERWISE |= {"SC_rgb_jpeg_lossy_gdcm.dcm", "TOSHIBA_J2K_SIZ1_PixRep0.dcm"}
# The same picture without loss, however it is stored.
TWINS = [
    ["OBXXXX1A.dcm", "OBXXXX1A_rle.dcm", "OBXXXX1A_expb.dcm", "OBXXXX1A_2frame.dcm", "OBXXXX1A_expb_2frame.dcm"],
    [
        "MR_small.dcm",
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_jp2klossless.dcm",
    ],
    ["emri_small.dcm", "emri_small_RLE.dcm", "emri_small_big_endian.dcm", "emri_small_jpeg_2k_lossless.dcm"],
    ["SC_rgb.dcm", "SC_rgb_16bit.dcm", "SC_rgb_32bit.dcm", "SC_rgb_expb.dcm", "SC_rgb_rle.dcm", "SC_rgb_rle_32bit.dcm"],
    ["TOSHIBA_J2K_SIZ0_PixRep1.dcm", "TOSHIBA_J2K_SIZ1_PixRep0.dcm"],
    ["MR2_J2KR.dcm", "MR2_UNCR.dcm"],
    ["RG3_J2KR.dcm", "RG3_UNCR.dcm"],
    ["US1_J2KR.dcm", "US1_UNCR.dcm"],
    ["693_J2KR.dcm", "693_UNCR.dcm"],
]


def install(packages, folder):
    """Whether pip could install them there."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--retries=1",
        "--no-deps",
        f"--target={folder}",
        *packages,
    ]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
    try:
        return subprocess.run(command, capture_output=True, timeout=300, env=environment).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, repo_root):
    """(what `dicom_corpus` says of each file, packages that couldn't be had)."""
    place, missing = tmp_path_factory.mktemp("packages"), []
    own = pathlib.Path(pydicom.__file__).parent / "data"
    folders = [own / name for name in ("test_files", "charset_files", "palettes")]
    given = [pathlib.Path(p) for p in os.environ.get("PALIGEMMA_MED_DICOM_FILES", "").split(os.pathsep) if p]
    folders += given
    for package, module, inside in () if given else DATA:
        if found := importlib.util.find_spec(module):
            folders.append(pathlib.Path(found.origin).parent / inside)
        elif install([package], place):
            folders.append(place / module / inside)
        else:
            missing.append(package)
    if importlib.util.find_spec("pylibjpeg") is None and not install(DECODERS, place):
        missing.append("pylibjpeg")
    paths = os.pathsep.join([str(repo_root), str(place), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "tests.pp.dicom_corpus", *map(str, folders)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PYTHONPATH": paths.rstrip(os.pathsep)},
        cwd=repo_root,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], missing


def by_name(corpus):
    """{name: what was made of each file of this name}."""
    out = {}
    for row in corpus[0]:
        out.setdefault(row["file"].rpartition("/")[2], []).append(row)
    return out


def test_nothing_is_missing(corpus):
    """The other tests run with what there is; this one says what wasn't."""
    rows, missing = corpus
    if missing:
        pytest.skip(f"{len(rows)} files; {', '.join(missing)} can't be installed here")
    assert sum(row["dicom"] for row in rows) >= 280


def test_every_refusal_is_one_sentence(corpus):
    for row in corpus[0]:
        if text := row.get("error"):
            assert text.isprintable() and len(text) < 900, row
            assert "Error" not in text.replace("Error decoding", "") and "object has no" not in text, row


def test_what_pydicom_reads_is_read_as_it_reads_it(corpus):
    for row in corpus[0]:
        name = row["file"].rpartition("/")[2]
        if "reference" in row:  # pydicom's functions can't
            assert "shape" in row or not row["dicom"] or row["error"].startswith("a DICOM file "), row
            assert row["reference"] != "no pixels" or "shape" not in row, row
        elif "error" in row:
            raise AssertionError(row)
        elif row["difference"] > 0.51:  # rounded here, not there
            assert name in OTHERWISE, row
        else:
            assert not row["notes"] or name in OTHERWISE, row


@pytest.mark.parametrize("names", TWINS, ids=lambda names: names[0])
def test_one_picture_in_many_encodings(corpus, names):
    found = by_name(corpus)
    rows = [row for name in names for row in found.get(name, ()) if "shape" in row]
    if len(rows) < 2:
        pytest.skip("these files, or their decoders, aren't here")
    assert len({row["digest"] for row in rows}) == 1


def test_the_colour_bars_look_the_same_in_every_compression(corpus):
    """About 50 files hold the same bars, some with losses, some labelled wrongly."""
    found = by_name(corpus)
    rows = [row for name, rows in found.items() if name.startswith("SC_rgb") for row in rows if "shape" in row]
    rows = [row for row in rows if row["shape"] == [100, 100, 3] and "_KY" not in row["file"]]
    wanted = np.array(next(row["thumb"] for row in rows if row["file"].endswith("SC_rgb_rle.dcm")))
    for row in rows:
        # Colours of less resolution bleed over edges; a wrong colour space is off by 100 and more.
        assert np.abs(np.array(row["thumb"]) - wanted).max() <= 48, row["file"]
    assert len(rows) >= 15
