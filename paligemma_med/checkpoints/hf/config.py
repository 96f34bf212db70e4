"""What the families share in reading a config.json: sections with defaults, and checked numbers."""

import json
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf.layout import Sizes
from paligemma_med.pp import json_text


class Described(NamedTuple):
    """What a config.json says about the model: arguments of `vlm.Model`, and the sizes of the tensors in the files.
    img is None for a language model by itself, llm for an image tower."""

    img: dict[str, Any] | None
    llm: dict[str, Any] | None
    sizes: Sizes
    connector: dict[str, Any] | None = None
    image_ar: str = "prefix"

    @property
    def model(self) -> dict[str, Any]:
        """The arguments of `vlm.Model`; defaults are left out."""
        between = dict(connector=self.connector, image_ar=self.image_ar) if self.connector else {}
        there = {name: part for name, part in (("img", self.img), ("llm", self.llm)) if part is not None}
        return {**there, **between}


class Section(Mapping):
    """An object in a config.json that knows its own path."""

    def __init__(self, values: Mapping[str, Any], path: str):
        self._values, self.path = values, path

    def __getitem__(self, key):
        return self._values[key]

    def __iter__(self):
        return iter(self._values)

    def __len__(self):
        return len(self._values)

    def number(self, key: str) -> int:
        """A whole number above 0.

        Raises:
          CheckpointError: it is something else.
        """
        n = self._values[key]
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise CheckpointError(f"{self.path}: {key} is {n!r}, expected a whole number above 0")
        return n

    def positive(self, key: str) -> float:
        """A number above 0.

        Raises:
          CheckpointError: it is something else.
        """
        x = self.cap(key)
        if x is None:
            raise CheckpointError(f"{self.path}: {key} is null, expected a number above 0")
        return float(x)

    def cap(self, key: str) -> float | None:
        """A number above 0, or None.

        Raises:
          CheckpointError: it is something else.
        """
        x = self._values[key]
        if x is not None and (isinstance(x, bool) or not isinstance(x, int | float) or not 0 < x < 1e30):
            raise CheckpointError(f"{self.path}: {key} is {x!r:.60}, expected a number above 0, or null")
        return x


def section(
    whole: Mapping[str, Any],
    key: str | None,
    path: str,
    *,
    types: Collection[str],
    absent: Mapping[str, Any],
    defaults: Mapping[str, Mapping[str, Any]],
    fixed: Mapping[str, Mapping[str, Any]],
) -> Section:
    """The section `key`, or the whole if that is None, with defaults filled in.

    Args:
      whole: the config.json.
      path: its name, for messages.
      types: the allowed values of its model_type, the default first.
      absent: replaces a section that is missing entirely.
      defaults: {model_type: values of missing keys}.
      fixed: {model_type: values that our model has and can't change}.

    Raises:
      CheckpointError: another model_type, or another value for a fixed key.
    """
    values = whole if key is None else whole.get(key)
    values = absent if values is None else values
    if not isinstance(values, Mapping):
        raise CheckpointError(f"{path}: {key} is {values!r}, expected an object")
    kind = values.get("model_type") or types[0]
    if kind not in types:
        raise CheckpointError(f"{path}: {key} has model_type {kind!r}, expected {' or '.join(types)}")
    rope = values.get("rope_parameters")
    values = {**values, **(rope if isinstance(rope, Mapping) else {})}
    for name, value in fixed[kind].items():
        if not same(values.get(name, value), value):
            name = name if key is None else f"{key}.{name}"
            raise CheckpointError(f"{path}: {name} is {values[name.split('.')[-1]]!r}, but this model has {value!r}")
    return Section({**defaults[kind], **values, "model_type": kind}, path)


def same(found: Any, fixed: Any) -> bool:
    """Whether two values are the same; numbers count as float32, which files of other formats went through."""
    if isinstance(fixed, float) and isinstance(found, int | float) and not isinstance(found, bool):
        return abs(found - fixed) <= 1e-7 * abs(fixed)
    return found == fixed


def check_agrees(part: str, given: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
    """Raises CheckpointError if a dict of our config gives a size that differs from the weights'."""
    for key, n in sizes.items():
        value = given.get(key, n)
        value = tuple(value) if isinstance(value, list) else value
        if value != n:
            raise CheckpointError(f"{part} says {key}={value!r}, but the weights have {n!r}")


def read_only(name: str) -> Callable[..., dict[str, Any]]:
    """The `make_config` of a family that is read but not written: it raises CheckpointError, whatever the model."""

    def make_config(*args) -> dict[str, Any]:
        del args
        raise CheckpointError(f"{name} is read, but not written yet")

    return make_config


def no_processor(sizes: Sizes) -> None:
    """The `make_processor` of a family that reads no images."""
    del sizes


def read_json(path: str) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it holds something else.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} is missing: expected a Hugging Face directory")
    return json_text.read(path, "an object", root=dict, error=CheckpointError)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Writes readable JSON, keys in order."""
    with open(path, "w", encoding="utf-8") as f:
        json.dump(content, f, indent=2, sort_keys=True)
        f.write("\n")
