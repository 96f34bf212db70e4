"""Translates our configs into big_vision's: `translate` is the only place that knows the differences.

Most keys are the same. `KEYS` says what becomes of each of our keys, and `INPUT_KEYS` of the keys of
config.input.
"""

import dataclasses
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from paligemma_med import quantise, upstream
from paligemma_med.config import durations
from paligemma_med.config import values as config_values
from paligemma_med.models.layers import lora
from paligemma_med.parallel import sharding
from paligemma_med.training import optim

PP_MODULES = ("ops_general", "ops_image", "ops_text", "proj.paligemma.ops", upstream.NAME)
# Ours shuffles a whole epoch. The encoded images of this many rows are held in memory: 0.5 GB of SLAKE.
SHUFFLE_BUFFER = 10_000


class Key(NamedTuple):
    """What becomes of a key.

    Attributes:
      what: "same": read as here. "kept": not read there, but needed to translate back. "translated":
        by this file. "launched": handled by `upstream.train`. "left out": with the note `why` unless
        the value is idle. "ignored": left out without a note. "refused" unless the value is idle.
      why: how it is translated, or the end of a sentence about big_vision's trainer.
      idle: values without an effect.
    """

    what: str
    why: str = ""
    idle: tuple[Any, ...] = (None,)


_SAME = Key("same")
_KEPT = Key("kept", "stated in pp strings, which are what is read there")
_METRICS = Key("left out", "writes big_vision_metrics.txt alone", (None, False))

KEYS = {
    "seed": _SAME,
    "res": _KEPT,
    "text_len": _KEPT,
    "tokenizer": Key("kept", "stated in pp strings, and given to the evaluators"),
    "predict_pp": Key("kept", "for `predict` on what was trained there"),
    # The model and its weights.
    "model": Key("translated", "also holds dtype, attn_impl and lora"),
    "dtype": Key("translated", "model.dtype"),
    "attn_impl": Key("translated", "model.attn_impl"),
    "lora": Key("translated", "model.lora, pairs in place of dicts"),
    "model_init": Key("same", "any form of weights: our `load` opens it"),
    "resample_posemb": Key("translated", "model_load.resample_posemb"),
    "base": Key("translated", "model_load.base"),
    "allow_nonfinite": Key("translated", "model_load.allow_nonfinite"),
    "adapter_init": Key("translated", "model_load.adapter_init"),
    "frozen_dtype": Key("translated", "model_load.frozen_dtype: of leaves that model_init gives"),
    # Data.
    "input": Key("translated", "see INPUT_KEYS"),
    "total_steps": _SAME,
    "total_epochs": _SAME,
    "total_examples": _SAME,
    # The step.
    "optax_name": _SAME,
    "optax": _SAME,
    "lr": _SAME,
    "lr_mults": _SAME,
    "wd": _SAME,
    "wd_mults": _SAME,
    "schedule": Key("translated", "decay_type='constant' is called 'stair' there"),
    "grad_clip_norm": _SAME,
    "grad_accum_steps": Key("left out", "takes the batch whole: the same step, with more memory", (None, 1)),
    "label_smoothing": _SAME,
    "ema_decay": Key("refused", "keeps no average of the weights", (None, 0)),
    "loss_norm": Key("refused", "has the mean over examples alone (loss_norm='example')", (None, "example")),
    "supervised_len": Key("left out", "computes logits at every position: the same loss, slower"),
    "loss_chunk": Key("left out", "computes logits of a batch at once: the same loss, more memory"),
    "skip_nonfinite": Key("refused", "ends at the first loss that isn't finite", (None, 0)),
    "compilation_cache": Key("launched", "JAX's own setting"),
    # Devices.
    "mesh": _SAME,
    "sharding_strategy": Key("translated", "names there begin with params/ or opt/"),
    "sharding_rules": Key("launched", "the model is run under our own rules"),
    # When.
    **{f"log_training_{u}": _SAME for u in ("steps", "epochs", "percent")},
    **{f"ckpt_{u}": Key("same", "saved after the first step, too") for u in ("steps", "epochs", "percent")},
    "keep_ckpt": Key("left out", "keeps the newest, and those of keep_ckpt_steps", (None, 1, 2)),
    "keep_best": Key("refused", "doesn't choose among checkpoints"),
    "evals": Key("translated", "type='paligemma_med', our section whole under `section`"),
    # Monitoring.
    "tensorboard": _METRICS,
    "wandb": _METRICS,
    "peak_tflops": Key("left out", "tells no MFU"),
    "notes": Key("ignored", "says nothing at its start"),
}

