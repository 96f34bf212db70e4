"""Checks of a config's values that need nothing but the config.

A wrong value would otherwise fail later with an unrelated message: a text instead of a number in the
middle of tracing, a misspelt key of a tower as a missing argument. Each mistake is reported in one
sentence that names the key, what was found and what was expected.
"""

import difflib
import re
import sys
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import ml_collections

from paligemma_med import checkpoints, quantise
from paligemma_med.config import big_vision, durations, eval_names
from paligemma_med.models import connector, decoder, parts, projector, splice, vit
from paligemma_med.models import loss as losses
from paligemma_med.models.layers import attention, norms

# Keys of a config. An unknown key is usually a typo, and is refused.
KEYS = frozenset(
    """
    seed res text_len tokenizer
    model model_init base allow_nonfinite resample_posemb lora adapter_init dtype frozen_dtype attn_impl
    input total_steps total_epochs total_examples
    optax_name optax lr lr_mults wd wd_mults schedule grad_clip_norm grad_accum_steps ema_decay
    label_smoothing loss_norm supervised_len loss_chunk skip_nonfinite compilation_cache
    mesh sharding_strategy sharding_rules
    log_training_steps log_training_epochs log_training_percent
    ckpt_steps ckpt_epochs ckpt_percent keep_ckpt keep_best
    evals predict_pp
    tensorboard wandb peak_tflops notes
    """.split()
)


def check_keys(section, known, where) -> None:
    """Raises ValueError if a mapping has unknown keys; the message suggests the nearest known ones."""
    unknown = sorted(set(section) - set(known))
    if unknown:
        near = [difflib.get_close_matches(key, known, n=1) for key in unknown]
        hint = ", ".join(repr(n[0]) for n in near if n)
        hint = f" (did you mean {hint}?)" if hint else ""
        raise ValueError(f"{where} has unknown keys {unknown}{hint}; known are {', '.join(sorted(known))}.")


def _is_number(x):
    # What float32 holds.
    return isinstance(x, int | float) and not isinstance(x, bool) and abs(x) < 3.4e38


def _is_whole(x):
    # What int32 holds, in which steps and shapes are counted; seeds are larger.
    return isinstance(x, int) and not isinstance(x, bool) and abs(x) < 2**33


def is_mapping(x) -> bool:
    """Whether x is a dict or a ConfigDict."""
    return isinstance(x, Mapping | ml_collections.ConfigDict)


def is_big_visions(section) -> bool:
    """Whether a section of config.evals names one of big_vision's own evaluators (a dotted module,
    "proj.paligemma.transfers.vqa"), which only `paligemma_med.upstream.train` runs."""
    return bool(re.fullmatch(r"\w+(\.\w+)+", str(section.get("type"))))


def _is_float_type(x):
    try:
        return jnp.issubdtype(jnp.dtype(x), jnp.floating)
    except TypeError:
        return False


# Expectations in words, and whether a value meets them.
_POSITIVE_WHOLE = ("a whole number, 1 or more", lambda x: _is_whole(x) and x >= 1)
_POSITIVE = ("a number above 0", lambda x: _is_number(x) and x > 0)
_WHOLE = ("a whole number, 0 or more", lambda x: _is_whole(x) and x >= 0)
_NOT_NEGATIVE = ("a number, 0 or more", lambda x: _is_number(x) and x >= 0)
_SHARE = ("a number from 0 up to below 1", lambda x: _is_number(x) and 0 <= x < 1)
_FLOAT_TYPE = ("a type like 'float32' or 'bfloat16'", _is_float_type)
_FROZEN_TYPE = (
    "a type like 'float32' or 'bfloat16', or one of 'int8' and 'nf4'",
    lambda x: x in quantise.KINDS or _is_float_type(x),
)
_SEED = ("a whole number from 0 up to 2**32 - 1", lambda x: _is_whole(x) and 0 <= x < 2**32)
_TEXT = ("a string", lambda x: isinstance(x, str))
_SECTION = ("a dict", is_mapping)
_YES_NO = ("True or False", lambda x: isinstance(x, bool))


_COLOURS = (
    "three numbers, of red, green and blue",
    lambda x: isinstance(x, list | tuple) and len(x) == 3 and all(map(_is_number, x)),
)
_TEXTS = ("a list of texts", lambda x: isinstance(x, list | tuple) and all(isinstance(t, str) for t in x))


