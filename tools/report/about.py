"""What metrics.json and config.json say about an evaluation, as far as a report reads it: from outside, and so checked.

A value of another type is left out and told; figures don't depend on it.
"""

from typing import Any

from paligemma_med.pp import json_text

# Key -> type, or a dict of the same for an object; of a list the type of its items.
_DATA = {"name": str, "split": str, "version": str, "data_dir": str, "images": str, "columns": str, "choose": str}
_PRED_KW = {"temperature": float, "beams": int, "num_samples": int}
_SECTION = {"data": _DATA, "pred_kw": _PRED_KW, "protocol": str}
ABOUT = {
    "data": _DATA,
    "section": _SECTION,
    "groups": [str],
    "controls": [str],
    **dict.fromkeys(("protocol", "split", "split_hash", "prompt_hash", "fingerprint", "checkpoint", "command"), str),
}
CONFIG = {"model_init": (str, dict, type(None)), "input": {"data": {}}}


def sound(value: Any, form: Any, where: str, problems: list[str]) -> Any:
    """`value` without what isn't of its form; each is added to `problems`, as a sentence."""
    out = {}
    for key, x in value.items():
        if key not in form or _fits(x, form[key]):
            out[key] = sound(x, form[key], f"{where}.{key}", problems) if isinstance(form.get(key), dict) else x
        elif x is not None:
            problems.append(f"{where} has {json_text.shown(x)} as {key}; left out")
    return out


def _fits(x, form):
    if isinstance(form, dict):
        return isinstance(x, dict)
    if isinstance(form, list):
        return isinstance(x, list) and all(isinstance(y, form[0]) for y in x)
    if form in (int, float):
        return isinstance(x, int | float if form is float else int) and not isinstance(x, bool)
    return isinstance(x, form)


def sound_config(config: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """A config of a run without what isn't of its form, as `sound`."""
    evals = config.get("evals")
    names = evals if isinstance(evals, dict) else {}
    form = {**CONFIG, "evals": dict.fromkeys(names, _SECTION)}
    return sound(config, form, "config.json", problems)
