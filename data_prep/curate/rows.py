"""Where rows come from: JSON Lines, MedM's files, or a built TFDS data set; in a fixed order.

A source has an `identity`, so that a resumed run can tell whether its input is still the same.
"""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from data_prep import files, qa_files
from data_prep.files import DataError
from data_prep.ledger import describe as describe_ledger
from paligemma_med.pp import json_text
from paligemma_med.pp.files import default_data_dir

EXPECTED = "a JSON object with question, answer and image_id on each line"
KEYS = ("question", "answer", "image_id")
MALFORMED = "malformed"


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of one input.

    name: recorded in provenance. identity: JSON-able, changes with the content. total: number of
    rows if known. read: yields (line or row number from 1, row, None), or (number, None, why) for
    something that isn't a row. notes: lines of text, after everything was read.
    """

    name: str
    identity: Any
    total: int | None
    read: Callable[[], Iterator[tuple[int, dict[str, Any] | None, str | None]]]
    notes: Callable[[], Sequence[str]] = lambda: []


def open_source(spec: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens `FILE.jsonl`, a file that `qa_files` reads (.json, .csv), or `tfds:NAME[/CONFIG]:SPLIT`.

    Args:
      spec: one of these, as on the command line.
      data_dir: where TFDS data sets are.

    Raises:
      DataError: it doesn't exist, or has another form.
    """
    if spec.startswith("tfds:"):
        return _tfds(spec, data_dir)
    path = pathlib.Path(spec).expanduser()
    if path.suffix.lower() in (".json", ".csv"):
        return _medm(path)
    return _jsonl(path)


def _digest(path: pathlib.Path) -> tuple[str, int]:
    """SHA-256 of a file and the number of its lines."""
    digest, lines, last = hashlib.sha256(), 0, b"\n"
    try:
        with open(path, "rb") as f:
            while chunk := f.read(1 << 20):
                digest.update(chunk)
                lines += chunk.count(b"\n")
                last = chunk[-1:]
    except OSError as e:
        raise DataError(f"{path}: can't be read ({e.strerror or e}); expected {EXPECTED}") from None
    return digest.hexdigest(), lines + (last != b"\n")


def _jsonl(path: pathlib.Path) -> Source:
    digest, total = _digest(path)
    with open(path, "rb") as f:
        head = f.read(200)
    if files.is_lfs_pointer(head):
        raise DataError(f"{path}: {files.lfs_message(EXPECTED)}")
    if not head.strip():
        raise DataError(f"{path}: the file is empty; expected {EXPECTED}")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise DataError(f"{path}: found a JSON list; expected {EXPECTED} (or the name .json)")

    def read():
        with open(path, "rb") as f:
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield number, *_parse(line)

    return Source(str(path), [path.name, digest], total, read)


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(row, None) or (None, why it isn't a row)."""
    try:
        row = json_text.parse(line, "not a row", "an object", root=dict, constants=True, halves=True)
    except ValueError as e:
        return None, str(e)
    if missing := [k for k in KEYS if k not in row]:
        return None, f"no key {', '.join(missing)}"
    if odd := [k for k in KEYS if row[k] is not None and not isinstance(row[k], (str, int, float))]:
        return None, f"{odd[0]} is no text but {row[odd[0]]!r:.40}"
    return {k: str(v) if k in KEYS and v is not None else v for k, v in row.items()}, None


def _medm(path: pathlib.Path) -> Source:
    digest, _ = _digest(path)
    ledger = qa_files.qa_ledger()

    def read():
        for number, pair in enumerate(qa_files.read_qa(path, ledger), 1):
            row = {
                "question_id": pair.question_id,
                "image_id": pair.image_id,
                "question": pair.question,
                "answer": pair.answer,
                "answer_type": pair.answer_type,
                **pair.extra,
            }
            if "U_id" in row:  # MedPix's name for a case
                row["case_id"] = row["U_id"]
            yield number, row, None

    def notes():
        return [f"{path.name}, {line}" for line in describe_ledger(ledger.to_report())]

    return Source(str(path), [path.name, digest], None, read, notes)


def _tfds(spec: str, data_dir: str | os.PathLike | None) -> Source:
    import tensorflow_datasets as tfds

    from data_prep.builders import tfrecord

    name, _, split = spec.removeprefix("tfds:").rpartition(":")
    if not name or not split:
        raise DataError(f"{spec}: expected tfds:NAME:SPLIT, such as tfds:medpix2/qa:train")
    for path in (pathlib.Path(data_dir or default_data_dir()) / name.partition(":")[0]).glob("**/features.json"):
        files.check_feature_classes(path.parent)
    try:
        builder = tfds.builder(name, data_dir=data_dir)
        info = builder.info.splits[split]
    except Exception as e:  # TFDS raises a dozen kinds
        reason = " ".join(str(e).split())
        raise DataError(f"{spec}: no such built data set in {data_dir} ({reason:.200})") from None
    tfrecord.check_random_access(builder.info.file_format, f"{spec}, {builder.data_path}")
    texts = [k for k, f in builder.info.features.items() if isinstance(f, tfds.features.Text)]
    if missing := [k for k in KEYS if k not in texts]:
        raise DataError(f"{spec}: no text feature {', '.join(missing)}; expected questions")
    sizes = [[p.name, p.stat().st_size] for p in map(pathlib.Path, info.filepaths)]

    def read():
        images = {
            k: tfds.decode.SkipDecoding()
            for k, f in builder.info.features.items()
            if isinstance(f, tfds.features.Image)
        }
        source = builder.as_data_source(split=split, decoders=images)
        for number, example in enumerate(source, 1):
            row = {k: example[k].decode("utf-8") for k in texts}
            yield number, {k: v for k, v in row.items() if v or k in KEYS}, None

    return Source(spec, [builder.info.full_name, split, sizes], info.num_examples, read)
