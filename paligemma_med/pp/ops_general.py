"""Ops that do not care whether a value is an image or a text: keys, defaults, ranges, choice.

Names and arguments are those of big_vision's `pp/ops_general.py`; values are numpy arrays and Python
objects instead of TF tensors.
"""

from collections.abc import Callable

import numpy as np

from paligemma_med.pp.registry import Op, get, need_rng, on_key, register


@register("value_range")
@on_key()
def value_range(vmin=-1, vmax=1, in_min=0, in_max=255.0, clip_values=False) -> Callable:
    """Maps [in_min, in_max] linearly to [vmin, vmax]; gives float32 of the same shape.

    `in_min` and `in_max` may be lists, one number per channel.
    """
    low = np.asarray(in_min, np.float32)
    span = np.asarray(in_max, np.float32) - low
    if np.any(span == 0):
        raise ValueError(f"in_min {in_min} and in_max {in_max} must differ")

    def fn(image, rng):
        del rng
        out = (np.asarray(image, np.float32) - low) / span
        out = np.float32(vmin) + out * np.float32(vmax - vmin)
        return np.clip(out, vmin, vmax) if clip_values else out

    return fn


@register("keep")
def keep(*keys) -> Op:
    """Keeps the named keys, and always those that start with `_`.

    The underscore keys are bookkeeping that ops leave for the input pipeline (`_truncated`); an
    config's keep list should not have to know them. A named key may be missing, as in big_vision.
    """

    def op(data, rng):
        del rng
        return {k: v for k, v in data.items() if k in keys or k.startswith("_")}

    return op


@register("drop")
def drop(*keys) -> Op:
    """Removes the named keys."""

    def op(data, rng):
        del rng
        return {k: v for k, v in data.items() if k not in keys}

    return op


def _copy_structure(value):
    """Copies dicts and lists, shares the leaves: arrays are never changed in place."""
    if isinstance(value, dict):
        return {k: _copy_structure(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy_structure(v) for v in value)
    return value


@register("copy")
def copy(inkey, outkey) -> Op:
    """Puts the value of `inkey` under `outkey` too."""

    def op(data, rng):
        del rng
        data[outkey] = _copy_structure(get(data, inkey))
        return data

    return op


@register("setdefault")
def setdefault(key, value) -> Op:
    """Sets `key` to `value` where it is missing or holds no element.

    An empty *string* counts as an element and stays; an empty list or array becomes one filled with
    `value` (at least one entry), as in big_vision.
    """

    def op(data, rng):
        del rng
        found = data.get(key)
        if found is None:
            data[key] = value
        elif isinstance(found, (list, tuple)) and not found:
            data[key] = type(found)([value])
        elif isinstance(found, np.ndarray) and found.size == 0:
            data[key] = np.full([n or 1 for n in found.shape], value, found.dtype)
        return data

    return op


@register("choice_no_replacement")
def choice_no_replacement(key=None, inkey=None, outkey=None) -> Op:
    """Picks the same random entry of every input key.

    `key`, or `inkey` and `outkey`, are a string or a list of strings; `{key}` in an outkey stands
    for the inkey's name. Needs an rng.

    big_vision counts how often each example was seen, so that no entry repeats before all were seen.
    Such a counter depends on which worker sees the example and is lost at a restart, while the same
    seed must give the same batches. So the pick here depends on the rng alone, and entries may repeat
    earlier.
    """
    sources = _as_list(inkey or key)
    targets = _as_list(outkey or key)
    if not sources or len(sources) != len(targets):
        raise ValueError(f"needs key=, or inkey= and outkey= of equal length; {sources}, {targets}")
    targets = [t.replace("{key}", s) for s, t in zip(sources, targets)]

    def op(data, rng):
        values = [get(data, k) for k in sources]
        for k, v in zip(sources, values):
            if not isinstance(v, (list, tuple)) and np.ndim(v) == 0:
                raise ValueError(f"key {k!r} holds one value ({v!r}), expected a list of choices")
        sizes = {k: len(v) for k, v in zip(sources, values)}
        if len(set(sizes.values())) != 1 or 0 in sizes.values():
            raise ValueError(f"expected lists of one non-zero length, found lengths {sizes}")
        index = int(need_rng(rng).integers(len(values[0])))
        for k, v in zip(targets, values):
            data[k] = v[index]
        return data

    return op


@register("getidx")
def getidx(inkey, index_key, outkey=None) -> Op:
    """Stores `data[inkey][data[index_key]]` under `outkey` (or `inkey`)."""

    def op(data, rng):
        del rng
        values, index = get(data, inkey), int(get(data, index_key))
        if not -len(values) <= index < len(values):
            raise ValueError(f"{index_key!r} is {index}, but {inkey!r} has {len(values)} entries")
        data[outkey or inkey] = values[index]
        return data

    return op


def _as_list(keys) -> list[str]:
    return [keys] if isinstance(keys, str) else list(keys or ())
