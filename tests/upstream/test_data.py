"""What `data_prep.build --file_format=tfrecord` makes: in big_vision the rows that ours reads."""

import json

import pytest

from data_prep.build import build


def _compare(run_python, tfrecord, array_record, name, *splits):
    args = ("-m", "tests.upstream.compare_data", tfrecord, array_record, name, *splits)
    return json.loads(run_python(*args))


@pytest.mark.big_vision
@pytest.mark.slow
def test_rows_and_batches(run_python, tiny_data, tmp_path):
    raw = tiny_data / "downloads" / "phantom"
    build("phantom", manual_dir=raw, data_dir=tmp_path, file_format="tfrecord")
    found = _compare(run_python, tmp_path, tiny_data, "phantom", "validate", "train")
    assert found["rows"]["train"] > 80 and found["eval"] == found["rows"]["train"]
    assert found["train"] == 16


@pytest.mark.big_vision
@pytest.mark.slow
@pytest.mark.real_data
def test_all_of_slake(run_python, real_data, tmp_path):
    for file_format in ("tfrecord", "array_record"):
        build(
            "slake",
            config="en",
            manual_dir=real_data / "slake",
            data_dir=tmp_path / file_format,
            file_format=file_format,
        )
    found = _compare(
        run_python,
        tmp_path / "tfrecord",
        tmp_path / "array_record",
        "slake/en",
        "train",
        "test",
        "validate",
    )
    assert found["rows"] == dict(train=4918, test=1061, validate=1053)
    assert found["eval"] == 1053
