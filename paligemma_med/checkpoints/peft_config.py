"""PEFT's adapter_config.json: which of its fields are read, which are refused, and what is written.

Fields and their meaning are PEFT's (peft/tuners/lora/config.py). PEFT ignores unknown fields; here a field that would
change what the adapter computes, and that the model can't represent, is refused.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

from absl import logging

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import families
from paligemma_med.models import lora_targets, regexes
from paligemma_med.models.layers import lora
from paligemma_med.pp import json_text

FILE = "adapter_config.json"

_MOST_NAMES = 10_000  # of one field: each is compared with each module, of which there are some hundred
_ALL_LINEAR = "all-linear"
_ENDS_IN = r"(.*\.)?({})$"  # how keys of rank_pattern and alpha_pattern match

# Fields that don't affect what a trained adapter computes; merge_weights is PEFT 0.2's.
_IDLE = frozenset(
    """
    auto_mapping base_model_name_or_path revision inference_mode task_type peft_version
    runtime_config megatron_config megatron_core merge_weights ensure_weight_tying qalora_group_size
    loftq_config eva_config corda_config lora_ga_config
    """.split()
)
# Fields that are read here.
_READ = frozenset(
    """
    peft_type r lora_alpha lora_dropout use_rslora rank_pattern alpha_pattern target_modules
    exclude_modules bias init_lora_weights
    """.split()
)
# Initialisations that change the base's weights.
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")


def read(path: str) -> dict[str, Any]:
    """The fields of an adapter_config.json, checked.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it isn't LoRA's, or our model can't represent it.
    """
    try:
        config = json_text.read(path, "an object of PEFT's settings", root=dict, error=CheckpointError)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} is missing: expected a PEFT adapter's folder") from None

    def refuse(key, expected):
        raise CheckpointError(f"{path}: {key} is {config.get(key)!r}; expected {expected}")

    if config.get("peft_type") != "LORA":
        refuse("peft_type", "'LORA', no other kind is known here")
    if config.get("modules_to_save"):
        refuse(
            "modules_to_save",
            "none: beside LoRA's factors the adapter holds other weights of these modules; merge it into its base in "
            "PyTorch (merge_and_unload, then save_pretrained) and give the folder made as weights, or train without "
            "modules_to_save",
        )
    for key, value in config.items():
        if key not in _IDLE | _READ and value not in (None, False, [], {}, ""):
            refuse(key, "none: the model here has nothing like it")
    if config.get("bias", "none") != "none":
        refuse("bias", "'none': biases aren't trained here")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        refuse(
            "init_lora_weights",
            "one that leaves the base as it is; PEFT converts such adapters in save_pretrained("
            "…, path_initial_model_for_weight_conversion=…)",
        )
    _check_values(path, config, refuse)
    return config


def _check_values(path, config, refuse):
    if not _is_whole(config.get("r")):
        refuse("r", "a whole number, 1 or more")
    for key in ("lora_alpha", "lora_dropout"):
        if not _is_number(config.get(key, 0)):
            refuse(key, "a number")
    if not isinstance(config.get("use_rslora") or False, bool):
        refuse("use_rslora", "true or false")
    for key, check in (("rank_pattern", _is_whole), ("alpha_pattern", _is_number)):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(check, pattern.values())):
            refuse(key, "an object of numbers")
        _check_number(path, key, pattern)
        for regex in pattern:
            _check_regex(path, key, _ENDS_IN.format(regex))
    for key in ("target_modules", "exclude_modules"):
        names = config.get(key)
        if isinstance(names, str):
            _check_regex(path, key, names)
        elif names and not (isinstance(names, list) and all(isinstance(n, str) for n in names)):
            refuse(key, "a list of names or a regex")
        else:
            _check_number(path, key, names or ())
    if not config.get("target_modules"):
        refuse("target_modules", "a list of names or a regex")


def _is_number(x):
    return isinstance(x, int | float) and not isinstance(x, bool)


def _is_whole(x):
    return isinstance(x, int) and not isinstance(x, bool) and x > 0


def _check_number(path, key, entries):
    if len(entries) > _MOST_NAMES:
        raise CheckpointError(f"{path}: {key} has {len(entries):,} entries; expected {_MOST_NAMES:,} at most")


def _check_regex(path, key, regex):
    try:
        regexes.compile(regex)
    except ValueError as e:
        raise CheckpointError(f"{path}: {key} {regex!r:.100} {e}") from None


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module `name` (peft/tuners/tuners_utils.py).

    A string is a regex for the whole name; an entry of a list is the name or its end from a dot on.
    """

    def among(names):
        if isinstance(names, str):
            return regexes.fullmatch(names, name)
        return any(name == n or name.endswith(f".{n}") for n in names or ())

    wanted = config["target_modules"]
    if isinstance(wanted, str) and wanted.lower() == _ALL_LINEAR:
        wanted = ".*"
    return among(wanted) and not among(config.get("exclude_modules"))


