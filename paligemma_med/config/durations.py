"""Durations in a config: `total_epochs=5`, `warmup_percent=0.05`, `ckpt_steps=100`, … → steps."""

import math

UNITS = ("steps", "epochs", "examples", "percent")


def to_steps(config, name, *, num_examples, batch_size, total_steps=None, default=None) -> int | None:
    """The duration `name` of `config` in steps, read like big_vision's `utils.steps`.

    Args:
      config: mapping with at most one of NAME_steps, NAME_epochs, NAME_examples, NAME_percent
        (percent is a fraction of training: 0.1 is a tenth).
      num_examples: in one epoch of the training data.
      total_steps: needed for percent.
      default: what to return if none is given.

    Returns:
      int, rounded, at least 1 unless the config says 0; or `default`.
    """
    given = {u: config[f"{name}_{u}"] for u in UNITS if config.get(f"{name}_{u}") is not None}
    if len(given) > 1:
        raise ValueError(f"Only one of {[f'{name}_{u}' for u in given]} may be set.")
    if not given:
        return default
    unit, value = next(iter(given.items()))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name}_{unit} is {value!r}; expected a number, zero or more.")
    if unit == "steps":
        if value != int(value):
            raise ValueError(f"{name}_{unit} is {value!r}; expected a whole number.")
        return _in_range(int(value), name, unit, value)
    if unit == "percent" and total_steps is None:
        raise ValueError(f"{name}_percent can't be used here: the total is not known yet.")
    factor = {
        "epochs": num_examples / batch_size,
        "examples": 1 / batch_size,
        "percent": total_steps,
    }[unit]
    return _in_range(max(1, round(min(value * factor, 1e30))), name, unit, value) if value else 0


def _in_range(steps, name, unit, value):
    if steps >= 2**31:
        raise ValueError(f"{name}_{unit} is {value!r:.40}, which is too many steps; expected fewer than 2**31.")
    return steps
