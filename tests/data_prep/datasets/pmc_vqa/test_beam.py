"""Built with Apache Beam or without, a data set is the same. Skipped where Beam isn't installed."""

import sys

import pytest

from data_prep.build import build
from data_prep.datasets.pmc_vqa import fake
from data_prep.files import DataError
from tests.data_prep.datasets.pmc_vqa.test_pmc_vqa import make


@pytest.mark.slow
def test_same_records_with_beam(tmp_path):
    pytest.importorskip("apache_beam")
    folder = fake.write(tmp_path / "raw", train=300)
    report, plain = make(folder, tmp_path, name="plain")
    made = build(
        "pmc_vqa",
        manual_dir=folder,
        data_dir=tmp_path / "beam",
        config="v1",
        beam_options=[],
    )
    assert (made["pmc_vqa/v1"] / "build_report.json").is_file()
    same_report, beam = make(folder, tmp_path, name="beam")
    assert same_report == report
    for split, examples in plain.items():
        assert list(beam[split].items()) == list(examples.items())


def test_beam_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    monkeypatch.setitem(sys.modules, "apache_beam.options.pipeline_options", None)
    folder = fake.write(tmp_path / "raw")
    with pytest.raises(DataError, match="--beam needs Apache Beam .*paligemma_med.beam."):
        build("pmc_vqa", manual_dir=folder, data_dir=tmp_path / "d", beam_options=[])
    with pytest.raises(DataError, match="phantom: small enough to be built without --beam"):
        build("phantom", data_dir=tmp_path / "d", beam_options=[])
