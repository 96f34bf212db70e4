"""The images of a built data set, one by one, with the texts about each and what they are compared by."""

import dataclasses
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds

from data_prep import files
from data_prep.builders import tfrecord
from data_prep.builders.leaks import plain
from data_prep.files import DataError
from data_prep.leakage import looks
from data_prep.progress import progress
from paligemma_med.pp import image_digests


@dataclasses.dataclass
class Picture:
    """One image of a split.

    digest: of the stored bytes, see `image_digests`; look: see `looks.fingerprint`, None if it has none; number: of its
    first record in the split; synpic, article: MedPix's number of the image and the article it is from, "" if its texts
    name none; asked: {question as `plain` compares it: (question, answer)}.
    """

    digest: str
    image_id: str
    number: int
    look: Any = None
    synpic: str = ""
    article: str = ""
    asked: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)


def read_records(folder: pathlib.Path, split: str) -> Iterator[Mapping[str, Any]]:
    """The records of a split in order, images as stored bytes; of either file format."""
    builder = files.open_built(folder)
    decoders = {"image": tfds.decode.SkipDecoding()}
    if builder.info.file_format.value == tfrecord.TFRECORD:
        for path in builder.info.splits[split].filepaths:
            for record in tfrecord.read(path):
                yield builder.info.features.deserialize_example_np(record, decoders=decoders)
        return
    source = builder.as_data_source(split=split, decoders=decoders)
    for i in range(len(source)):
        yield source[i]


def splits_of(folder: pathlib.Path) -> dict[str, int]:
    """{split: number of records} of a built set."""
    return {name: info.num_examples for name, info in files.open_built(folder).info.splits.items()}


def write_digests(folder: pathlib.Path) -> None:
    """Writes image_digests.tsv of a set that has just been built."""
    found: dict[str, dict[str, str]] = {}
    for split, total in splits_of(folder).items():
        images = found[split] = {}
        for row in progress(read_records(folder, split), f"digests of {split}", total):
            images.setdefault(image_digests.digest(row["image"]), _text(row, "image_id"))
    with files.whole_file(folder / image_digests.NAME) as f:
        f.write(image_digests.to_text(found).encode("utf-8", "replace"))


def pictures(name: str, folder: pathlib.Path, split: str, total: int) -> list[Picture]:
    """The images of a split, each once, decoded for their looks."""
    found: dict[str, Picture] = {}
    for number, row in enumerate(progress(read_records(folder, split), f"reading {name} {split}", total)):
        if missing := [k for k in ("image", "question", "answer") if k not in row]:
            raise DataError(
                f"{folder}: its records have no {', '.join(missing)}; expected a set of questions about images"
            )
        key = image_digests.digest(row["image"])
        if (picture := found.get(key)) is None:
            image_id = _text(row, "image_id")
            picture = found[key] = Picture(key, image_id, number, looks.fingerprint(row["image"]))
            picture.synpic, picture.article = ids_of(image_id, _text(row, "paper_id"))
        question, answer = _text(row, "question"), _text(row, "answer")
        picture.asked.setdefault(plain(question), (question, answer))
    return list(found.values())


def ids_of(image_id: str, paper_id: str = "") -> tuple[str, str]:
    """(MedPix's number of an image, its article) as ids name them: "MPX1009_synpic46283" → ("46283", "")."""
    synpic = re.search(r"synpic(\d+)", image_id, re.IGNORECASE)
    article = re.search(r"PMC\d+", f"{paper_id} {image_id}")
    return synpic[1] if synpic else "", article[0] if article else paper_id


def _text(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key, b"")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def contents(folder: pathlib.Path, split: str, numbers: set[int]) -> dict[int, bytes]:
    """{number of a record: its image's bytes}."""
    builder = files.open_built(folder)
    if builder.info.file_format.value == tfrecord.TFRECORD:
        return {i: row["image"] for i, row in enumerate(read_records(folder, split)) if i in numbers}
    source = builder.as_data_source(split=split, decoders={"image": tfds.decode.SkipDecoding()})
    return {i: source[i]["image"] for i in sorted(numbers)}
