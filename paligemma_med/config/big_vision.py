"""Reads big_vision's configs as ours: `adopt` is the only place that knows its keys.

Most keys are the same. Those of its PaliGemma transfer configs that differ
(configs/proj/paligemma/transfers) are translated here, or refused with what to use instead.
The other direction is upstream/config.py; the modules that its files import are config/stand_ins.py.
"""

import difflib
import os
import re

from paligemma_med.config import durations
from paligemma_med.pp import registry

# A config with one of these keys is big_vision's: ours name neither the program nor modules.
MARKS = ("model_name", "pp_modules")
MODEL_NAME = "proj.paligemma.paligemma"
PP_MODULES = ("ops_general", "ops_image", "ops_text", "proj.paligemma.ops")

# Keys that its trainer reads and ours can't follow, and what to use instead.
_REFUSED = {
    "model_load": "all weights come from config.model_init here, which may be dict(img=…, llm=…)",
    "resume": "a run resumes in its own --workdir, and config.model_init may name another run",
    "mesh_allow_split_physical_axes": "the devices are laid out by config.mesh alone",
    "grad_clip_per_example": "config.grad_clip_norm clips the gradient of the batch",
    **{
        f"keep_ckpt_{unit}": "config.keep_ckpt says how many of the newest stay, config.keep_best which is the best"
        for unit in durations.UNITS
    },
}
# Arguments of big_vision's towers, with the values that describe how ours always are.
_IDLE = {
    "img": {"posemb": ("learn",), "rep_size": (False,), "head_zeroinit": (True, False)},
    "llm": {"dropout_bdims": ((), [])},
}
# big_vision's short names of weights, and the files that they stand for in $BV_GEMMA_DIR.
_SHORT_NAME = re.compile(r"pt_((?P<second>3b|10b|28b)_)?(224|448|896)(\.bf16|\.f16)?")


def adopt(config, known) -> list[str]:
    """Turns a big_vision config into one of ours, in place; ours stay as they are.

    Args:
      config: ConfigDict, locked or not.
      known: the keys that our configs may have.

    Returns:
      What the user should know, as sentences.

    Raises:
      ValueError: it asks for something unsupported; the message says what to use instead.
    """
    if not any(mark in config for mark in MARKS):
        return []
    with config.unlocked():
        _check_modules(config)
        for key in _REFUSED:
            if _take(config, key, None):
                raise ValueError(f"config.{key} is of big_vision's trainer alone: {_REFUSED[key]}. Leave it out.")
        _translate_model(config)
        _translate_input(config)
        _translate_rules(config)
        return _drop_arguments(config, known)


def _take(section, key, default=None):
    """Removes a key and returns its value."""
    value = section.get(key, default)
    if key in section:
        del section[key]
    return value


def _check_modules(config):
    """Checks the modules that it names for model and preprocessing; ours are always used."""
    name = _take(config, "model_name", MODEL_NAME)
    if name != MODEL_NAME:
        raise ValueError(f"config.model_name is {name!r}; expected {MODEL_NAME!r}, the only one here.")
    if unknown := [m for m in _take(config, "pp_modules", ()) if m not in PP_MODULES]:
        raise ValueError(
            f"config.pp_modules names {unknown[0]!r}, whose ops aren't here: take them out of the pp strings, "
            "and the module out of the list."
        )


def _translate_model(config):
    for part, idle in _IDLE.items():
        section = config.get("model", {}).get(part) or {}
        for key, values in idle.items():
            if key in section and section[key] in values:
                del section[key]
        if dtype := _take(section, "dtype_mm", None):
            section["dtype"] = dtype
    init = config.get("model_init")
    if isinstance(init, str) and (match := _SHORT_NAME.fullmatch(init)):
        if match["second"] and not match[4]:
            init += ".bf16"
        config.model_init = os.path.join(os.environ.get("BV_GEMMA_DIR", "$BV_GEMMA_DIR"), f"{init}.npz")


def _translate_input(config):
    """Takes what its pp strings say and our configs have keys for, and drops tf.data's settings."""
    section = config.get("input")
    if section is None:
        return
    if prefetch := _take(config, "prefetch_to_device", None):
        section.prefetch = prefetch
    if _take(section, "skip_errors", False):
        section.on_error = "skip"
    # A text that is cut loses its EOS. big_vision never checks for that; here it is counted.
    if "allow_missing_eos" not in section:
        section.allow_missing_eos = True
    names = () if isinstance((section.get("data") or {}).get("name"), str) else section.get("data") or ()
    strings = [section.get("pp"), *(section[n].get("pp") for n in names if n in section)]
    calls = [registry.parse_call(op) for pp in strings if isinstance(pp, str) for op in registry.split(pp)]
    for name, args, kw in calls:
        if name == "tolen" and kw.get("key") == "text" and "text_len" not in config:
            config.text_len = (args[0] if args else kw["length"]) - 1  # the last token is only predicted
        if name == "tok" and "tokenizer" not in config:
            config.tokenizer = args[0] if args else kw["model"]


def _translate_rules(config):
    """Schedules and sharding, whose names differ slightly."""
    if schedule := config.get("schedule"):
        is_list = isinstance(schedule, list | tuple)
        config.schedule = [(regex, _schedule(s)) for regex, s in schedule] if is_list else _schedule(schedule)
    if strategy := config.get("sharding_strategy"):
        # Its names begin with params/ or opt/; here the optimizer's state is sharded like its parameter.
        config.sharding_strategy = [
            (regex.removeprefix("params/"), how) for regex, how in strategy if not regex.startswith("opt/")
        ]


def _schedule(schedule):
    if schedule is None:
        return None
    out = dict(schedule)
    if out.get("decay_type") == "stair" and not out.get("steps"):  # stairs without steps
        out.pop("steps", None)
        out.pop("mults", None)
        out["decay_type"] = "constant"
    return out


def _drop_arguments(config, known):
    """Drops keys that nothing reads: its files' `parse_arg` puts their arguments into the config. A key that
    looks misspelt stays, and is then refused."""
    left_out = [k for k in config if k not in known and not difflib.get_close_matches(k, known, n=1, cutoff=0.9)]
    for key in left_out:
        del config[key]
    if not left_out:
        return []
    return [f"Not read here, arguments of big_vision's file most likely: {', '.join(f'config.{k}' for k in left_out)}."]
