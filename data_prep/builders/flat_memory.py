"""Lets TFDS write splits of any size in little memory, without TensorFlow, and twice the same bytes.

TFDS sorts the records of a split by a hash of their keys. It holds up to 1 GB of them in memory and
writes the rest to temporary files through TensorFlow's file functions, so that without TensorFlow a
larger split can't be built (tensorflow-datasets 4.9.10). Here the temporary files are plain files and
less is held in memory. Records and their order stay the same.

A record is a protobuf with a map, whose entries are written in another order in each process; here they are sorted.
"""

import contextlib
import os
import struct
from collections.abc import Iterator
from unittest import mock

from tensorflow_datasets.core import example_serializer, shuffle

MAX_BYTES = 64 << 20  # how many bytes of a split's records are held in memory
_HEAD = struct.Struct("=QQQ")  # the upper and lower half of the key's hash, size of the record


class _Bucket:
    """Records whose hashes lie in one of a thousand ranges; replaces TFDS' class."""

    def __init__(self, path: os.PathLike):
        self._path = os.fspath(path)
        self._length = self.size = 0

    def __len__(self) -> int:
        return self._length

    def add(self, key: int, data: bytes) -> None:
        # Opened each time: a thousand open files are more than many systems allow.
        with open(self._path, "ab") as f:
            f.write(_HEAD.pack(key >> 64, key & (1 << 64) - 1, len(data)))
            f.write(data)
        self._length += 1
        self.size += len(data)

    def read_values(self) -> Iterator[tuple[int, bytes]]:
        if not self._length:
            return
        with open(self._path, "rb") as f:
            while head := f.read(_HEAD.size):
                high, low, size = _HEAD.unpack(head)
                yield high << 64 | low, f.read(size)

    def del_file(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._path)


def _serialized(self, example):
    return self.get_tf_example(example).SerializeToString(deterministic=True)


@contextlib.contextmanager
def flat_memory() -> Iterator[None]:
    """A context in which TFDS writes as described above."""
    with (
        mock.patch.object(shuffle, "_Bucket", _Bucket),
        mock.patch.object(shuffle, "MAX_MEM_BUFFER_SIZE", MAX_BYTES),
        mock.patch.object(example_serializer.ExampleSerializer, "serialize_example", _serialized),
    ):
        yield
