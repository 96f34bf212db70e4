"""Weights: from the files that a config names to arrays on the devices, each leaf in its type.

`initial_params` gives training its start; `load` is for answering questions.
"""

import gc
import math
import os
import sys
from typing import Any

import jax
import ml_collections
import numpy as np

from paligemma_med import checkpoints, quantise
from paligemma_med.checkpoints import bv, compose, fingerprint, finite, fit, hf, hub, npz, workdir
from paligemma_med.config import files as config_files
from paligemma_med.config import values as config_values
from paligemma_med.experiment import abstract_params, adapted
from paligemma_med.models import lora_targets, parts, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.parallel import distributed, notes
from paligemma_med.setup import Setup


def initial_params(setup: Setup) -> tuple[dict[str, jax.Array], set[str]]:
    """The parameters training starts from, on the devices.

    They come from config.model_init, or are random by config.seed if that is None. Factors of
    adapters come from config.adapter_init, or from a model_init that has them, or are fresh.
    Weights from files go to the devices leaf by leaf, each as `setup` says.

    Returns:
      ({name: jax.Array}, names that config.model_init didn't give).

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
      ValueError: weights to be quantised that no file gives.
    """
    base, adapter = initial_host_params(setup)
    random = [n for n in setup.abstract if n not in base and n not in adapter]
    if missing := next((n for n in random if n in setup.kinds), None):
        raise ValueError(
            f"config.frozen_dtype={setup.config.frozen_dtype!r} quantises weights that config.model_init "
            f"gives, but it gives none for {missing}: set it, or train them."
        )
    if compose.parts_of(setup.config.get("model_init")):
        trained = {*setup.trained_names}
        if frozen := next((n for n in random if n not in trained and not lora.is_factor(n)), None):
            raise ValueError(
                f"config.schedule freezes {frozen}, for which config.model_init names no source that has it: train it, "
                "or name one (model_init.connector)."
            )
    params = place_params({**base, **adapter}, setup)
    if random:
        params |= _random_params(setup, random)
    return {n: params.pop(n) for n in setup.abstract} | params, {*random, *adapter}


def initial_host_params(setup: Setup) -> tuple[dict[str, Any], dict[str, Any]]:
    """The initial parameters that come from files, on the host.

    Returns:
      ({name: array, which may still be in its file} from config.model_init, the same from
      config.adapter_init); either may be empty.

    Raises:
      checkpoints.CheckpointError: what was found doesn't fit the config.
    """
    config, base, adapter = setup.config, {}, {}
    if config.get("model_init"):
        base = load_host_params(
            config.model_init,
            setup.abstract,
            leaves=setup.leaves,
            may_be_moved=True,
            may_begin_afresh=True,
            **reading(config),
        )
        check_described(config.model_init, setup.model)
        if any(map(lora.is_factor, base)):
            _check_scales(config, setup.model, config.model_init)
    if config.get("adapter_init"):
        if any(map(lora.is_factor, base)):
            raise _two_adapters(config)
        adapter = load_host_adapter(config, setup.model)
    return base, adapter


def _two_adapters(config):
    return checkpoints.CheckpointError(
        f"{config.model_init} has adapters of its own, and config.adapter_init names "
        f"{config.adapter_init}: give one of them."
    )


def _random_params(setup, names):
    """The parameters `names` of a newly initialised model; the others aren't computed."""

    def init():
        seed = jax.random.key(setup.config.get("seed", 0))
        flat = flatten_tree(vlm.init_params(setup.model, seed, image_size=setup.config.res))
        return {n: flat[n].astype(setup.dtypes[n]) for n in names}

    return jax.jit(init, out_shardings={n: setup.shardings[n] for n in names})()


def load_host_adapter(config, model) -> dict[str, np.ndarray]:
    """{name: numpy array}: the factors of config.adapter_init. They must have the ranks and scales of config.lora;
    dropout may differ, since it only matters in training."""
    adapter = config_values.load_adapter(config)
    want, found = adapted(config, model), adapter.specs
    for target in sorted({*want, *found}):
        a, b = (s.get(target) for s in (want, found))
        if a is None or b is None or a.rank != b.rank or not _same_scale(a, b):
            raise checkpoints.CheckpointError(
                f"config.adapter_init {config.adapter_init} differs from config.lora at "
                f"{target.name}: found {b}, expected {a}. Without config.lora it sets the ranks."
            )
    plain = unflatten_tree(abstract_params(config, model.clone(lora=())))
    tree, _ = checkpoints.insert_adapter(plain, adapter)
    return {n: x for n, x in flatten_tree(tree).items() if lora.is_factor(n)}


