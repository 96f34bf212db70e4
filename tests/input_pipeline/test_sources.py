"""Records on disk: what is read of them, and what each mistake says."""

import pickle

import numpy as np
import pytest

from paligemma_med import input_pipeline
from paligemma_med.input_pipeline import InputError, sources
from tests.input_pipeline.tiny_vqa import N_TRAIN, N_VALID, damaged_copy, png


def test_source_gives_bytes_text_and_numpy(data):
    source = input_pipeline.open_source(data)
    assert len(source) == N_TRAIN
    rows = {r["question_id"]: r for r in (source[i] for i in range(len(source)))}
    assert set(rows) == {f"q{i}" for i in range(N_TRAIN)}
    row = rows["q5"]
    assert row["question"] == "wo ist es, 5? 在哪里"
    assert row["image"] == png(5)
    assert row["number"] == 5 and row["number"].dtype == np.int32
    assert row["choices"] == ["a", "β"]
    assert row["boxes"]["label"] == ["Milz", "Milz"]
    np.testing.assert_array_equal(row["boxes"]["bbox"], [[0, 1, 2, 3]] * 2)
    assert rows["q3"]["boxes"]["label"] == []


def test_source_pickles_before_and_after_reading(data):
    source = input_pipeline.open_source(data)
    for _ in range(2):
        copy = pickle.loads(pickle.dumps(source))
        assert [copy[i]["number"] for i in range(3)] == [source[i]["number"] for i in range(3)]


def test_split_grammar(data):
    def ids(split):
        source = input_pipeline.open_source(data | {"split": split})
        return [source[i]["question_id"] for i in range(len(source))]

    everything = ids("train")
    assert ids("train[:5]") == everything[:5]
    assert ids("train[-5:]") == everything[-5:]
    assert sorted(ids("train[:5]+train[5:]")) == sorted(everything)
    assert len(ids("train+validate")) == N_TRAIN + N_VALID
    assert ids("train[20%:]") == everything[round(N_TRAIN * 0.2) :]


def test_highest_version_is_read(data, data_dir):
    assert {p.name for p in (data_dir / "tiny_vqa" / "en").iterdir()} == {"1.9.0", "1.10.0"}
    assert "1.10.0" in str(sources._find_version("tiny_vqa/en", data_dir))


def test_data_dir_from_environment(data, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", data.pop("data_dir"))
    assert len(input_pipeline.open_source(data)) == N_TRAIN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "slake/en"}, ["slake/en", "python -m data_prep.build slake --config en --data"]),
        ({"name": "phantom"}, ["python -m data_prep.build phantom --data_dir"]),
        ({"name": "tiny_vqa"}, ["choose one of ['tiny_vqa/en']"]),
        ({"name": "../etc"}, ["../etc"]),
        ({"split": "test"}, ["no split 'test'", "train (23 examples)", "validate (9 examples)"]),
        ({"split": "train+tset[:5]"}, ["no split 'tset[:5]'"]),
        ({"split": "train[:x]"}, ["train[:x]", "can't be read"]),
        ({"split": "train[5:5]"}, ["train[5:5]", "empty"]),
        ({"split": "train[-5:-10]"}, ["train[-5:-10]", "empty"]),
        ({"split": "train[:3]+train[5:3]"}, ["train[5:3]", "empty"]),
        ({"split": 3}, ["data.split=3", "expected a text"]),
        ({"data_dir": ["x"]}, ["data.data_dir", "expected a text"]),
        ({"splits": "train"}, ["unknown: ['splits']"]),
    ],
)
def test_open_source_errors(data, change, words):
    with pytest.raises(InputError) as e:
        input_pipeline.open_source(data | change)
    assert all(word in str(e.value) for word in words), str(e.value)


def test_missing_and_damaged_files_are_named(data, data_dir, tmp_path):
    data, shard = damaged_copy(data, data_dir, tmp_path)
    with pytest.raises(InputError, match="tiny_vqa/en split train, record"):
        source = input_pipeline.open_source(data)
        for i in range(len(source)):
            source[i]
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard.name} is missing"):
        input_pipeline.open_source(data)


def test_columns_are_those_of_whole_records(data):
    source = input_pipeline.open_source(data)
    keys = ("question_id", "answer")
    rows = list(source.columns(keys))
    assert rows == [{k: source[i][k] for k in keys} for i in range(len(source))]
    assert all(isinstance(v, str) for row in rows for v in row.values())
    assert rows == list(source.columns(keys)) and len(rows) == source.about()["examples"]
    part = input_pipeline.open_source({**data, "split": "train[:3]"})
    assert list(part.columns(keys)) == rows[:3]
    about = part.about()
    assert (about["name"], about["split"]) == (data["name"], "train[:3]")
    assert about["version"] and about["bytes"] > 0
