"""Converts weights of any form that we read into big_vision's, Hugging Face's, PEFT's or Orbax's.

    python -m tools.convert_checkpoint pt_224.npz out/paligemma --to=hf --dtype=bfloat16
    python -m tools.convert_checkpoint out/stage2 out/adapter --to=peft
    python -m tools.convert_checkpoint out/stage2 out/merged --to=hf --merge
    python -m tools.convert_checkpoint out/stage2 out/bv --to=big_vision
    python -m tools.convert_checkpoint img=vit,connector=x.safetensors,llm=llama out/w.npz --to=npz --config=my.py

The source is an npz file, a Hugging Face or Orbax folder, a file of safetensors, a workdir, or one of big_vision's
training checkpoints; or several of them, of whose parts the model of --config is made. --to=big_vision turns a workdir
into such a checkpoint, from which big_vision's trainer resumes the run. A model that transformers has no class for
becomes a folder of its parts with --to=hf (docs/weights.md). Weights are copied one parameter at a time, and
the result appears whole or not at all.
"""

import functools
import os
import sys

import jax
import tqdm
from absl import app, flags
from ml_collections import config_flags

from paligemma_med import checkpoints, cli
from paligemma_med.checkpoints import CheckpointError, adapter, bv, compose, forms, hf, hub, in_parts, peft, workdir
from paligemma_med.checkpoints.hf import families, originals, paligemma
from paligemma_med.config import files as config_files
from paligemma_med.models import parts
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree
from paligemma_med.pp import command_line
from tools import model_card, processing

FORMS = ("npz", "hf", *forms.ADAPTERS, "orbax", "big_vision")


def convert(
    src: str,
    dst: str,
    to: str,
    *,
    dtype: str | None = None,
    merge: bool = False,
    adapter_dir: str | None = None,
    part: str | None = None,
    overwrite: bool = False,
    base_model: str | None = None,
    key_style: str | None = None,
    base: str | None = None,
    allow_nonfinite: bool = False,
    processor: str | None = None,
    config=None,
) -> None:
    """Reads weights and writes them in another form.

    Args:
      src: anything `checkpoints.open_params` takes.
      dst: file or folder to write.
      to: one of FORMS; forms of adapters write only those, "big_vision" a run's whole state. A model that transformers
        has no class for is written as its parts by "hf" (`checkpoints.in_parts`).
      dtype: what floats are cast to; None keeps each as it is.
      merge: merge adapters into the weights that they adapt.
      adapter_dir: an adapter that is added to the weights of `src` first.
      part: "img", "connector" or "llm", to write only that part.
      overwrite: replace what is at `dst`, if it has the same form.
      base_model: for a PEFT adapter, the name of the Hugging Face model that it belongs to; by default the one that a
        run began with by its name on the Hub.
      key_style: of a PEFT adapter, as in `peft.save_adapter`.
      base, allow_nonfinite: as in `checkpoints.open_params`.
      processor: for "hf", a folder whose tokenizer and processor are copied, as in `hf.save_hf`.
      config: ConfigDict of an experiment, to whose model the weights are fitted; several sources need one.

    Raises:
      FileNotFoundError, FileExistsError, CheckpointError: one sentence about what is wrong.
    """
    if to in forms.ADAPTERS and merge:
        raise CheckpointError(f"merged weights have no adapters left: give --merge or --to={to}")
    if part and to not in ("npz", "orbax"):
        raise CheckpointError(f"--to={to} writes whole models: --part is for npz and orbax")
    if processor and to != "hf":
        raise CheckpointError(f"--processor is for --to=hf: --to={to} has none")
    if not overwrite and os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists; pass --overwrite to replace it")
    src = hub.located(src)
    if to == "big_vision":
        if merge or adapter_dir:
            raise CheckpointError("--to=big_vision writes a run as it is: no --merge, no --adapter")
        _to_big_vision(src, dst, dtype, overwrite, dict(base=base, allow_nonfinite=allow_nonfinite))
        return
    params = _open(src, config, dict(base=base, allow_nonfinite=allow_nonfinite))
    model, rules = _model_of(src, config)
    plain = [name for name in flatten_tree(params) if not lora.is_factor(name)]
    family = families.of_model(plain, model.get("llm"))
    specs = {}
    if adapter_dir:
        params, specs = adapter.insert_adapter(params, forms.load_adapter(adapter_dir, allow_nonfinite=allow_nonfinite))
    elif merge or to in forms.ADAPTERS or (to == "hf" and family is None and rules):
        specs = _specs_of(src, params, rules)
    base_model = base_model or _base_of(src)
    peft_kw = dict(base_model=base_model, key_style=key_style)
    if to in forms.ADAPTERS:
        found = adapter.extract_adapter(adapter.rules_of(adapter.Adapter(specs, {})), params)
        if family is None:
            part_families = families.of_parts(plain, model.get("llm"))
            card = _card(src, "peft", base_model)
            in_parts.save_adapter(dst, found, part_families, dtype=dtype, overwrite=overwrite, card=card, **peft_kw)
        else:
            card = _card(src, to, base_model, of_paligemma=family is paligemma)
            kw = dict(peft_kw, model_type=family.MODEL_TYPE, card=card) if to == "peft" else {}
            forms.save_adapter(dst, found, form=to, dtype=dtype, overwrite=overwrite, **kw)
        return
    if merge:
        params = adapter.merge(params, specs)
    if part:
        if part not in params:
            raise CheckpointError(f"{src} has no part {part!r}, only {sorted(params)}")
        params = {part: params[part]}
    with _bar(flatten_tree(params), to) as bar:
        kw = dict(model, dtype=dtype, overwrite=overwrite, progress=bar.update)
        if to == "hf" and family is None:
            if processor:
                raise CheckpointError("--processor is for models that transformers has a class for: these are parts")
            own = _own_leaves(src)
            if merge:
                own = own if own is None else {*own, *(target.param for target in specs)}
            card = _card(src, "parts", base_model)
            in_parts.save(dst, params, specs=None if merge else specs, own=own, card=card, **peft_kw, **kw)
        else:
            beside = functools.partial(_beside, src, config, processor is None) if to == "hf" else None
            forms.save_params(dst, params, to, processor=processor, beside=beside, **kw)


