"""The base of the project's TFDS builders: schema and build report.

A config or an evaluator can swap one data set for another because the keys are the same. Images are
stored as the bytes of the released file: nothing is encoded again, and TFDS needs no TensorFlow for it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from data_prep import files
from data_prep.builders import tfrecord
from data_prep.builders.flat_memory import flat_memory
from paligemma_med.pp import rows

REPORT_NAME = "build_report.json"


def vqa_features(**extra: Any) -> tfds.features.FeaturesDict:
    """Features of one question about one image, plus those that only this data set has.

    image: encoded bytes as released (read with `tfds.decode.SkipDecoding()`); the text that every
    set has is listed in `paligemma_med.pp.rows`.
    """
    text = tfds.features.Text()
    return tfds.features.FeaturesDict(
        {
            "image": tfds.features.Image(),
            **dict.fromkeys(rows.KEYS, text),
            **extra,
        }
    )


def boxes_feature() -> tfds.features.Sequence:
    """Named boxes: label text[n], bbox float32[n, 4] = x, y, width, height in pixels."""
    bbox = tfds.features.Tensor(shape=(4,), dtype=np.float32)
    return tfds.features.Sequence({"label": tfds.features.Text(), "bbox": bbox})


@dataclasses.dataclass(frozen=True)
class Option:
    """A setting of a builder, given as `--NAME` to `data_prep.build`.

    default: a bool, int, float or str, which sets the option's type; None: an optional text (such as a
    path). help: one line.
    """

    default: bool | int | float | str | None
    help: str


class VqaBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A GeneratorBasedBuilder that writes `build_report.json` next to the records.

    Subclasses set `self.report` (a JSON-able dict) in `_split_generators` or while their examples are
    generated, and define the class methods below, which `data_prep.build` calls. They may declare
    `OPTIONS`; `self.options` has the values, defaults included.
    """

    OPTIONS: Mapping[str, Option] = {}
    report: Mapping[str, Any] | None = None
    # Whether the builder can return its splits as Beam transforms (see row_file.generate).
    CAN_BEAM = False
    # Set by data_prep.build: whether to use Beam, and a folder in which a killed build leaves results to
    # the next one (see CheckedImages).
    beam: bool = False
    cache_dir: pathlib.Path | None = None

    def __init__(self, *, options: Mapping[str, Any] | None = None, **kwargs: Any):
        self.options = {k: o.default for k, o in self.OPTIONS.items()} | dict(options or {})
        super().__init__(**kwargs)
        self._original_state["options"] = self.options  # so that a copy in another process gets them

    @classmethod
    def check_manual_dir(cls, folder: str | os.PathLike) -> pathlib.Path:
        """Returns `folder` after a quick check; DataError says what is missing in it."""
        raise NotImplementedError

    @classmethod
    def configs_in(cls, folder: pathlib.Path) -> Sequence[str]:
        """The configs that `folder` has files for, which are built by default."""
        return list(cls.builder_configs)

    @classmethod
    def describe(cls, report: Mapping[str, Any]) -> Sequence[str]:
        """The report as lines of text."""
        raise NotImplementedError

    def _example_writer(self) -> Any:
        if self.info.file_format.value == tfrecord.TFRECORD:
            return tfrecord.ExampleWriter(self.info.file_format)
        return super()._example_writer()

    def _download_and_prepare(self, *args: Any, **kwargs: Any) -> None:
        with flat_memory():
            super()._download_and_prepare(*args, **kwargs)
        if self.options:
            self.report = {**self.report, "made_with": self.options}
        # Here data_path is TFDS' temporary folder, so report and records appear together or not at all.
        files.write_json(pathlib.Path(self.data_path) / REPORT_NAME, self.report)