INPUT_KEYS = {
    "data": _SAME,
    "pp": Key("translated", "in a mixture, that of each set"),
    "batch_size": _SAME,
    "anneal": Key("refused", "mixes in constant shares; the config's argument anneal=False has them so"),
    "held_out": Key("refused", "doesn't compare images"),
    "num_workers": Key("ignored", "reads with TensorFlow's threads"),
    "num_threads": Key("ignored", "reads with TensorFlow's threads"),
    "prefetch": Key("translated", "prefetch_to_device"),
    "allow_missing_eos": Key("ignored", "never looks for the EOS"),
    "on_error": Key("translated", "'skip' is skip_errors=True"),
    # big_vision's own keys, without a meaning here.
    "shuffle_buffer_size": Key("same", "10,000 by default: without it nothing is shuffled"),
    "cache_raw": _SAME,
    "num_parallel_calls": _SAME,
    "tfdata": _SAME,
}
# Keys that a mixture has for each of its sets, not once for all.
_OF_A_SET = ("pp", "shuffle_buffer_size", "cache_raw", "num_parallel_calls", "tfdata")


def translate(config, *, note=print) -> ConfigDict:
    """Our config in the form that big_vision's trainer reads.

    Args:
      config: ConfigDict of one of our config files, with flags applied.
      note: called with a sentence for each thing that its trainer does differently.

    Returns:
      A new ConfigDict; `config` isn't changed. Each of `evals` becomes
      dict(type="paligemma_med", pred="logits", section=<ours>, tokenizer=config.tokenizer,
      name=<its name>, batch_size=…, log_…=…, skip_first=True), the arguments of
      `upstream.evaluators.Evaluator`; one with a dot in its type is big_vision's own
      ("proj.paligemma.transfers.vqa") and stays as it is.

    Raises:
      ValueError: a key is unknown, or asks for something that its trainer can't do.
    """
    config = config.copy_and_resolve_references()
    if config.get("frozen_dtype") in quantise.KINDS:
        raise ValueError(
            f"config.frozen_dtype is {config.frozen_dtype!r}, but big_vision's trainer knows no "
            "quantised weights: set it to 'bfloat16'."
        )
    if others := sorted({"connector", "image_ar"} & {*config.get("model", ())}):
        raise ValueError(
            f"config.model has {' and '.join(others)}, but big_vision's trainer has PaliGemma alone: use "
            "paligemma_med.train."
        )
    out = _pick(config, KEYS, "config", note)
    out["model_name"] = upstream.NAME
    out["pp_modules"] = PP_MODULES
    out["model"] = _model(config)
    if config.get("model_init"):
        out["model_load"] = _model_load(config)
    elif config.get("adapter_init"):
        raise ValueError(
            f"config.adapter_init is {config.adapter_init!r}, but big_vision's trainer loads "
            "nothing without a model_init."
        )
    elif (frozen := config.get("frozen_dtype") or "float32") != "float32":
        note(f"config.frozen_dtype = {frozen}: random weights are float32 there.")
    out["input"] = _input(config.input, note)
    if config.input.get("prefetch") is not None:
        out["prefetch_to_device"] = config.input.prefetch
    if "schedule" in config:
        out["schedule"] = _schedule(config)
    if config.get("wd") and config.get("lora") and config.get("wd_mults") is None:
        out["wd_mults"] = [(optim.DECAYED, 1.0)]  # its own default leaves out adapters
    if config.get("sharding_strategy"):
        out["sharding_strategy"] = [
            (f"(?:.*/)?(?:{regex})", _strategy(text)) for regex, text in config.sharding_strategy
        ]
    if not _says(config, "log_training"):
        out["log_training_steps"] = 50
    if not _says(config, "ckpt"):
        out["ckpt_percent"] = 1.0
    evals = config.get("evals") or {}
    out["evals"] = {name: _eval(name, section, config) for name, section in evals.items()}
    return ConfigDict(out)


