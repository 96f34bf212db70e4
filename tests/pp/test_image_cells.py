"""Cells that name more than one file: what is shown of series, frames and several images, and that no name leaves its
folder."""

import io
import json
import shutil

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("pydicom")

from paligemma_med.pp import image_cells, images, montage, own_table, windows  # noqa: E402
from tests.pp.dicom_files import make  # noqa: E402
from tests.pp.series_files import write_series  # noqa: E402


def png(grey, shape=(4, 6)):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full(shape, grey, np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """For all tests: not to be changed."""
    tmp_path = tmp_path_factory.mktemp("cells")
    folder = tmp_path / "films"
    write_series(folder / "ct", 20)
    for name, grey in (("a.png", 50), ("b.png", 60), ("x;y#slice=1.png", 70)):
        (folder / name).write_bytes(png(grey))
    frames = np.stack([np.full((4, 6), 100 + i, np.uint8) for i in range(5)])
    (folder / "cine.dcm").write_bytes(make(frames, bits=8))
    (folder / "whole").mkdir()
    (folder / "whole" / "1").write_bytes(make(frames, bits=8))
    pages = [PIL.Image.fromarray(x) for x in frames]
    pages[0].save(folder / "pages.tif", save_all=True, append_images=pages[1:])
    hu = np.array([[0, 1064, 1104]], np.int16)
    (folder / "hu.dcm").write_bytes(make(hu, Modality="CT", RescaleSlope=1, RescaleIntercept=-1024))
    (tmp_path / "secret.png").write_bytes(png(1))
    return folder


@pytest.fixture
def own_root(root, tmp_path):
    """A copy for one test."""
    return shutil.copytree(root, tmp_path / "films")


def shown(cell, root, **kw):
    """The grey in the middle of each place of a montage of 4 x 6 pixels."""
    rgb = images.to_rgb(image_cells.load(cell, root, **kw))
    assert rgb.shape[0] % 4 == rgb.shape[1] % 6 == 0
    return rgb[2::4, 3::6, 0].tolist()


def test_a_file_is_its_own_bytes(root):
    for name in ("a.png", "x;y#slice=1.png", "cine.dcm", "hu.dcm", str(root / "b.png")):
        assert image_cells.load(name, root) == (root / name).read_bytes()


def test_a_series_is_a_montage_of_nine(root, tmp_path):
    """The middles of nine equal parts of 20: floor((i + 0.5) * 20 / 9) = 1, 3, 5, 7, 10, 12, 14, 16, 18."""
    assert shown("ct", root) == [[20, 40, 60], [80, 110, 130], [150, 170, 190]]
    write_series(tmp_path / "small", 3)
    assert shown("small", tmp_path) == [[10, 20], [30, 0]]
    assert shown("whole", root) == [[100, 101, 102], [103, 104, 0]]  # one file that holds a series


def test_left_stays_left(root):
    rgb = images.to_rgb(image_cells.load("ct", root))
    edges = (rgb[..., 0] == 255).all(0)
    assert np.flatnonzero(edges).tolist() == [0, 6, 12]


@pytest.mark.parametrize(
    "cell, wanted",
    [
        ("ct#slice=12", [[120]]),
        ("ct#slice=middle", [[110]]),
        ("ct#slice=3,1", [[30, 10]]),
        ("ct#slice=4-8", [[40, 50, 60], [70, 80, 0]]),
        ("ct#montage=1x2", [[60, 160]]),
        ("ct#montage=2x1|slice=11-14", [[120], [140]]),
        ("ct # slice = 2 | series=7", [[20]]),
        ("ct#series=1.2.3|montage=1x1", [[110]]),
        ("cine.dcm#frame=3", [[102]]),
        ("cine.dcm#frame=middle", [[102]]),
        ("cine.dcm#montage=1x3", [[100, 102, 104]]),
        ("whole#slice=5", [[104]]),
        ("pages.tif#frame=2,5", [[101, 104]]),
        ("a.png;b.png", [[50, 60]]),
        ('["b.png", "ct#slice=1", "a.png"]', [[60, 10], [50, 0]]),
        ('["x;y#slice=1.png"]', "no image"),
    ],
)
def test_what_a_cell_may_say(root, cell, wanted):
    if isinstance(wanted, str):
        with pytest.raises((images.ImageError, OSError)):
            image_cells.load(cell, root)
    else:
        assert shown(cell, root) == wanted


def test_windows(root):
    brain = images.to_rgb(image_cells.load("hu.dcm#window=brain", root))
    assert brain[0, :, 0].tolist() == [0, 129, 255]  # -1024, 40 and 80 HU
    assert (brain == images.to_rgb((root / "hu.dcm").read_bytes(), window=windows.parse("40,80"))).all()
    default = image_cells.parse_default("window=brain|frame=middle|slice=2")
    assert (images.to_rgb(image_cells.load("hu.dcm", root, choose=default)) == brain).all()
    # What is chosen for all holds where it can: this is no CT, that has one frame, or no units.
    assert shown("cine.dcm", root, choose=default) == [[102]]
    assert shown("ct", root, choose=default) == [[20]] and shown("ct#slice=5", root, choose=default) == [[50]]
    assert image_cells.load("a.png", root, choose=image_cells.parse_default("window=40,80")) == png(50)


@pytest.mark.parametrize(
    "cell, message",
    [
        ("ct#slice=21", "ct: no slice 21; there are 20"),
        ("ct#slice=0", "slice=0: expected numbers from 1"),
        ("ct#slice=5-2", "expected numbers from 1"),
        ("ct#slice=1-999999", "expected numbers from 1"),
        ("ct#slice=" + "1-64," * 200 + "1", "expected numbers from 1"),
        ("ct#slice=", "expected slice=, frame=, montage=, series=, window=, each once"),
        ("ct#slice=1|slice=2", "each once"),
        ("ct#slce=1", "slce=1: expected slice="),
        ("ct#frame=1", "ct: frame= is for files"),
        ("cine.dcm#slice=1", "cine.dcm: slice= and series= are for folders"),
        ("ct#slice=1|frame=1", "expected one of them"),
        ("cine.dcm#frame=6", "cine.dcm: no frame 6; there are 5"),
        ("a.png#frame=2", "a.png: no frame 2; there are 1"),
        ("ct#montage=9x9", "at most 64 places"),
        ("ct#montage=0x3", "rows x columns"),
        ("ct#window=spleen", "or one of brain"),
        ("a.png#window=brain", "a.png: window= is for DICOM"),
        ("cine.dcm#window=brain", "cine.dcm: a window in Hounsfield units"),
        ("a.png;", "one has no name"),
        ("[]", "expected a list of names"),
        ("[1]", "expected a list of names"),
        ("[" * 9, "can't be understood"),
        (json.dumps(["a.png"] * 65), "65 images; expected at most 64"),
        ("ct#series=9", "no series 9"),
    ],
)
def test_refused_in_a_sentence(root, cell, message):
    with pytest.raises(images.ImageError, match=message) as e:
        image_cells.load(cell, root)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "cell",
    [
        *("../secret.png", "../secret.png#frame=1", "a.png;../secret.png", "..#slice=1", "ct/../../secret.png"),
        *('["a.png", "../secret.png"]', '["/etc/passwd"]', "/etc/passwd", "/etc#slice=1", "C:\\x.png", "a\0b"),
        *("{root}/../secret.png", "{root}/../secret.png#frame=1", "..\\secret.png"),
    ],
)
def test_no_name_leaves_its_folder(root, cell):
    cell = cell.replace("{root}", str(root))
    for read in (image_cells.load, image_cells.files_of, image_cells.sources, image_cells.digest):
        with pytest.raises(image_cells.OutsideError, match="leaves the folder"):
            read(cell, root)


