"""Records on disk: one split of a TFDS data set, read in any order from array_record files; or another kind of source,
by its name.

No TensorFlow is needed, and none of the builder's code: a data set describes itself on disk.
"""

import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from paligemma_med.input_pipeline import jsonl_source, table_source
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.pp.files import default_data_dir, path_inside
from paligemma_med.pp.tfds_files import check_feature_classes, open_built


def _version_key(folder: pathlib.Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.split("."))


def _find_version(name: str, data_dir: pathlib.Path) -> pathlib.Path:
    """The folder of the highest version of `name` ("slake/en") that is built in `data_dir`."""
    parts = name.split("/")
    if not all(re.fullmatch(r"\w[\w.-]*", part) for part in parts) or len(parts) > 2:
        raise InputError(f"data.name={name!r}: expected a name like 'phantom' or 'slake/en'")
    folder = data_dir.joinpath(*parts)
    inside = [p for p in folder.iterdir() if p.is_dir()] if folder.is_dir() else []
    versions = [p for p in inside if re.fullmatch(r"\d+\.\d+\.\d+", p.name) and (p / "dataset_info.json").is_file()]
    if versions:
        return max(versions, key=_version_key)
    configs = sorted(f"{name}/{p.name}" for p in inside if any(p.glob("*/dataset_info.json")))
    if len(parts) == 1 and configs:
        raise InputError(f"data.name={name!r} has no data of its own; choose one of {configs}")
    config = f" --config {parts[1]}" if len(parts) == 2 else ""
    raise InputError(
        f"data set {name!r} is not built in {data_dir}; build it with "
        f"`python -m data_prep.build {parts[0]}{config} --data_dir {data_dir}` "
        "(and --manual_dir with the released files where they are needed), or point data.data_dir "
        "or $TFDS_DATA_DIR to where it is"
    )


def folder_of(data: Mapping[str, Any]) -> pathlib.Path:
    """The folder that `open_source` reads; InputError where the set isn't built, or would run other code than TFDS'."""
    for key in ("name", "split", "data_dir"):
        if data.get(key) is not None and not isinstance(data[key], str | os.PathLike):
            raise InputError(f"data.{key}={data[key]!r:.100}: expected a text")
    data_dir = data.get("data_dir")
    data_dir = pathlib.Path(data_dir).expanduser() if data_dir else default_data_dir()
    if any("\ud800" <= c <= "\udfff" for c in str(data_dir)):  # ArrayRecord takes texts alone
        raise InputError(f"data.data_dir={str(data_dir)!r}: its name isn't UTF-8; rename it")
    folder = _find_version(str(data["name"]), data_dir)
    try:
        check_feature_classes(folder)
    except ValueError as e:
        raise InputError(f"data set {data['name']}: {e}") from None
    return folder


def _to_numpy_and_text(value: Any, feature: Any) -> Any:
    """`value` with Text features as str and plain numbers as numpy; the rest is left alone."""
    if isinstance(feature, tfds.features.FeaturesDict):
        return {k: _to_numpy_and_text(v, feature[k]) for k, v in value.items()}
    if isinstance(feature, tfds.features.Sequence):
        return _to_numpy_and_text(value, feature.feature)
    if isinstance(feature, tfds.features.Text):
        # A Text inside a Sequence comes as a list.
        if isinstance(value, bytes):
            return value.decode("utf-8")
        return [_to_numpy_and_text(v, feature) for v in value]
    if isinstance(value, int | float):
        return feature.np_dtype.type(value)
    return value