def _pick(section, keys, where, note):
    """{key: value} of what passes unchanged; notes or refuses the others."""
    config_values.check_keys(section, keys, where)
    out = {}
    for name, value in section.items():
        key = keys[name]
        if key.what in ("same", "kept") and value is not None:
            out[name] = value
        elif value in key.idle:
            continue
        elif key.what == "left out":
            note(f"{where}.{name} = {value}: big_vision's trainer {key.why}.")
        elif key.what == "refused":
            shown = dict(value) if config_values.is_mapping(value) else value
            raise ValueError(f"{where}.{name} is {shown!r}, but big_vision's trainer {key.why}.")
    return out


def _says(config, name):
    """Whether one of NAME_steps, NAME_epochs, … is given."""
    return any(config.get(f"{name}_{unit}") is not None for unit in durations.UNITS)


def _model(config):
    # The model gets a frozen config, which can't hold a dict within a tuple.
    rules = lora.as_rules(config.get("lora") or ())
    return dict(
        config.model.to_dict(),
        dtype=config.get("dtype", "float32"),
        attn_impl=config.get("attn_impl", "xla"),
        lora=tuple((r, s and tuple(dataclasses.asdict(s).items())) for r, s in rules),
    )


def _model_load(config):
    trained = [(regex, rule is not None) for regex, rule in optim.schedule_rules(config)]
    return dict(
        resample_posemb=bool(config.get("resample_posemb")),
        base=config.get("base") or "",
        allow_nonfinite=bool(config.get("allow_nonfinite")),
        adapter_init=config.get("adapter_init") or "",
        frozen_dtype=config.get("frozen_dtype") or "float32",
        trained=trained,
    )


def _input(section, note):
    names = () if isinstance(section.data.get("name"), str) else tuple(section.data)
    plain = {k: v for k, v in section.items() if k not in names}
    out = _pick(plain, INPUT_KEYS, "config.input", note)
    out.setdefault("shuffle_buffer_size", SHUFFLE_BUFFER)
    if section.get("pp"):
        out["pp"] = section.pp
    if section.get("on_error") == "skip":
        out["skip_errors"] = True
    if not names:
        return out
    shared = {k: out.pop(k) for k in (*_OF_A_SET, "skip_errors") if k in out}
    return out | {name: {**shared, **section[name]} for name in names}


def _schedule(config):
    """Both forms: a dict, or [(regex, dict or None), …]."""

    def one(schedule):
        if schedule is None:
            return None
        schedule = dict(schedule)
        if schedule.get("decay_type", "constant") == "constant":
            schedule["decay_type"] = "stair"  # a stair without steps is constant
        return schedule

    rules = config.schedule
    if isinstance(rules, list | tuple):
        return [(regex, one(schedule)) for regex, schedule in rules]
    return one(rules)


def _strategy(text):
    """One of our strategies in big_vision's form, in which fsdp must name its axis."""
    out = []
    for name, kw in sharding.parse_strategy(text):
        if name == "tp":
            raise ValueError(
                f"config.sharding_strategy has {text!r}, but big_vision's trainer knows replicate, "
                "fsdp and shard_dim alone."
            )
        if name == "fsdp":
            kw = {"axis": sharding.DATA_AXIS, **kw}
        out.append(f"{name}({', '.join(f'{k}={v!r}' for k, v in kw.items())})")
    return "|".join(out)


def _eval(name, section, config):
    if config_values.is_big_visions(section):
        return section
    when = {k: section[k] for k in config_values.WHEN if section.get(k) is not None}
    if not _says(when, "log"):
        when["log_percent"] = 1.0  # at the end, as here
    return {
        "type": upstream.NAME,
        "pred": "logits",
        "name": name,
        "section": {k: v for k, v in section.to_dict().items() if k not in config_values.NOT_ARGUMENTS},
        "tokenizer": config.tokenizer,
        "batch_size": section.batch_size,
        "skip_first": True,
        **when,
    }
