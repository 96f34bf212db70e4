"""What a built TFDS data set says of itself, looked at before TFDS reads it."""

import os
import pathlib
from typing import Any

from paligemma_med.pp import json_text

_CLASSES = "tensorflow_datasets.core.features."  # where TFDS has its own


def open_built(folder: os.PathLike | str) -> Any:
    """The TFDS builder of a built data set, from its own description on disk.

    Raises:
      ValueError: as in `check_feature_classes`; or TFDS can't read the description.
    """
    import tensorflow_datasets as tfds  # here: it is slow to import

    check_feature_classes(folder)
    path = pathlib.Path(folder) / "dataset_info.json"
    if path.is_file():
        json_text.read(path, "what TFDS writes about a data set", root=dict)
    try:
        builder = tfds.builder_from_directory(str(folder))
        for split in builder.info.splits.values():
            if split.num_examples < 0 or split.num_examples != sum(split.shard_lengths):
                raise ValueError(f"the split {split.name} has shards of {list(split.shard_lengths)} examples")
        return builder
    except Exception as e:  # of TFDS, protobuf, and Python, depending on what is wrong
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        raise ValueError(
            f"{folder} is no data set that TFDS can read ({reason:.200}); build it again if dataset_info.json or "
            "features.json is damaged"
        ) from None


def check_feature_classes(folder: os.PathLike | str) -> None:
    """Checks the features.json of a data set, if there is one. TFDS imports the modules that it names, so that a file
    which came with the data, or lies where a program is started, would be run.

    Raises:
      ValueError: it names a class that isn't TFDS' own; it is no JSON.
    """
    path = pathlib.Path(folder) / "features.json"
    if not path.is_file():
        return  # TFDS says what is missing
    found = [json_text.read(path, "features as TFDS writes them", root=dict)]
    while found:
        value = found.pop()
        if isinstance(value, list):
            found += value
        elif isinstance(value, dict):
            found += value.values()
            for name in [value.get(key) for key in ("pythonClassName", "python_class_name", "type")]:
                if isinstance(name, str) and not name.startswith(_CLASSES):
                    raise ValueError(f"{path} names the class {name!r}, which would be imported; expected {_CLASSES}*")