def _one_of(names):
    return " or ".join(map(repr, names)), lambda x: x in names


def _pairs(expected, fits):
    """The rule for a list of (text, value) pairs."""

    def is_pair(x):
        return isinstance(x, list | tuple) and len(x) == 2 and isinstance(x[0], str) and fits(x[1])

    return f"a list of {expected} pairs", lambda x: isinstance(x, list | tuple) and all(map(is_pair, x))


def _either(*rules):
    return " or ".join(expected for expected, _ in rules), lambda x: any(fits(x) for _, fits in rules)


def _is_section_or_none(x):
    return x is None or is_mapping(x)


_PATHS = ("a dict of paths", lambda x: is_mapping(x) and all(isinstance(v, str) for v in x.values()))
_MULTIPLIERS = _pairs("(regex, number)", _is_number)
_SCHEDULE = ("dict(decay_type=…), None to freeze", _is_section_or_none)
_AXES = _pairs("(name, axis, axes or None)", lambda x: x is None or isinstance(x, str) or _TEXTS[1](x))


_CONFIG = {
    "seed": _SEED,
    "res": _POSITIVE_WHOLE,
    "text_len": _POSITIVE_WHOLE,
    "tokenizer": _TEXT,
    "model": _SECTION,
    "model_init": _either(_TEXT, _PATHS),
    "adapter_init": _TEXT,
    "lora": _pairs("(regex, dict(rank=…) or None)", _is_section_or_none),
    "mesh": _pairs("(axis, size)", _is_whole),
    "sharding_strategy": _pairs("(regex, strategy)", lambda x: isinstance(x, str)),
    "sharding_rules": _AXES,
    "lr_mults": _MULTIPLIERS,
    "wd_mults": _MULTIPLIERS,
    "schedule": _either(_SCHEDULE, _pairs("(regex, dict or None)", _is_section_or_none)),
    "compilation_cache": _either(_YES_NO, _TEXT),
    "wandb": _either(_YES_NO, _SECTION),
    "keep_best": ("dict(metric='NAME/METRIC', mode='max')", is_mapping),
    "dtype": _FLOAT_TYPE,
    "frozen_dtype": _FROZEN_TYPE,
    "attn_impl": _one_of(attention.IMPLEMENTATIONS),
    "base": _TEXT,
    "allow_nonfinite": _YES_NO,
    "resample_posemb": _either(_YES_NO, _one_of(["bicubic"])),
    "input": _SECTION,
    **{f"total_{unit}": _POSITIVE for unit in ("steps", "epochs", "examples")},
    "optax_name": _TEXT,
    "optax": _SECTION,
    "lr": _NOT_NEGATIVE,
    "wd": _NOT_NEGATIVE,
    "grad_clip_norm": _POSITIVE,
    "grad_accum_steps": _POSITIVE_WHOLE,
    "label_smoothing": _SHARE,
    "ema_decay": _SHARE,
    "loss_norm": _one_of(losses.NORMS),
    "supervised_len": _POSITIVE_WHOLE,
    "loss_chunk": _POSITIVE_WHOLE,
    "skip_nonfinite": _WHOLE,
    "keep_ckpt": _POSITIVE_WHOLE,
    "tensorboard": _YES_NO,
    "evals": _SECTION,
    "predict_pp": _TEXT,
    "peak_tflops": _POSITIVE,
    "notes": _TEXT,
}
_NEVER_NONE = (
    *("res", "text_len", "tokenizer", "model", "input", "optax_name", "lr"),
    *("data", "batch_size", "type", "pp_fn", "name", "split"),  # of sections
)
_PART = {
    **dict.fromkeys(("variant", "remat_policy", "query_pre_attn_norm"), _TEXT),
    "patch_size": (
        "a whole number, or two of them",
        lambda x: all(_POSITIVE_WHOLE[1](n) for n in (x if isinstance(x, list | tuple) and len(x) == 2 else [x])),
    ),
    "cache_dtype": _FLOAT_TYPE,
    "width": _POSITIVE_WHOLE,
    "depth": _POSITIVE_WHOLE,
    "mlp_dim": _POSITIVE_WHOLE,
    "num_heads": _POSITIVE_WHOLE,
    "num_kv_heads": _POSITIVE_WHOLE,
    "head_dim": _POSITIVE_WHOLE,
    "vocab_size": _POSITIVE_WHOLE,
    "num_classes": _POSITIVE_WHOLE,
    "dropout": _SHARE,
    "scan": _YES_NO,
    "stem": _WHOLE,
    **dict.fromkeys(("cls", "keep_cls", "patch_bias", "key_bias"), _YES_NO),  # of a tower
    **dict.fromkeys(("norm_eps", "pre_norm", "final_norm"), _POSITIVE),
    **dict.fromkeys(("mean", "std"), _COLOURS),
    "gelu": _one_of(vit.GELUS),
    **dict.fromkeys(("post_norms", "fused", "qk_norm", "embed_scale", "embed_norm", "tie"), _YES_NO),  # of a decoder
    **dict.fromkeys(
        ("attn_logits_softcap", "final_logits_softcap"), _NOT_NEGATIVE
    ),  # 0: none, as big_vision's forkme.py has it
    **dict.fromkeys(("rope_theta", "rope_scale", "local_rope_theta"), _POSITIVE),
    **dict.fromkeys(("window", "window_every"), _POSITIVE_WHOLE),
    "norm": _one_of(norms.KINDS),
    "act": _one_of(decoder.ACTIVATIONS),
    "position": _one_of(decoder.POSITIONS),
    "dtype": _FLOAT_TYPE,
    "attn_impl": _one_of(attention.IMPLEMENTATIONS),
}
# Keys that say how the two towers are joined, and those of the connector.
_JOINED = {"connector": _SECTION, "image_ar": _one_of(splice.IMAGE_AR)}
_CONNECTOR = {
    "kind": _one_of(connector.KINDS),
    "reduce": _one_of(projector.REDUCTIONS),
    **dict.fromkeys(("norm", "bias"), _YES_NO),
    **dict.fromkeys(("factor", "hidden", "queries", "inner", "depth", "mlp_dim", "num_heads"), _POSITIVE_WHOLE),
}