def _check_scales(config, model, spec):
    """Raises CheckpointError if config.lora would scale a run's adapters differently than that run did."""
    rules = _rules_of_run(spec)
    if rules is None:
        return
    names = abstract_params(config, model.clone(lora=()))
    want, found = adapted(config, model), lora_targets.resolve(rules, names, model.leaves)
    for target in want:
        a, b = want[target], found.get(target)
        if b is not None and not _same_scale(a, b):
            raise checkpoints.CheckpointError(
                f"{spec} was trained with {b} at {target.name}, but config.lora has {a}: its "
                "adapters would be scaled otherwise than in training."
            )


def _same_scale(a, b):
    # PEFT's alpha is rounded if only some projections are rank-stabilised.
    return math.isclose(a.scale, b.scale, rel_tol=1e-9)


def _rules_of_run(spec):
    """config.lora of the run `spec`, ours or big_vision's; None if it isn't a run or has no adapters."""
    return _config_of_run(spec).get("lora") or None


def _config_of_run(spec):
    """config.json of the run `spec` as a dict; empty if it isn't a run."""
    if not isinstance(spec, str):
        return {}
    found = workdir.split_spec(spec)
    return workdir.read_config(found[0]) if found else bv.read_config(spec)


def load(config, checkpoint) -> tuple[vlm.Model, Any, jax.sharding.Mesh, dict[str, Any]]:
    """What answering questions needs: the model of `config` with the weights of `checkpoint`.

    Adapters come from the checkpoint, or else from config.adapter_init. If there are none, the model has
    none either, whatever config.lora says, and a line on stderr says so.

    Args:
      config: ConfigDict; not changed (its model_init is ignored).
      checkpoint: anything `checkpoints.load_params` takes.

    Returns:
      (model, tokenizer, mesh, params): params is the nested tree on the devices, every leaf in
      config.frozen_dtype, since nothing is trained (quantised ones together with their scales).

    Raises:
      checkpoints.CheckpointError: the weights or the adapters don't fit the config. ValueError: a mistake in it.
    """
    config = config.copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():  # it may have been a dict
        config.model_init = checkpoint
        if not config.get("lora") and not config.get("adapter_init") and _rules_of_run(checkpoint):
            config.lora = _rules_of_run(checkpoint)
    setup = Setup(config)
    config, model, tokenizer = setup.config, setup.model, setup.tokenizer
    host = load_host_params(checkpoint, setup.abstract, leaves=setup.leaves, **reading(config))
    check_described(checkpoint, model)
    if any(map(lora.is_factor, host)):
        adapter, run_config = config.get("adapter_init"), _config_of_run(checkpoint)
        if adapter and run_config.get("adapter_init") != config_files.absolute(adapter):
            raise _two_adapters(config)
        _check_scales(config, model, checkpoint)
    elif config.get("adapter_init"):
        host |= load_host_adapter(config, model)
    elif model.lora:
        print(f"{checkpoint} has no adapters: config.lora is left out.", file=sys.stderr)
        model = model.clone(lora=())
    with notes.stage(f"reading the weights of {checkpoint}"):
        params = place_params(host, setup)
    if config.get("base"):
        _check_moved(config, checkpoint, params)
    return model, tokenizer, setup.mesh, unflatten_tree(params)


def _check_moved(config, checkpoint, params):
    """Raises CheckpointError if the weights at config.base aren't those that the run `checkpoint` began with."""
    run = workdir.split_spec(checkpoint) if isinstance(checkpoint, str) else None
    then = workdir.read_base(run[0]) if run else None
    if then is None:
        return
    dtype = config.get("frozen_dtype", "float32")
    if then["frozen_dtype"] != dtype:
        print(
            f"Not compared: whether the weights in {config.base} are those that {run[0]} began with, since it had them "
            f"in {then['frozen_dtype']}, and here they are in {dtype}.",
            file=sys.stderr,
        )
        return
    names = sorted({*then["fingerprints"]} & {*params})
    prints = fingerprint.of_leaves([params[n] for n in names])
    if wrong := [n for n, x in zip(names, prints) if x != then["fingerprints"][n]]:
        raise checkpoints.CheckpointError(
            f"{config.base} has other weights than those that {run[0]} began with ({then['model_init']}), in "
            f"{len(wrong)} parameters, the first is {wrong[0]}; expected the same weights at another place."
        )


def reading(config) -> dict[str, Any]:
    """What a config says about reading weights, as arguments of `load_host_params`."""
    return dict(
        resample_posemb=config.get("resample_posemb") or False,
        base=config.get("base"),
        allow_nonfinite=config.get("allow_nonfinite") or False,
    )


