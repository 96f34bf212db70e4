"""What a built TFDS data set says of itself, looked at before TFDS reads it."""

import os
import pathlib

from paligemma_med.pp import json_text

_CLASSES = "tensorflow_datasets.core.features."  # where TFDS has its own


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