def by_pattern(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """PEFT's rule: the first key that matches the name's end from a dot on."""
    for regex, value in (pattern or {}).items():
        if regexes.fullmatch(_ENDS_IN.format(regex), name):
            return value
    return default


# --- writing -----------------------------------------------------------------------------------


def make(
    specs: Mapping[lora_targets.Target, lora.Spec], base_model: str | None, family: families.Family
) -> dict[str, Any]:
    """The fields of the adapter_config.json of an adapter.

    PEFT has one dropout for all modules: of different ones the most common is written, with a warning. It has rslora
    for all or none: the minority's alpha is changed so that their scale stays the same.

    Args:
      specs: how each projection is adapted.
      base_model: for base_model_name_or_path.
      family: gives the modules' names.
    """
    rslora = _commonest([s.rslora for s in specs.values()])
    dropout = _commonest([s.dropout for s in specs.values()])
    if others := sorted({s.dropout for s in specs.values()} - {dropout}):
        logging.warning(
            "PEFT has one dropout for all modules: %s is written; some of the adapter's have %s.",
            dropout,
            others,
        )
    ranks = {t: s.rank for t, s in specs.items()}
    alphas = {t: _alpha(s, rslora) for t, s in specs.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    end_of = _ends(family)
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM" if family.EMBEDDING else None,  # a tower by itself generates nothing
        base_model_name_or_path=base_model,
        inference_mode=True,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_rslora=rslora,
        rank_pattern={end_of[t]: r for t, r in ranks.items() if r != rank},
        alpha_pattern={end_of[t]: a for t, a in alphas.items() if a != alpha},
        target_modules=rf"(.*\.)?({'|'.join(end_of[t] for t in specs)})",
        bias="none",
        fan_in_fan_out=False,
        init_lora_weights=True,
    )


def _commonest(values):
    return collections.Counter(values).most_common(1)[0][0]


def _alpha(spec, rslora):
    """The alpha that gives the spec's scale with or without rslora; a whole number as int."""
    alpha = spec.alpha
    if spec.rslora != rslora:
        alpha = spec.scale * (math.sqrt(spec.rank) if rslora else spec.rank)
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _ends(family):
    r"""{target: regex of the end of its module's name, in every style and for each layer}.

    It begins after a dot in each name, as older PEFT requires. Where modules of two parts would match otherwise, the
    part's name is put in front: "layers.0.self_attn.q_proj" ends like "encoder.layers.0.self_attn.q_proj".
    """
    modules = {target: module.partition(".")[::2] for target, module in families.modules_of(family).items()}
    names = {}  # {part: last words of its names in the styles}
    for part, rest in modules.values():
        if any(other.endswith(f".{rest}") for other_part, other in modules.values() if other_part != part):
            names[part] = sorted({style[part].rpartition(".")[2] for style in family.STYLES.values()})
    ends = {}
    for target, (part, rest) in modules.items():
        if hasattr(family, "in_style"):
            styled = {families.in_style(family, f"{part}.{rest}", style) for style in family.STYLES}
            rests = sorted(name.partition(".")[2] for name in styled)
        else:
            rests = [rest]
        rests = [re.escape(rest).replace(re.escape("{i}"), r"\d+") for rest in rests]
        rest = rests[0] if len(rests) == 1 else f"({'|'.join(rests)})"
        ends[target] = rf"({'|'.join(names[part])})\.{rest}" if part in names else rest
    return ends