def test_the_size_of_a_page_is_checked_as_that_of_the_first(own_root, monkeypatch):
    pages = [PIL.Image.new("L", size) for size in ((2, 2), (9, 9))]
    pages[0].save(own_root / "bomb.tif", save_all=True, append_images=pages[1:])
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(images.ImageError, match="bomb.tif: .* 9 x 9 pixels; expected at most 50"):
        image_cells.load("bomb.tif#frame=2", own_root)


def test_a_header_that_promises_frames_without_number_costs_no_memory(own_root):
    content = make(np.zeros((4, 6), np.uint8), bits=8, NumberOfFrames=2_000_000_000)
    (own_root / "many.dcm").write_bytes(content)
    with pytest.raises(images.ImageError, match="many.dcm: a DICOM file that can't be decoded"):
        image_cells.load("many.dcm#montage=2x2", own_root)


def test_a_broken_slice_is_named(own_root):
    path = sorted((own_root / "ct").iterdir())[0]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(images.ImageError, match=f"^ct: {path.name}: a DICOM file that can't be decoded"):
        image_cells.load("ct#montage=4x5", own_root)


def test_pictures_of_several_shapes_share_equal_places():
    tall, wide = np.full((8, 2, 3), 90, np.uint8), np.full((2, 4, 3), 30, np.uint8)
    out = montage.draw([tall, wide], 1, 2)[..., 0]
    assert out.shape == (8, 8)
    assert out[:, :4].tolist() == [[0, 90, 90, 0]] * 8
    assert out[:, 4:].tolist() == [[0] * 4] * 3 + [[30] * 4] * 2 + [[0] * 4] * 3


