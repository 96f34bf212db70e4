"""tools.bench sources: the same pictures as TFDS records, files and DICOM."""

import functools

import numpy as np
import pytest

from paligemma_med.input_pipeline import sources
from paligemma_med.pp import images
from tools.bench import input_sets, input_sources, turns


@pytest.mark.parametrize("encode", [input_sets.png, input_sets.dicom_8, input_sets.dicom_16])
def test_every_form_shows_the_same_pixels(encode):
    picture = input_sets.pictures(1, 64)[0]
    np.testing.assert_array_equal(images.to_rgb(encode(0, picture)), images.to_rgb(input_sets.jpeg(0, picture)))
    assert picture.std() > 5


def test_a_table_has_a_row_and_a_file_for_each_picture(tmp_path):
    source = sources.open_source(input_sets.write_table(tmp_path / "made", input_sets.dicom_16, 3, 32))
    assert len(source) == 3 and source.dropped == []
    assert source[2]["answer"] == "organ 2" and images.to_rgb(source[2]["image"]).shape == (32, 32, 3)


def test_unknown_sources_are_told():
    given = dict(res=56, text_len=64, batch_size=4, rounds=1, batches=1, cores=1)
    with pytest.raises(ValueError, match=r"--sources has \['zarr'\]; expected some of \['tfds_jpeg'"):
        input_sources.run(sources=["zarr"], **given)


@pytest.mark.slow
def test_all_sources_in_turns(monkeypatch):
    small = {n: (functools.partial(w, count=16, side=64), e) for n, (w, e) in input_sources.SOURCES.items()}
    monkeypatch.setattr(input_sources, "SOURCES", small)
    monkeypatch.setattr(turns, "bind", lambda cores: None)
    found = input_sources.run(sources=None, res=56, text_len=64, batch_size=4, rounds=1, batches=1, cores=1)
    assert list(found["cpu_against"]) == list(small) and found["cpu_against"]["tfds_jpeg"] == 1
    assert "| table_dicom_16 |" in found["row"]