def load_host_params(
    spec,
    abstract,
    resample_posemb=False,
    leaves=None,
    *,
    base=None,
    may_be_moved=False,
    may_begin_afresh=False,
    allow_nonfinite=False,
) -> dict[str, Any]:
    """Weights of any form that `checkpoints.open_init` takes, fitted to the model, on the host.

    Factors of adapters may be missing, but only all of them together.

    Args:
      resample_posemb: resample position embeddings of another resolution; by which of `fit.RESAMPLING`, True: the
        first.
      leaves: the model's table of leaves; by default PaliGemma's.
      base: where the weights are that a run started from, if they aren't where its config.json says.
      may_be_moved: whether `base` stands for `spec` itself, too, if there is nothing at `spec`.
      may_begin_afresh: whether sources of parts may lack what leads from one to the other (`compose.afresh`).
      allow_nonfinite: whether weights may be NaN or infinite.

    Returns:
      {name: array, which may still be in its file}, without what begins afresh.

    Raises:
      checkpoints.CheckpointError: the weights don't fit the model.
    """
    if isinstance(spec, ml_collections.ConfigDict):
        spec = spec.to_dict()
    loaded = checkpoints.open_init(spec, base=base, may_be_moved=may_be_moved, allow_nonfinite=allow_nonfinite)
    loaded = compose.for_model(flatten_tree(loaded), abstract)
    if not resample_posemb:
        _check_resolution(spec, loaded, abstract, leaves or parts.LEAVES)
    expected = abstract
    if not any(map(lora.is_factor, loaded)):
        expected = {n: x for n, x in abstract.items() if not lora.is_factor(n)}
    if may_begin_afresh and (several := compose.parts_of(spec)):
        fresh = {*compose.afresh(loaded, expected, several)}
        loaded, expected = ({n: x for n, x in flat.items() if n not in fresh} for flat in (loaded, expected))
    method = resample_posemb if isinstance(resample_posemb, str) else fit.RESAMPLING[0]
    try:
        fitted = checkpoints.match_params(unflatten_tree(loaded), unflatten_tree(expected), resampling=method)
    except npz.CheckpointError as e:
        raise npz.CheckpointError(f"{spec}: {e}") from None
    return flatten_tree(fitted)


def check_described(spec, model) -> None:
    """Raises CheckpointError if a config.json among the sources `spec` describes other arithmetic than the model's."""
    for part, path in (compose.parts_of(spec) or {None: spec}).items():
        if os.path.exists(path := os.path.expanduser(hub.located(path))) and checkpoints.kind_of(path) == "hf":
            hf.check_agrees(path, model, part)


def _check_resolution(spec, loaded, abstract, leaves):
    """Raises CheckpointError for position embeddings of another grid than the config's: resampled ones work less well
    until they are trained further, so the config must request it."""
    positions = next((leaf for leaf in leaves.values() if leaf.role == "positions"), None)
    if positions is None:
        return
    found, expected = (getattr(x.get(positions.path), "shape", ()) for x in (loaded, abstract))
    if len(found) != 3 or len(expected) != 3 or found[1] == expected[1]:
        return
    has, wants = (vlm.image_size(leaves, {**abstract, positions.path: x[positions.path]}) for x in (loaded, abstract))
    raise checkpoints.CheckpointError(
        f"{spec} was made for images of {has} px ({found[1]} positions), but config.res = {wants} "
        f"has {expected[1]}: set res={has} (config.res, and resize({has}) in the pp strings), take "
        "weights of that resolution, or give --resample_posemb (config.resample_posemb=True) to have "
        "the position embeddings resampled."
    )


def place_params(host: dict[str, Any], setup: Setup) -> dict[str, jax.Array]:
    """{name: numpy array} → {name: jax.Array} with the type, kind and sharding of `setup`; the host's copies are
    freed one by one.

    Each process reads the weights, and copies its devices' parts to them. The largest are read first: while there
    are copies of them, the fewest others are there.
    """
    out = {}
    for name in sorted(host, key=lambda n: -host[n].size):
        array, place = np.asarray(host.pop(name)), setup.shardings[name]
        if kind := setup.kinds.get(name):
            where = quantise.stored(name, _with_sharding(array, place), kind, setup.leaves)
            for n, x in quantise.quantise(name, array, kind, setup.leaves).items():
                out[n] = distributed.place(x, where[n].sharding)
        else:
            array = finite.cast(array, setup.dtypes[name], name)
            out[name] = distributed.place(array, place)
        if array.nbytes > _WORTH_COLLECTING:
            # JAX lets go of an array that it has copied when Python next collects garbage.
            del array
            jax.block_until_ready([x for n, x in out.items() if n.startswith(name)])
            gc.collect()
    return out


_WORTH_COLLECTING = 2**26  # bytes


def _with_sharding(x, where, dtype=None):
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where)


def stored_params(abstract: dict[str, Any], setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """{name: shape with its sharding}: what `place_params` would make from arrays of these shapes."""
    out = {}
    for name, x in abstract.items():
        x = _with_sharding(x, setup.shardings[name], setup.dtypes[name])
        kind = setup.kinds.get(name)
        out |= quantise.stored(name, x, kind, setup.leaves) if kind else {name: x}
    return out
