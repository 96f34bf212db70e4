"""One model's weights from several sources: a tower, what lies between, and a language model, each from its own file.

A source may hold more than the model has, or less: a tower whose last layers the model doesn't use, a projection where
the model has its tower's head, a query transformer that read another tower. Nothing is read here; Lazy leaves stay so.

Trees are flat in this file: {path: array, `lazy.Lazy`, or anything with a shape}.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, listed
from paligemma_med.checkpoints.hf import assemble
from paligemma_med.models import parts
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree

PARTS = tuple(dict.fromkeys(path.partition("/")[0] for path in parts.LEAVES))  # in the order of the computation
_NEEDED = ("img", "llm")  # of these
_ONE = rf"({'|'.join(PARTS)})=(.+?)"
_SEVERAL = re.compile(rf"{_ONE}(?:,(?:{'|'.join(PARTS)})=.+)*")
_BETWEEN, _HEAD = "connector/proj/", "img/head/"


def parts_of(spec: Any) -> Mapping[str, str] | None:
    """{part: source} of a mapping, a section of a config or its text, "img=a,connector=b,llm=c"; None if `spec` is
    another.

    Raises:
      ValueError: unknown parts, or not all that are needed.
    """
    if isinstance(spec, str) and _SEVERAL.fullmatch(spec):
        found = re.findall(rf"{_ONE}(?=,(?:{'|'.join(PARTS)})=|$)", spec)
        if len({part for part, _ in found}) < len(found):
            raise ValueError(f"{spec} names a part twice")
        spec = dict(found)
    spec = spec.to_dict() if hasattr(spec, "to_dict") else spec
    if not isinstance(spec, Mapping):
        return None
    if not {*_NEEDED} <= {*spec} <= {*PARTS}:
        raise ValueError(
            f"model_init has the keys {sorted(spec)}: expected a path, or {' and '.join(_NEEDED)} (connector too)"
        )
    return spec


def open_parts(spec: Mapping[str, str], open_one: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """{part: its tree}, of sources that hold the part alone or whole models.

    Raises:
      CheckpointError: a source hasn't the part that it is named for, or has adapters.
    """
    out = {}
    for part, path in spec.items():
        tree = open_one(path)
        if {*tree} <= {*PARTS}:  # of a whole model, or of parts with their names
            if part not in tree:
                raise CheckpointError(f"{path} has no {part!r}, only {' and '.join(sorted(tree))}")
            tree = tree[part]
        if factor := next(filter(lora.is_factor, flatten_tree(tree)), None):
            raise CheckpointError(
                f"{path} has adapters, such as {factor}, and the sources of parts are weights alone: merge them first "
                "(tools.convert_checkpoint --merge), or name the adapter as adapter_init"
            )
        out[part] = tree
    return out


def for_model(loaded: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
    """What of `loaded` a model with leaves `expected` has, named and cut as it has them. What doesn't fit stays as it
    is, for `fit.match_params` to name.

    - Heads that a file has as one axis become two.
    - A tower without a last norm gives what comes out of a middle layer: later ones, and the norm, are left out.
    - The projection of a model without a connector is its tower's head.
    """
    flat = _as_head(dict(loaded), expected)
    flat = _middle_layer(flat, expected)
    return {name: _with_heads(name, leaf, expected.get(name)) for name, leaf in flat.items()}


def _as_head(flat, expected):
    if any(name.startswith("connector/") for name in expected):
        return flat
    for name in [n for n in flat if n.startswith(_BETWEEN)]:
        leaf, head = flat.pop(name), _HEAD + name.removeprefix(_BETWEEN)
        flat.setdefault(head, leaf)  # a run's own replaces it
    return flat


def _middle_layer(flat, expected):
    norms = [name for name, leaf in parts.LEAVES.items() if leaf.when == "final_norm"]
    stacked = [n for n, leaf in parts.LEAVES.items() if leaf.stacked and n.startswith("img/") and n in expected]
    if any(n in expected for n in norms) or not any(n in flat for n in norms) or not stacked:
        return flat
    depth = expected[stacked[0]].shape[0]
    for name in norms:
        flat.pop(name, None)
    assemble.tell(f"The image tower gives what comes out of layer {depth}: later ones and its last norm are left out")
    for name in stacked:
        if name in flat and np.ndim(flat[name]) and (found := np.shape(flat[name]))[0] > depth:
            flat[name] = lazy.derive(flat[name], (depth, *found[1:]), lambda x: x[:depth])
    return flat


def _with_heads(name, leaf, wanted):
    table = parts.LEAVES.get(name)
    if wanted is None or table is None or "NH" not in table.letters:
        return leaf
    shape, i = tuple(wanted.shape), table.axes.index("NH")
    if np.shape(leaf) != (*shape[:i], shape[i] * shape[i + 1], *shape[i + 2 :]):
        return leaf
    return lazy.derive(leaf, shape, lambda x: x.reshape(shape))


def afresh(loaded: Mapping[str, Any], expected: Mapping[str, Any], spec: Mapping[str, str]) -> list[str]:
    """Which leaves of the model the sources can't give, so that they begin afresh when it is trained; said on stderr.

    That is what leads from one part to another: all of it, where no source is named for it or where a source of the
    tower has no head; and what in a connector has another tower's or language model's width.

    Args:
      loaded: from `for_model`.
      spec: the sources, for messages.
    """
    between = [n for n in expected if n.startswith(("connector/", _HEAD))]
    missing = [n for n in between if n not in loaded]
    where = spec.get("connector") or spec["img"]
    if missing:
        some = listed(missing[:3]) + (" and the rest between tower and language model" if len(missing) > 3 else "")
        assemble.tell(f"{where} has no {some}: trained from fresh weights")
    other = [n for n in between if n in loaded and _is_of_another_width(n, loaded[n], expected[n])]
    if other:
        shapes = listed(f"{n} {tuple(expected[n].shape)}, not {np.shape(loaded[n])}" for n in other)
        assemble.tell(f"{where} was made for parts of other widths: trained from fresh weights are {shapes}")
    return missing + other


def _is_of_another_width(name, leaf, wanted):
    found, axes = np.shape(leaf), parts.LEAVES[name].axes
    if len(found) != len(axes) and "NH" in axes:  # heads as one axis
        i, n = axes.index("NH"), tuple(wanted.shape)
        axes, want = axes.replace("NH", "N"), (*n[:i], n[i] * n[i + 1], *n[i + 2 :])
    else:
        want = tuple(wanted.shape)
    if len(found) != len(want):
        return False
    differ = {c for c, a, b in zip(axes, found, want, strict=True) if a != b}
    return bool(differ) and differ <= {"D", "E"}
