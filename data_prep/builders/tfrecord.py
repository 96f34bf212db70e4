"""TFRecord files without TensorFlow: the format that `tf.data`, and so big_vision, reads.

A record is its length (8 bytes), the checksum of the length, its bytes, and their checksum (4 bytes
each; little-endian). TFDS writes such files through TensorFlow; a builder that returns
`ExampleWriter` from `_example_writer` doesn't need it. The format is described in TensorFlow's
guide "TFRecord and tf.train.Example".
"""

import importlib.util
import os
import struct
from collections.abc import Iterable, Iterator
from typing import Any

from tensorflow_datasets.core import writer

from data_prep.files import DataError

ARRAY_RECORD, TFRECORD = "array_record", "tfrecord"
FORMATS = (ARRAY_RECORD, TFRECORD)

_LENGTH, _CHECKSUM = struct.Struct("<Q"), struct.Struct("<I")


def check_installed() -> None:
    """Raises DataError if checksums can't be computed here, so that a build fails before it starts."""
    if importlib.util.find_spec("google_crc32c") is None:
        raise DataError("--file_format=tfrecord needs google-crc32c; pip install 'paligemma_med[tfrecord]'")


def check_random_access(file_format: Any, where: str | os.PathLike) -> None:
    """Raises DataError unless records of this format can be read in random order, without TensorFlow."""
    if file_format.value != ARRAY_RECORD:
        raise DataError(
            f"{where}: holds {file_format.value} files, expected array_record; build it into "
            "another --data_dir with --file_format=array_record"
        )


def _checksum(data: bytes) -> bytes:
    import google_crc32c  # an optional dependency

    crc = google_crc32c.value(data)
    rotated = (crc >> 15 | crc << 17) & 0xFFFFFFFF  # so that files can hold checksums of files
    return _CHECKSUM.pack((rotated + 0xA282EAD8) & 0xFFFFFFFF)


def write(path: str | os.PathLike, records: Iterable[bytes]) -> None:
    """Writes records, in order, to a new file."""
    with open(path, "wb") as f:
        for record in records:
            head = _LENGTH.pack(len(record))
            f.write(head + _checksum(head))
            f.write(record)
            f.write(_checksum(record))


def read(path: str | os.PathLike) -> Iterator[bytes]:
    """The records of a file, in order; DataError if it is cut off or damaged."""
    with open(path, "rb") as f:
        number = 0
        while head := f.read(_LENGTH.size + _CHECKSUM.size):
            length = head[: _LENGTH.size]
            if head[_LENGTH.size :] != _checksum(length):
                raise DataError(f"{path}: record {number} is damaged or cut off")
            (size,) = _LENGTH.unpack(length)
            record = f.read(size)
            if f.read(_CHECKSUM.size) != _checksum(record):
                raise DataError(f"{path}: record {number} is damaged or cut off")
            yield record
            number += 1


class ExampleWriter(writer.ExampleWriter):
    """TFDS' writer of shards, for TFRecord files only."""

    def write(self, path: str | os.PathLike, examples: Iterable[tuple[Any, bytes]]) -> None:
        write(os.fspath(path), (record for _, record in examples))
