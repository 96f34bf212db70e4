"""What `config.input` draws from: one data set, or the sets of a mixture and their shares."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from paligemma_med.input_pipeline import mixture
from paligemma_med.input_pipeline.errors import InputError
from paligemma_med.input_pipeline.rows import PpFn
from paligemma_med.input_pipeline.sources import Source, open_source


class TrainingSets:
    """The data sets that `config.input` names, opened once for all uses.

    sources: {name: Source}. A mixture's set that has no weight at any time is not opened.
    pps: {name: its pp}.
    phases: [(fraction of training, {name: share})], as `mixture.check_phases` gives them; None
      where input.data is a single set.
    num_examples: in an epoch; for a mixture, those of all its sets together, whatever their weights
      (as in big_vision).
    """

    def __init__(self, input_cfg: Mapping[str, Any]):
        """InputError: a set doesn't exist, or the config doesn't say what to read."""
        self.sources: dict[str, Source] = {}
        self.pps: dict[str, str | PpFn] = {}
        self.phases: list[tuple[float, dict[str, float]]] | None = None
        if is_mixture(input_cfg["data"]):
            self._open_mixture(input_cfg)
        else:
            self._open_one(input_cfg)
        self.num_examples = sum(map(len, self.sources.values()))
        self._selections: dict[int, Selection] = {}

    def _open_one(self, cfg: Mapping[str, Any]) -> None:
        if "pp" not in cfg:
            raise InputError(f"input: 'pp' is missing, found {sorted(cfg)}")
        if cfg.get("anneal"):
            raise InputError("input.anneal is for mixtures, but input.data is one data set")
        self._add(cfg["data"]["name"], cfg["data"], cfg["pp"])

    def _open_mixture(self, cfg: Mapping[str, Any]) -> None:
        try:
            phases = mixture.check_phases(dict(cfg["data"]), cfg.get("anneal"))
        except ValueError as e:
            raise InputError(str(e)) from None
        for name in phases[0][1]:
            section = dict(cfg.get(name) or {})
            if unknown := sorted(set(section) - {"data", "pp"}):
                raise InputError(f"input.{name}: unknown keys {unknown}, expected data and pp")
            pp = section.get("pp", cfg.get("pp"))
            if "data" not in section or pp is None:
                raise InputError(
                    f"input.data has {name!r}, so input.{name}=dict(data=..., pp=...) is expected; "
                    f"found {sorted(section)}"
                )
            if any(shares[name] for _, shares in phases):
                self._add(name, section["data"], pp)
        self.phases = [(start, {name: shares[name] for name in self.sources}) for start, shares in phases]

    def _add(self, name: str, data: Mapping[str, Any], pp: str | PpFn) -> None:
        self.sources[name] = open_source(data)
        self.pps[name] = pp

    def selection(self, total: int) -> "Selection":
        """Which set each of a mixture's `total` examples comes from; worked out once."""
        if total not in self._selections:
            self._selections[total] = Selection(*mixture.draw(self.phases, total))
        return self._selections[total]


def is_mixture(data: Any) -> bool:
    """Whether `input.data` is {name: weight} rather than one data set."""
    return isinstance(data, Mapping | ConfigDict) and not isinstance(data.get("name"), str)


def num_examples(input_cfg: Mapping[str, Any]) -> int:
    """Examples in an epoch of `config.input`, as `TrainingSets` counts them."""
    return TrainingSets(input_cfg).num_examples


class Selection:
    """Index in a mixture → (number of the set, index in its endless stream), for Grain."""

    def __init__(self, which: np.ndarray, place: np.ndarray):
        self.which = which
        self._place = place

    def __len__(self) -> int:
        return len(self.which)

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(self.which[index]), int(self._place[index])
