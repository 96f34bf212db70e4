"""The optimizer: what is trained, with which schedule, by which optax transformation.

Semantics are big_vision's (big_vision/optax.py): lists of (regex, value) over parameter names, in which
the first full match counts; `schedule` None freezes; weight decay is decoupled and is scaled by the
schedule but not by the learning rate.

Parameters are flat dictionaries here, name → array ("img/head/kernel"), since configs refer to them by
name.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from absl import logging

from paligemma_med.config import durations
from paligemma_med.models import regexes
from paligemma_med.training import ema


def match_names(names, rules, what) -> dict[str, tuple]:
    """Assigns to each name the value of the first rule whose regex matches it fully.

    Args:
      names: parameter names.
      rules: [(regex, value), …].
      what: the rules' name in errors, e.g. "config.schedule".

    Returns:
      {name: (index of the rule, value)}; names that no rule matches are absent.

    Raises:
      ValueError: a regex doesn't compile or matches no name (most likely a typo; only the catch-all ".*"
        may have nothing left to match).
    """
    patterns = []
    for rule in rules:
        if isinstance(rule, str) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(f"{what}: {rule!r} is no (regex, value) pair.")
        regex, value = rule
        try:
            patterns.append((regexes.compile(regex), value))
        except ValueError as e:
            raise ValueError(f"{what}: {regex!r:.100} {e}.") from None
    out = {}
    for name in names:
        for i, (pattern, value) in enumerate(patterns):
            if pattern.fullmatch(name):
                out[name] = (i, value)
                break
    for pattern, _ in patterns:
        if pattern.pattern != ".*" and not any(pattern.fullmatch(n) for n in names):
            raise ValueError(
                f"{what}: {pattern.pattern!r} matches no parameter; names look like {', '.join(sorted(names)[:3])}, …"
            )
    return out


def schedule_rules(config) -> list:
    """config.schedule as [(regex, dict or None), …]; a single dict is for all parameters."""
    schedule = config.get("schedule", dict(decay_type="constant"))
    rules = schedule if isinstance(schedule, list | tuple) else [(".*", schedule)]
    for rule in rules:
        if isinstance(rule, list | tuple) and len(rule) != 2:
            continue  # `match_names` reports it
        value = rule[1] if isinstance(rule, list | tuple) else rule
        if value is not None and not hasattr(value, "keys"):
            raise ValueError(
                f"config.schedule has {value!r}; expected dict(decay_type=…), or None to freeze, "
                "for all parameters or in (regex, …) pairs."
            )
    return rules


def trained_names(config, names) -> list[str]:
    """The names that config.schedule doesn't freeze, in the order given.

    Raises:
      ValueError: no rule covers a name, since configs must say whether it is trained; or no name is trained.
    """
    matched = match_names(names, schedule_rules(config), "config.schedule")
    if missing := [n for n in names if n not in matched]:
        raise ValueError(
            f"config.schedule says nothing about {len(missing)} parameters, the first of which is "
            f"{missing[0]!r}: end it with ('.*', None) to freeze what is left."
        )
    _check_order(names, matched, schedule_rules(config))
    trained = [n for n in names if matched[n][1] is not None]
    if not trained:
        raise ValueError("config.schedule freezes every parameter: there is nothing to train.")
    return trained


def _check_order(names, matched, rules):
    """Raises ValueError for a rule that should train leaves, but whose leaves all match an earlier rule."""
    first = {i for i, _ in matched.values()}
    for i, (regex, value) in enumerate(rules):
        if value is not None and i not in first and regex != ".*":
            name = next(n for n in names if regexes.fullmatch(regex, n))
            before = rules[matched[name][0]][0]
            raise ValueError(
                f"config.schedule: {regex!r} comes too late, since {before!r} before it decides about {name!r} "
                "already, and the first that fits counts: put it before."
            )


def make_schedule(schedule, *, total_steps, num_examples, batch_size) -> Callable:
    """The factor on the learning rate as a function of the step.

    Args:
      schedule: dict(decay_type="constant" | "cosine" | "linear", warmup_{steps,epochs,…}, warmup_start, linear_end,
        cosine_end, hold_{steps,epochs,…}): warmup is linear from warmup_start, and the decay ends at its `end`, by
        default all 0. With `hold` the decay takes a step each time that passes, and is counted from step 0 and not
        from the end of the warmup, as LAVIS' cosine by epochs is (its optims.py): the last value is above `end`.

    Returns:
      step → float32[].
    """
    schedule = dict(schedule)
    kind = schedule.pop("decay_type", "constant")
    start = _share(schedule, "warmup_start")
    # big_vision lets configs give linear_end with any decay.
    ends = {name: _share(schedule, f"{name}_end") for name in ("linear", "cosine")}
    kw = dict(num_examples=num_examples, batch_size=batch_size, total_steps=total_steps, default=0)
    warmup, hold = (durations.to_steps(schedule, name, **kw) for name in ("warmup", "hold"))
    if unknown := sorted(set(schedule) - {f"{name}_{u}" for name in ("warmup", "hold") for u in durations.UNITS}):
        raise ValueError(f"config.schedule: unknown keys {unknown}.")
    if kind not in ("constant", "cosine", "linear"):
        raise ValueError(f"config.schedule: decay_type is {kind!r}; expected 'constant', 'cosine' or 'linear'.")
    end = ends.get(kind, 0.0)
    if total_steps > 1 and warmup >= total_steps:
        raise ValueError(f"config.schedule: warmup of {warmup} steps in {total_steps} steps.")

    def factor(step):
        if hold:
            progress = jnp.clip(step // hold * hold / total_steps, 0.0, 1.0)
        else:
            progress = jnp.clip((step - warmup) / max(total_steps - warmup, 1), 0.0, 1.0)
        left = {
            "constant": jnp.ones_like(progress),
            "cosine": 0.5 * (1.0 + jnp.cos(jnp.pi * progress)),
            "linear": 1.0 - progress,
        }[kind]
        value = end + (1.0 - end) * left
        if warmup:
            value = value * (start + (1.0 - start) * jnp.minimum(1.0, step / warmup))
        return jnp.asarray(value, jnp.float32)

    return factor


def _share(schedule, key):
    """Takes a share of the learning rate, by default 0, out of a schedule."""
    value = schedule.pop(key, 0.0)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"config.schedule: {key} is {value!r}; expected a share of the learning rate, 0 to 1.")
    return value


def _make_tx(name, kw):
    """optax.NAME(**kw)"""
    factory = getattr(optax, name, None)
    if name.startswith("_") or not callable(factory):
        raise ValueError(f"optax_name is {name!r}; expected a transformation in optax, like 'scale_by_adam'.")
    try:
        return factory(**kw)
    except TypeError as e:
        raise ValueError(f"optax_name {name!r} doesn't take config.optax {dict(kw)}: {e}.") from e


# What weight decay acts on by default (config.wd_mults): big_vision's kernels, and adapters of kernels.
DECAYED = r".*/(kernel|lora_[ab])"


def _multipliers(config, key, names):
    """{name: number} by config.lr_mults or config.wd_mults; names that no rule matches are absent."""
    rules = config.get(key) or []
    matched = match_names(names, rules, f"config.{key}")
    for rule in rules:
        if isinstance(rule[1], bool) or not isinstance(rule[1], int | float):
            raise ValueError(f"config.{key}: {rule[0]!r} has {rule[1]!r}; expected a number.")
    return {name: value for name, (_, value) in matched.items()}


def _decays(config, names, all_names):
    """{name: weight decay} of the trained parameters that have any."""
    wd = config.get("wd") or 0.0
    if config.get("wd_mults") is None:
        mults = {n: 1.0 for n in names if re.fullmatch(DECAYED, n)}
    else:
        mults = _multipliers(config, "wd_mults", all_names)
    if not wd:
        return {}
    decays = {n: wd * mults[n] for n in names if mults.get(n)}
    if not decays:
        logging.warning("config.wd = %g decays none of the trained parameters: config.wd_mults says which.", wd)
    return decays


def make(
    config, names, *, total_steps, num_examples, batch_size, all_names=None
) -> tuple[optax.GradientTransformation, Callable]:
    """The transformation for the trained parameters, and the first schedule for logging.

    Args:
      config: optax_name, optax, lr, lr_mults, wd, wd_mults, schedule, grad_clip_norm, ema_decay. By default wd acts on
        kernels and on the factors that adapt one.
      names: names of the trained parameters (`trained_names`).
      all_names: names of all parameters, including frozen ones, which lr_mults and wd_mults may name.

    Returns:
      (optax.GradientTransformation over {name: array}, step → learning rate float32[]).
    """
    kw = dict(total_steps=total_steps, num_examples=num_examples, batch_size=batch_size)
    rules = [(r, s) for r, s in schedule_rules(config)]
    chosen = match_names(names, [(r, s) for r, s in rules if s is not None], "config.schedule")
    schedules = {}
    for _, (i, schedule) in chosen.items():
        schedules.setdefault(i, make_schedule(schedule, **kw))
    label = {n: chosen[n][0] for n in names}

    all_names = names if all_names is None else all_names
    lr_mults = _multipliers(config, "lr_mults", all_names)
    decays = _decays(config, names, all_names)

    def scale(mult):  # a factor per leaf
        return optax.stateless(lambda g, _: {n: g[n] * mult(n) for n in g})

    def decay(updates, params):
        return {n: u + decays.get(n, 0.0) * params[n] for n, u in updates.items()}

    txs = []
    if clip := config.get("grad_clip_norm"):
        txs.append(optax.clip_by_global_norm(clip))
    txs.append(_make_tx(config.optax_name, config.get("optax", {})))
    txs.append(scale(lambda n: config.lr * lr_mults.get(n, 1.0)))
    if config.get("wd"):  # even if nothing decays: checkpoints name the state's leaves by the links' numbers
        txs.append(optax.stateless(decay))
    txs.append(optax.partition({i: optax.scale_by_schedule(s) for i, s in schedules.items()}, label))
    txs.append(optax.scale(-1.0))
    if decay_of_average := config.get("ema_decay"):
        txs.append(ema.average_params(decay_of_average))
    first = next(iter(schedules.values()), lambda step: jnp.float32(0))
    return optax.chain(*txs), lambda step: config.lr * first(step)


def global_norm(tree) -> jax.Array:
    """L2 norm over all leaves, float32[]."""
    squares = [jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)]
    return jnp.sqrt(sum(squares, jnp.float32(0)))
