"""Converts one of our runs to the state that big_vision's trainer would have saved, to resume it there.

This needs neither big_vision nor TensorFlow. Its trainer restores three things
(trainers/proj/paligemma/train.py, "Init and/or load model"): `params`, `opt` (the state of the
chain that big_vision/optax.py, `make`, builds) and `chrono` (utils.py, `Chrono`).
"""

import jax
import numpy as np
import optax

from paligemma_med import weights
from paligemma_med.checkpoints import bv, lazy, workdir
from paligemma_med.config import files as config_files
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.setup import TrainingSetup
from paligemma_med.upstream import config as configs


def train_state(spec, **reading) -> tuple[int, dict]:
    """A run's newest checkpoint, or the one at a given step, as a big_vision checkpoint.

    Args:
      spec: a workdir of this project, or "workdir@step".
      **reading: base, allow_nonfinite as in `checkpoints.open_params`; by default the config's.

    Returns:
      (step, {"params": …, "opt": …, "chrono": …}) for `bv.save_bv`. step is the optimizer's, which
      doesn't count steps that skip_nonfinite skipped. Parameters have the types they are trained in;
      the base's are still in their files.

    Raises:
      ValueError: a config that big_vision's trainer can't run; CheckpointError: a damaged run.
    """
    folder, _ = workdir.split_spec(spec)
    config = config_files.from_json(workdir.read_config(folder))
    theirs = configs.translate(config, note=lambda _: None)
    setup = TrainingSetup.without_data(config)
    expected = jax.eval_shape(setup.tx.init, {n: setup.abstract[n] for n in setup.trained_names})
    opt_state = workdir.load_opt_state(spec, expected)

    kw = {**weights.reading(config), **{key: value for key, value in reading.items() if value}}
    params = weights.load_host_params(spec, setup.abstract, leaves=setup.leaves, **kw)
    params = {n: _cast(x, np.dtype(setup.dtypes[n])) for n, x in params.items()}
    step, opt = optimizer_state(config, theirs, opt_state)
    examples = step * config.input.batch_size
    chrono = dict(
        accum_examples_seen=np.int32(min(examples, 2**31 - 1)),
        **{f"accum_{what}_time": np.float32(0) for what in ("program", "train", "pause")},
    )
    return step, {"params": unflatten_tree(params), "opt": opt, "chrono": chrono}


def optimizer_state(config, theirs, opt_state) -> tuple:
    """The state of our optimizer under big_vision's names.

    Both chains hold a stateless clip, then `optax.<optax_name>`, then transformations that only scale,
    and at the end the schedules' counters. big_vision has one counter for each schedule that isn't
    None, and wraps every link in `optax.masked`, whose state has the link's at index 0.

    Args:
      config: ours. theirs: its translation.
      opt_state: state of `optim.make(config, …)`'s transformation.

    Returns:
      (the counter, {"1/0/1/img/head/kernel": array}).
    """
    counters = [int(x.count) for x in jax.tree.leaves(opt_state, is_leaf=_is_counter) if _is_counter(x)]
    moments = bv.flatten(opt_state[1 if config.get("grad_clip_norm") else 0])
    schedule = theirs.get("schedule", {})
    schedules = [s for _, s in schedule] if isinstance(schedule, list | tuple) else [schedule]
    decays = theirs.get("wd_mults", [(".*/kernel$", 1.0)]) if theirs.get("wd") else []
    # 0: clip, 1: moments, 2: lr.
    first = 3 + len(theirs.get("lr_mults") or []) + len(decays)
    count = np.int32(counters[0])
    out = {f"1/0/{name}".rstrip("/"): leaf for name, leaf in moments.items()}
    trained = [s for s in schedules if s is not None]
    return counters[0], out | {f"{first + i}/0/0": count for i in range(len(trained))}


def _is_counter(x):
    return isinstance(x, optax.ScaleByScheduleState)


def _cast(leaf, dtype):
    return lazy.derive(leaf, leaf.shape, lambda x: x.astype(dtype, copy=False), dtype)