def _open(src, config, reading):
    """The tree of `src`, fitted to the model of `config`; without one as it is, unless it is a run that began with
    parts of several systems."""
    if config is None:
        if compose.parts_of(src):
            raise CheckpointError(f"{src} are parts of a model: say of which with --config")
        run = _config_of_run(src) if checkpoints.kind_of(src) == "workdir" else {}
        if not compose.parts_of(run.get("model_init")):
            return _with_heads(src, checkpoints.open_params(src, **reading))
        config = config_files.from_json(run)
    from paligemma_med import experiment, weights  # here, since few need them

    abstract = experiment.abstract_params(config, experiment.make_model(config))
    return unflatten_tree(weights.load_host_params(src, abstract, **{**weights.reading(config), **reading}))


def _beside(src, config, has_none, theirs, processor):
    """Files beside the weights of a model, for `hf.save_hf`: what of its processing `src` or `config` knows, unless
    another processor is copied, and the card of a run."""
    made, told = {}, []
    if has_none and theirs["model_type"] == paligemma.MODEL_TYPE:
        known = config.to_dict() if config is not None else _config_of_run(src) if _is_run(src) else None
        side = processor["size"]["height"]
        found = processing.of_config(known, side)
        try:
            made = processing.files(found, theirs, processor)
        except CheckpointError as e:
            found = found._replace(tokenizer=None, notes=(*found.notes, f"The tokenizer isn't written: {e}"))
            made = processing.files(found, theirs, processor)
        told = processing.told(found, side)
        notes = found.notes
    else:
        notes = ("The tokenizer isn't written: it is that of the model's own page (--processor=DIR copies it).",)
    for note in notes if has_none else ():
        print(note, file=sys.stderr)
    if _is_run(src):
        made[model_card.NAME] = model_card.make(src, "hf", told or notes if has_none else ())
    return made


def _is_run(src):
    return not compose.parts_of(src) and checkpoints.kind_of(src) == "workdir"


def _base_of(src):
    """The name on the Hub of the (language) model that a run began with; None if it has none."""
    init = _config_of_run(src).get("model_init") if _is_run(src) else None
    name = hub.parse((compose.parts_of(init) or {"llm": init})["llm"])
    return name.repo if name and name.is_said else None


def _card(src, kind, base_model, of_paligemma=False):
    """The model card of an export of a run; None if the source is no run, of which nothing is known."""
    if not _is_run(src):
        return None
    told = processing.told_of_adapter(_config_of_run(src)) if of_paligemma else ()
    return model_card.make(src, kind, told, base_model)


def _with_heads(src, params):
    """The tree. CheckpointError if its source doesn't say into how many heads its kernels are cut."""
    for name, leaf in flatten_tree(params).items():
        if "NH" in (axes := parts.LEAVES[name].axes if name in parts.LEAVES else "") and len(leaf.shape) < len(axes):
            raise CheckpointError(f"{src} doesn't say how many heads {name} has: say of which model with --config")
    return params


def _config_of_run(src):
    return workdir.read_config(workdir.split_spec(src)[0])


