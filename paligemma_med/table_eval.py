"""The evaluation of an own table, as a section of config.evals: what `evaluate --table` runs.

A run knows how it is asked (config.predict_pp), and a table what is asked and what would be right; a section is both.
"""

import os
import re
from typing import Any

from paligemma_med import input_pipeline
from paligemma_med.config import values as config_values
from paligemma_med.pp import registry
from paligemma_med.pp import rows as row_keys

# Unless the config has evaluations of its own, which say how long its answers are and what fits.
MAX_NEW_TOKENS, BATCH_SIZE = 64, 32


def data_of(path, *, split="all", images=None, columns=None, choose=None) -> dict[str, str]:
    """A `data` section for an own table; paths are absolute, so that a report finds them from anywhere."""
    data = dict(name=f"table:{_absolute(path)}", split=split)
    if images:
        data["images"] = _absolute(images)
    return data | {k: v for k, v in dict(columns=columns, choose=choose).items() if v}


def _absolute(path):
    return os.path.abspath(os.path.expanduser(os.fspath(path)))


def name_of(path) -> str:
    """The evaluation's name: the table's, as part of a path."""
    stem = os.path.splitext(os.path.basename(os.fspath(path)))[0]
    return re.sub(r"[^A-Za-z0-9]+", "_", stem).strip("_")[:60] or "table"


def section(config, data, train_data=None, *, max_new_tokens=0, batch_size=0) -> dict[str, Any]:
    """The section of config.evals that asks every question of a table, with controls.

    Args:
      config: ConfigDict of an experiment, for its prompt.
      data: of `data_of`.
      train_data: the same, where majority answers are counted; None: there are none.
      max_new_tokens, batch_size: 0: those of the config's first evaluation of this kind, or the above.

    Raises:
      ValueError: the config has no prompt; the table has no answers, or can't be read.
    """
    if not config.get("predict_pp"):
        raise ValueError("config has no predict_pp, which makes a prompt of a question.")
    source = input_pipeline.open_source(data)
    if missing := [k for k in row_keys.NEEDED if k not in source.features]:
        raise ValueError(
            f"{source} has no {missing[0]!r}, only {', '.join(source.features)}: there is nothing to compare answers "
            f"with. `ask` answers without; --columns={missing[0]}=NAME says how the column is called."
        )
    own = next((s for s in _own(config) if s.get("type") == "vqa"), {})
    texts = [k for k in source.features if k != "image"]
    out = dict(
        type="vqa",
        data=dict(data),
        pp_fn=keeping(config.predict_pp, texts),
        batch_size=batch_size or own.get("batch_size") or BATCH_SIZE,
        pred_kw=dict(max_new_tokens=max_new_tokens or own.get("pred_kw", {}).get("max_new_tokens") or MAX_NEW_TOKENS),
    )
    return out | (dict(train_data=dict(train_data)) if train_data else {})


def trained_on(config, asked=None) -> dict[str, Any] | None:
    """The `data` section of the own table that a run was trained on; None if it was on something else.

    If that is the table `asked` (a `data` section), its folder and names of columns are those given there.
    """
    data = (config.get("input") or {}).get("data") or {}
    if not str(data.get("name")).startswith("table:") or data["name"] == "table:":  # own_data.py without train=
        return None
    data = data.to_dict()
    if asked and is_same_table(data, asked):
        data |= {k: v for k, v in asked.items() if k != "split"}
    return data


def is_same_table(a, b) -> bool:
    """Whether two `data` sections name one file."""
    paths = [_absolute(x["name"].removeprefix("table:")) for x in (a, b)]
    return os.path.realpath(paths[0]) == os.path.realpath(paths[1])


def keeping(pp, keys) -> str:
    """A prediction's pp string that keeps these keys of a row as well, for the evaluator."""
    *others, last = registry.split(pp)
    name, kept, _ = registry.parse_call(last)
    if name != "keep":
        return pp  # it lets go of nothing
    return "|".join([*others, f"keep({', '.join(map(repr, dict.fromkeys([*kept, *keys])))})"])


def _own(config):
    return [s for s in (config.get("evals") or {}).values() if not config_values.is_big_visions(s)]