def test_a_montage_has_a_limit(monkeypatch):
    monkeypatch.setattr(montage, "MAX_SIDE", 30)
    assert montage.draw([np.zeros((40, 20, 3), np.uint8)] * 5, 2, 3).shape == (20, 15, 3)


@pytest.mark.parametrize("total, count", [(1, 9), (9, 9), (10, 9), (500, 9), (7, 3)])
def test_samples_are_the_middles_of_equal_parts(total, count):
    count = min(total, count)
    assert montage.sampled(total, count) == [int((i + 0.5) * total / count) for i in range(count)]
    assert [montage.grid(n) for n in (1, 2, 3, 4, 5, 9, 10, 64)] == [
        *((1, 1), (1, 2), (2, 2), (2, 2), (2, 3), (3, 3), (3, 4), (8, 8))
    ]


# --- In a table ---


def test_a_table_of_series(root, tmp_path):
    path = tmp_path / "q.jsonl"
    cells = ["ct", "ct#slice=3", "ct#slice=99", ["a.png", "b.png"], "a.png;b.png", "gone;a.png", "ct#slice=x", "../x"]
    path.write_text("".join(json.dumps(dict(image=x, question="q?")) + "\n" for x in cells))
    table = own_table.open_table(path, images=root, choose="slice=middle")
    assert [line for line, _ in table.dropped] == [6, 7, 8]
    reasons = [reason.partition(": ")[0] for _, reason in table.dropped]
    assert reasons == ["no image file", "what it names can't be understood", "the path of its image leaves the folder"]
    first, third = (images.to_rgb(table.image_bytes(i)) for i in (0, 1))
    assert (first[0, 3, 0], third[0, 3, 0]) == (110, 30)
    with pytest.raises(ValueError, match="q.jsonl line 3: image ct: no slice 99"):
        table.image_bytes(2)
    assert table[1]["image_id"] == "ct#slice=3"
    # One series in two splits is a leak, whichever slices are shown of it; so is a copy of it.
    assert len(set(table.image_keys[:3])) == 1 and table.image_keys[3] == table.image_keys[4] != table.image_keys[0]
    assert table.image_sizes[0] == sum(p.stat().st_size for p in (root / "ct").iterdir())
    assert table.image_digest(0) == table.image_digest(1) != table.image_digest(3)
    assert table.image_path(1) == root / "ct"
    with pytest.raises(ValueError, match="choose=series=1: series=1: expected slice=, frame=, montage=, window="):
        own_table.open_table(path, images=root, choose="series=1")