class Source:
    """Random access to one split: `len(source)`, `source[i]` -> dict. Picklable.

    Encoded images come as the bytes of the file, text as str (also inside sequences), the rest as
    numpy. name, split, features: what was opened.
    """

    def __init__(self, name: str, split: str, builder: Any):
        self.name = name
        self.split = split
        self.features = builder.info.features
        images = [k for k, f in self.features.items() if isinstance(f, tfds.features.Image)]
        decoders = {k: tfds.decode.SkipDecoding() for k in images}
        self._records = builder.as_data_source(split, decoders=decoders)
        parts = [f for s in split.split("+") for f in _instructions(builder, s.strip())]
        self._about = {
            "name": name,
            "version": str(builder.version),
            "split": split,
            "examples": len(self._records),
            "bytes": sum(os.path.getsize(f.filename) for f in parts),
        }

    def __len__(self) -> int:
        return len(self._records)

    def about(self) -> dict[str, Any]:
        """What was opened: name, version, split, examples, and the size of the split's files."""
        return dict(self._about)

    def columns(self, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The records in order with only these keys; the rest isn't decoded or held."""
        features = tfds.features.FeaturesDict({k: self.features[k] for k in keys})
        for i in range(len(self)):
            record = self._records.data_source[i]
            try:
                example = features.deserialize_example_np(record)
            except Exception as e:  # of TFDS and protobuf
                raise InputError(f"{self}, record {i}: can't be read: {e}") from e
            yield self._converted(i, example, features)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            record = self._records[int(index)]
        except Exception as e:
            # array_record gives a C++ status here: no file name in it, and no index.
            raise InputError(f"{self}, record {index}: can't be read: {e}") from e
        return self._converted(index, record, self.features)

    def _converted(self, index, record, features):
        try:
            return _to_numpy_and_text(record, features)
        except Exception as e:  # where the set's features.json isn't that of its records
            raise InputError(f"{self}, record {index}: isn't what features.json says: {type(e).__name__}: {e}") from e

    def __str__(self) -> str:
        return f"data set {self.name} split {self.split}"

    __repr__ = __str__


def open_source(data: Mapping[str, Any]) -> Source:
    """Opens `data = dict(name="slake/en", split="train[:512]", data_dir=...)`; "table:PATH" and "hf:FOLDER" are own
    tables (`table_source`), "bv:jsonl" is big_vision's reader (`jsonl_source`).

    The highest version built in data_dir (default: $TFDS_DATA_DIR, else ~/tensorflow_datasets) is
    read, through its own description on disk: the builder's code isn't needed. `split` is TFDS's:
    slices in records or percent, and sums.
    InputError: not built (with the command that builds it), no such split, empty, files missing.
    """
    data = dict(data)
    kind, colon, what = str(data.get("name")).partition(":")
    if colon and kind in ("table", "hf"):
        return table_source.open_table_source(data)
    if colon and kind == "bv" and what == "jsonl":
        return jsonl_source.open_jsonl(data)
    if colon:
        raise InputError(
            f"data.name={data['name']!r}: no such kind of data; expected a TFDS set like 'slake/en', 'table:PATH', "
            "'hf:FOLDER' or 'bv:jsonl'"
        )
    unknown = sorted(set(data) - {"name", "split", "data_dir"})
    missing = sorted({"name", "split"} - set(data))
    if unknown or missing:
        raise InputError(
            f"input data {data}: expected the keys name, split and perhaps data_dir; "
            + (f"unknown: {unknown}" if unknown else f"missing: {missing}")
        )
    name, split = str(data["name"]), "+".join(part.strip() for part in str(data["split"]).split("+"))
    folder = folder_of(data)
    try:
        builder = open_built(folder)
    except ValueError as e:
        raise InputError(f"data set {name}: {e}") from None
    splits = {k: info.num_examples for k, info in builder.info.splits.items()}
    for part in split.split("+"):
        if (match := re.match(r"\s*([\w.-]+)", part)) is None or match.group(1) not in splits:
            raise InputError(
                f"data set {name} has no split {part.strip()!r}; it has "
                + ", ".join(f"{k} ({n} examples)" for k, n in splits.items())
            )
    try:
        # Here a slice that can't be read ("train[:x]") is found out.
        by_part = {s.strip(): _instructions(builder, s.strip()) for s in split.split("+")}
    except Exception as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"split {split!r} of data set {name} can't be read: {reason}") from None
    for part, instructions in by_part.items():
        if sum(f.take for f in instructions) < 1:  # negative for a slice that ends before it begins
            raise InputError(f"split {part!r} of data set {name} is empty; it has {splits}")
    instructions = [f for part in by_part.values() for f in part]
    for f in instructions:
        try:
            path_inside(folder, os.path.relpath(f.filename, folder))
        except ValueError:
            raise InputError(
                f"{folder}/dataset_info.json names {f.filename!r}; expected a file of this folder"
            ) from None
        if not os.path.exists(f.filename):
            raise InputError(f"data set {name}: the file {f.filename} is missing, build it again")
    try:
        return Source(name, split, builder)
    except NotImplementedError:
        raise InputError(
            f"{folder} holds {builder.info.file_format.value} files, expected array_record, which "
            "`python -m data_prep.build` makes unless told otherwise; build it into another "
            "--data_dir, and point data.data_dir or $TFDS_DATA_DIR there"
        ) from None


def _instructions(builder: Any, split: str) -> list[Any]:
    return list(builder.info.splits[split].file_instructions)