def _to_big_vision(src, dst, dtype, overwrite, reading):
    if checkpoints.kind_of(src) != "workdir":
        raise CheckpointError(
            f"{src} is no workdir of this project: --to=big_vision carries over the optimizer of "
            "such a run; as weights to start from, big_vision reads --to=npz"
        )
    from paligemma_med.upstream import state  # it needs no big_vision

    step, found = state.train_state(src, **reading)
    with _bar(bv.flatten(found), "big_vision") as bar:
        prefix = os.path.join(dst, bv.PREFIX)
        bv.save_bv(prefix, step, found, dtype=dtype, overwrite=overwrite, progress=bar.update)


def _bar(flat, to):
    # In a log each state of the bar is a separate line.
    every = 0.1 if sys.stderr.isatty() else 10
    total = sum(leaf.nbytes for leaf in flat.values())
    return tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"--to={to}", mininterval=every)


def _model_of(src, config):
    """({"img": …, "llm": …, "connector": …}, config.lora), as far as the source or `config` records them."""
    kind = checkpoints.kind_of(src) if config is None else "config"
    config = {} if config is None else config.to_dict()
    if kind == "hf" and not originals.is_one(os.path.expanduser(src)):
        config = dict(model=hf.model_config(os.path.expanduser(src)))
    elif kind == "workdir":
        config = _config_of_run(src)
    elif kind == "big_vision":
        config = bv.read_config(src)
    model = config.get("model")
    if model is None:
        return {}, None
    found = {name: model.get(name) for name in ("img", "llm", "connector")}
    if kind != "hf":
        found |= {name: found[name] or {} for name in ("img", "llm")}
    return found, config.get("lora")


def _own_leaves(src):
    """Names of the leaves that a run has of its own: all others are its sources'. None if the source is no run."""
    if not isinstance(src, str | os.PathLike) or compose.parts_of(src) or checkpoints.kind_of(src) != "workdir":
        return None
    config, own = workdir.open_leaves(os.fspath(src))
    init = config.get("model_init")
    for one in init.values() if isinstance(init, dict) else [init]:
        try:
            own = {*own, *(_own_leaves(one) or ())}
        except (FileNotFoundError, CheckpointError):  # moved; where `base` is, is no run's
            continue
    return {*own}


def _specs_of(src, params, rules):
    """{Target: Spec} of the adapters in `params`."""
    if not any(map(lora.is_factor, flatten_tree(params))):
        raise CheckpointError(f"{src} has no adapters: name one with --adapter")
    if not rules:
        raise CheckpointError(
            f"{src} has adapters, but doesn't record by what they are scaled: convert the workdir "
            "of the run that trained them"
        )
    return adapter.resolve(rules, params)


@cli.command
def main(argv) -> None:
    if len(argv) != 3:
        raise app.UsageError(f"Give SRC and DST; found {argv[1:]}.")
    jax.config.update("jax_platforms", "cpu")  # nothing here needs an accelerator
    v = flags.FLAGS
    cli.fetch(argv[1], v.adapter, v.base)
    convert(
        argv[1],
        os.path.expanduser(argv[2]),
        v.to,
        dtype=v.dtype,
        merge=v.merge,
        adapter_dir=v.adapter,
        part=v.part,
        overwrite=v.overwrite,
        base_model=v.base_model,
        key_style=v.key_style,
        base=v.base,
        allow_nonfinite=v.allow_nonfinite,
        processor=v.processor,
        config=v.config,
    )
    print(f"Wrote {argv[2]}.")


if __name__ == "__main__":
    types = ("bfloat16", "float16", "float32")
    flags.DEFINE_enum("to", None, FORMS, "Form to write; peft: only the adapters.", required=True)
    flags.DEFINE_enum("dtype", None, types, "Type of the weights written; default: as they are.")
    flags.DEFINE_bool("merge", False, "Merge adapters into the weights they adapt.")
    command_line.define_path("adapter", None, "Folder of a PEFT adapter for the weights of SRC.")
    flags.DEFINE_enum("part", None, compose.PARTS, "Write this part alone.")
    command_line.define_path("base", None, "Where the weights are that the run SRC started from, if they were moved.")
    command_line.define_path("processor", None, "--to=hf: folder whose tokenizer and processor are copied as they are.")
    flags.DEFINE_bool("allow_nonfinite", False, "Take weights that are NaN or infinite as they are.")
    flags.DEFINE_bool("download", False, cli.DOWNLOAD)
    config_flags.DEFINE_config_file("config", None, "Experiment to whose model the weights are fitted.")
    flags.DEFINE_bool("overwrite", False, "Replace what is at DST, if it has the same form.")
    flags.DEFINE_string("base_model", None, "--to=peft: name of the Hugging Face model it adapts; default: the run's.")
    flags.DEFINE_enum("key_style", None, peft.KEY_STYLES, "--to=peft: transformers that names are from.")
    app.run(main, flags_parser=cli.parse_flags)