def _are_tokens(x):
    return len(x) > 0 and all(_is_whole(n) and n >= 0 for n in x)


_PRED_KW = {
    "max_new_tokens": _POSITIVE_WHOLE,
    "num_samples": _POSITIVE_WHOLE,
    "temperature": _NOT_NEGATIVE,
    "top_p": ("a number above 0, up to 1", lambda x: _is_number(x) and 0 < x <= 1),
    "seed": _SEED,
    "eos_token": ("a token's number, or several", lambda x: _are_tokens(x if isinstance(x, list | tuple) else [x])),
}
# Keys of an evals section that say when it runs, not what.
WHEN = (*(f"log_{unit}" for unit in durations.UNITS), "skip_first")
# Keys that are no arguments of the evaluator. ema: whether training gives it the averaged weights.
NOT_ARGUMENTS = (*WHEN, "ema")
_INPUT = {"data": _SECTION, "batch_size": _POSITIVE_WHOLE, "held_out": _SECTION}
_DATA = {"name": _TEXT, "split": _TEXT, "data_dir": _TEXT}
_EVAL = {"type": _TEXT, "data": _SECTION, "pp_fn": _TEXT, "batch_size": _POSITIVE_WHOLE}
# Arguments of evaluators, most of which look further themselves.
_EVAL_MORE = {
    "train_data": _SECTION,
    "train_answer": _TEXT,
    "pred_kw": _SECTION,
    **dict.fromkeys(("skip_first", "ema"), _YES_NO),
    "controls": _TEXTS,
    "groups": _TEXTS,
    "choices": _TEXTS,
    "loss_chunk": _POSITIVE_WHOLE,
    **dict.fromkeys(("protocol", "options", "prompt_pp", "history_pp"), _TEXT),
    **dict.fromkeys(("shuffle_seed", "noise_seed", "dialogue_seed"), _SEED),
}


def _shown(value):
    """A value for messages, on one line."""
    return f"{value.to_dict() if hasattr(value, 'to_dict') else value!r}"[:200]


def _check_values(section, rules, where):
    for key, (expected, fits) in rules.items():
        if key not in section or (section[key] is None and key not in _NEVER_NONE):
            continue
        try:
            good = fits(section[key])
        except TypeError:  # such as a list that is looked up in a dict
            good = False
        if not good:
            raise ValueError(f"{where}.{key} is {_shown(section[key])}; expected {expected}.")


