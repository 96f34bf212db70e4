"""Folders of slices: their order, and what has none."""

import pytest

pytest.importorskip("pydicom")

from paligemma_med.pp import images, series  # noqa: E402
from tests.pp.series_files import AXIAL, CORONAL, SAGITTAL, one_slice, write_series  # noqa: E402


def greys(folder, **kw):
    return [int(images.to_rgb(path.read_bytes())[0, 3, 0]) for path in series.ordered(folder, **kw)]


UP = [10, 20, 30, 40, 50]


@pytest.mark.parametrize(
    "axis, step, order",
    [
        (AXIAL, (0, 0, 2.5), UP),  # from the feet upwards
        (AXIAL, (0, 0, -2.5), UP[::-1]),
        ((-1, 0, 0, 0, 1, 0), (0, 0, 2.5), UP),  # rows that run the other way don't turn the order round
        (CORONAL, (0, 3, 0), UP),  # from front to back
        (SAGITTAL, (3, 0, 0), UP),  # from right to left
        ((1, 0, 0, 0, 0.8, 0.6), (0, -0.6, 0.8), UP),  # a tilted gantry
        ((1, 0, 0, 0, 0.8, 0.6), (1000, 0, 0), None),  # steps in the plane are none along the normal
    ],
    ids=str,
)
def test_slices_are_in_the_order_of_their_places(tmp_path, axis, step, order):
    folder = write_series(tmp_path / "ct", axis=axis, step=step)
    names = [int(images.to_rgb(path.read_bytes())[0, 3, 0]) for path in sorted(folder.iterdir())]
    assert names != UP
    assert greys(folder) == (order or names)


def test_equal_places_are_told_apart_by_number_then_by_name(tmp_path):
    for name, grey, instance, z in [
        ("a2", 1, 30, 0),
        ("a10", 2, 4, 0),
        ("b", 3, 4, 0),
        ("c", 4, None, 0),
        ("d", 5, 99, -1),
    ]:
        content = one_slice(
            grey, InstanceNumber=instance, ImagePositionPatient=[0, 0, z], ImageOrientationPatient=[1, 0, 0, 0, 1, 0]
        )
        (tmp_path / name).write_bytes(content)
    assert greys(tmp_path) == [5, 2, 3, 1, 4]


@pytest.mark.parametrize("what", ["no position", "another plane"])
def test_without_a_common_normal_numbers_count(tmp_path, what):
    for i, (instance, z) in enumerate([(2, 0), (3, 1), (1, 2)]):
        axis = CORONAL if what == "another plane" and i == 2 else AXIAL
        position = None if what == "no position" and i == 0 else [0, 0, z]
        content = one_slice(
            i, InstanceNumber=instance, ImagePositionPatient=position, ImageOrientationPatient=list(axis)
        )
        (tmp_path / f"{i}").write_bytes(content)
    assert greys(tmp_path) == [2, 0, 1]


def test_pictures_that_are_no_dicom_are_ordered_by_name(tmp_path):
    for name in ("s10.png", "s2.png", "S1.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"not read here")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "below").mkdir()
    assert [p.name for p in series.ordered(tmp_path)] == ["S1.png", "s2.png", "s10.png"]
    with pytest.raises(images.ImageError, match="series=3 is for DICOM"):
        series.ordered(tmp_path, "3")


def refused(folder, message, **kw):
    with pytest.raises(images.ImageError, match=message) as e:
        series.ordered(folder, **kw)
    assert "\n" not in str(e.value) and "p1" not in str(e.value) and "Doe" not in str(e.value)


def test_one_of_several_series_is_chosen(tmp_path):
    write_series(tmp_path, 3, "a{i}")
    write_series(tmp_path, 2, "b{i}", SeriesInstanceUID="1.2.4", SeriesNumber=12)
    refused(tmp_path, r"slices of 2 series; #series= chooses .*: 12 \(1.2.4, 2 files\), 7 \(1.2.3, 3 files\)$")
    assert greys(tmp_path, series="12") == greys(tmp_path, series="1.2.4") == [10, 20]
    refused(tmp_path, "no series 5, but 2 series", series="5")
    assert greys(write_series(tmp_path / "alone"), series="7") == UP
    refused(tmp_path / "alone", "no series 8; its slices are of 7 1.2.3", series="8")


def test_patients_are_not_mixed_nor_named(tmp_path):
    write_series(tmp_path, 3, "a{i}")
    write_series(tmp_path, 2, "b{i}", PatientID="p12")
    refused(tmp_path, "^slices of several patients; expected those of one$")


def test_what_is_no_series(tmp_path, monkeypatch):
    refused(tmp_path, "without images")
    refused(tmp_path / "gone", "can't be read")
    write_series(tmp_path, 2)
    (tmp_path / "x.png").write_bytes(b"\x89PNG")
    refused(tmp_path, "beside x.png")
    assert greys(tmp_path, series="7") == [10, 20]
    (tmp_path / "x.png").unlink()
    (tmp_path / "2.dcm").write_bytes(one_slice(1, NumberOfFrames=3))
    refused(tmp_path, "3 files, of which 2.dcm has 3 frames")
    monkeypatch.setattr(series, "MAX_FILES", 2)
    series._ordered.cache_clear()
    refused(tmp_path, "more than 2 files")


def test_a_header_that_cannot_be_read(tmp_path):
    write_series(tmp_path, 2)
    content = one_slice(1)
    (tmp_path / "9.dcm").write_bytes(content.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99", 1))
    refused(tmp_path, "^9.dcm: a deflated DICOM file")


@pytest.mark.parametrize("elements", [dict(InstanceNumber=12345), dict(ImagePositionPatient=[1.0, 2.0])], ids=str)
def test_damaged_elements_count_as_missing(tmp_path, elements):
    write_series(tmp_path, 2, "a{i}")
    (tmp_path / "b").write_bytes(one_slice(99, **elements).replace(b"12345 ", b"1e999 "))
    assert sorted(greys(tmp_path)) == [10, 20, 99]
