"""Splits larger than the memory for them: same records, no TensorFlow, temporary files gone."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, shuffle

from data_prep.builders import flat_memory


def _records(folder, n=200):
    shuffler = shuffle.Shuffler(folder, "salt")
    for i in range(n):
        shuffler.add(f"key{i}", f"record {i} ".encode() * (1 + i % 5))
    return list(shuffler)


def test_records_and_order_stay_the_same(tmp_path, monkeypatch):
    wanted = _records(tmp_path)
    made = 0

    class Counted(flat_memory._Bucket):
        def add(self, key, data):
            nonlocal made
            made += 1
            super().add(key, data)

    monkeypatch.setattr(flat_memory, "MAX_BYTES", 500)
    monkeypatch.setattr(flat_memory, "_Bucket", Counted)
    with flat_memory.flat_memory():
        found = _records(tmp_path)
    assert made == 200
    assert found == wanted
    assert not list(tmp_path.iterdir())


def test_a_key_used_twice_is_still_found(tmp_path, monkeypatch):
    monkeypatch.setattr(flat_memory, "MAX_BYTES", 10)
    with flat_memory.flat_memory():
        shuffler = shuffle.Shuffler(tmp_path, "salt")
        for key in ("a", "b", "a"):
            shuffler.add(key, b"x" * 20)
        with pytest.raises(shuffle.DuplicatedKeysError):
            list(shuffler)


def test_tfds_is_left_as_it_was():
    before = shuffle._Bucket, shuffle.MAX_MEM_BUFFER_SIZE
    with flat_memory.flat_memory():
        assert shuffle._Bucket is not before[0]
    assert (shuffle._Bucket, shuffle.MAX_MEM_BUFFER_SIZE) == before


def test_records_are_the_same_bytes_in_each_process():
    """protobuf orders the entries of a map otherwise in each process, unless it is told to sort them."""
    names = [f"feature{i:02}" for i in range(20)]
    spec = {name: tfds.features.TensorInfo(shape=(), dtype=np.int64) for name in names}
    serializer = example_serializer.ExampleSerializer(spec)
    for order in (names, names[::-1]):
        with flat_memory.flat_memory():
            record = serializer.serialize_example(dict.fromkeys(order, 1))
        assert sorted(names, key=lambda name: record.index(name.encode())) == names