def _check_model(model):
    """Raises ValueError if config.model names an unknown part or gives it an unknown argument."""
    names = {part: f"{part}_model" for part in parts.FAMILIES}
    check_keys(model, (*names, *names.values(), *_JOINED), "config.model")
    _check_values(model, _JOINED, "config.model")
    try:
        kind = connector.kind_of(model.get("connector"))
    except ValueError as e:
        raise ValueError(f"config.model.{e}") from None
    if kind:
        check_keys(model["connector"], connector.keys(kind), "config.model.connector")
        _check_values(model["connector"], _CONNECTOR, "config.model.connector")
    for part, name in names.items():
        try:
            family = parts.family(part, model.get(name))
        except ValueError as e:
            raise ValueError(f"config.{e}") from None
        section, where = model.get(part), f"config.model.{part}"
        if part not in model:
            continue
        if not is_mapping(section):
            raise ValueError(f"{where} is {section!r}; expected a dict.")
        check_keys(section, family.KEYS, where)
        _check_values(section, _PART, where)


def _check_sections(config):
    """Raises ValueError for impossible values, or unknown keys of a section."""
    _check_values(config, _CONFIG, "config")
    if "input" in config:
        _check_values(config.input, _INPUT, "config.input")
    _check_model(config.model)
    for name, section in (config.get("evals") or {}).items():
        eval_names.check(name)
        where = f"config.evals.{name}"
        if not is_mapping(section):
            raise ValueError(f"{where} is {section!r}; expected a dict.")
        if is_big_visions(section):
            continue
        if missing := [key for key in _EVAL if key not in section]:
            raise ValueError(f"{where} lacks {missing}.")
        _check_values(section, {**_EVAL, **_EVAL_MORE}, where)
        if section.get("ema") and not config.get("ema_decay"):
            raise ValueError(f"{where}.ema is True, but config.ema_decay, which makes an average, isn't set.")
        for key in ("data", "train_data"):
            _check_values(section.get(key) or {}, _DATA, f"{where}.{key}")
        if pred_kw := section.get("pred_kw"):
            check_keys(pred_kw, _PRED_KW, f"{where}.pred_kw")
            _check_values(pred_kw, _PRED_KW, f"{where}.pred_kw")


def checked(config) -> ml_collections.ConfigDict:
    """A complete copy of a config that has passed every check that needs no files.

    A big_vision config becomes one of ours, with a note on stderr about what isn't read
    (`big_vision.adopt`). A config with adapter_init and without lora gets the adapter's, since the
    factors only have a meaning with their ranks and scales.

    Raises:
      ValueError: unknown or missing keys, or impossible values.
    """
    config = config.copy_and_resolve_references()
    try:
        notes = big_vision.adopt(config, KEYS)
    except (TypeError, AttributeError, KeyError, IndexError) as e:
        raise ValueError(f"config is of big_vision's kind, but can't be read: {type(e).__name__}: {e}") from e
    for note in notes:
        if jax.process_index() == 0:
            print(note, file=sys.stderr, flush=True)
    check_keys(config, KEYS, "config")
    if missing := [k for k in ("model", "res", "text_len", "tokenizer") if k not in config]:
        raise ValueError(f"config lacks {missing}.")
    _check_sections(config)
    if config.get("adapter_init") and not config.get("lora"):
        with config.unlocked():
            config.lora = checkpoints.rules_of(load_adapter(config))
    return config


def load_adapter(config) -> checkpoints.Adapter:
    """The adapter of config.adapter_init."""
    return checkpoints.load_adapter(config.adapter_init, allow_nonfinite=config.get("allow_nonfinite") or False)


def checked_for_training(config) -> ml_collections.ConfigDict:
    """`checked`, plus what only training needs."""
    config = checked(config)
    if missing := [k for k in ("input", "optax_name", "lr") if k not in config]:
        raise ValueError(f"config lacks {missing}, which training needs.")
    if missing := [k for k in ("data", "batch_size") if k not in config.input]:
        raise ValueError(f"config.input lacks {missing}, found {sorted(config.input)}.")
    size, accum = config.input.batch_size, config.get("grad_accum_steps") or 1
    if size % accum:
        raise ValueError(f"config.input.batch_size = {size} doesn't divide by config.grad_accum_steps = {accum}.")
    return config
