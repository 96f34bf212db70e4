"""Models that transformers has no class for, written as their parts.

A language model and an image tower each get a folder that transformers or, if they are adapted, PEFT loads; what lies
between them is one file of safetensors under the names of its source, which has no class either:

    decoder/               an adapter of LlamaForCausalLM, BloomForCausalLM or Gemma3ForCausalLM, or that model
    tower/                 an adapter of ViTModel, or that model
    connector.safetensors  `hf.connectors`

A part that is as its source has it isn't written again.
"""

import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from paligemma_med import files
from paligemma_med.checkpoints import lazy, peft
from paligemma_med.checkpoints.adapter import Adapter, extract_adapter, rules_of
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.fit import stack_layers
from paligemma_med.checkpoints.hf import connectors, families, tensors, write
from paligemma_med.checkpoints.hf.layout import measure
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

NAME = peft.NAME
CARD = "README.md"  # the model card, where the Hub looks for it
CONNECTOR = "connector.safetensors"
FOLDERS = {"llm": "decoder", "img": "tower"}


def is_adapter(path: os.PathLike | str) -> bool:
    """Whether a folder holds adapters of a model's parts."""
    return any(peft.is_adapter(os.path.join(path, name)) for name in FOLDERS.values())


def load_adapter(path: os.PathLike | str, **kw) -> Adapter:
    """The adapters of all parts in a folder as one; arguments and errors are `peft.load_adapter`'s."""
    folders = [os.path.join(path, name) for name in FOLDERS.values()]
    found = [peft.load_adapter(folder, **kw) for folder in folders if peft.is_adapter(folder)]
    specs, factors = {}, {}
    for one in found:
        specs |= one.specs
        factors |= one.factors
    return Adapter(specs, factors)


def save_adapter(folder: os.PathLike | str, adapter: Adapter, part_families: Mapping[str, families.Family], **kw):
    """Writes the adapters of a model's parts.

    Args:
      folder: of one part it is a PEFT folder, of several it has one for each.
      part_families: `families.of_parts`.
      **kw: arguments of `peft.save_adapter`; base_model is the language model's, the card that of the whole folder.

    Raises:
      CheckpointError: something is adapted that PEFT can't express.
    """
    found = _by_part(adapter, part_families)
    if len(found) == 1:
        (part,) = found
        _save_one(folder, part, found[part], part_families, kw)
        return
    card = kw.pop("card", None)
    with files.whole_folder(folder, replaces=tuple(FOLDERS.values()) if kw.pop("overwrite", False) else None) as new:
        for part, one in found.items():
            _save_one(os.path.join(new, FOLDERS[part]), part, one, part_families, kw)
        if card is not None:
            files.write_text(os.path.join(new, CARD), card)


def _save_one(folder, part, adapter, part_families, kw):
    kw = dict(kw, base_model=kw.get("base_model") if part == "llm" else None)
    peft.save_adapter(folder, adapter, model_type=part_families[part].MODEL_TYPE, **kw)


def _by_part(adapter, part_families):
    """{part: its Adapter}; CheckpointError if one is on what is no module of a family."""
    out = {}
    for target, spec in adapter.specs.items():
        part = target.param.partition("/")[0]
        if part not in part_families or target not in families.modules_of(part_families[part]):
            raise CheckpointError(
                f"the adapter has factors of {target.name}, for which PEFT knows no linear layer by itself: merge them "
                "into the weights (--merge)"
            )
        specs, factors = out.setdefault(part, ({}, {}))
        specs[target], factors[target] = spec, adapter.factors[target]
    return {part: Adapter(*out[part]) for part in FOLDERS if part in out}


def save(
    folder: os.PathLike | str,
    params: Mapping[str, Any],
    *,
    img: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    connector: Mapping[str, Any] | None = None,
    specs: Mapping | None = None,
    own: Collection[str] | None = None,
    card: str | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
    **kw,
) -> None:
    """Writes a model as its parts, whole or not at all.

    Args:
      folder: the directory to write.
      params: {"img": …, "llm": …} and perhaps "connector", of arrays or `lazy.Lazy`, with adapters or without.
      img, llm, connector: the config dicts, for what shapes don't determine.
      specs: {Target: Spec} of the adapters in `params`.
      own: names of leaves that aren't as their source has them; None: all.
      card: text of README.md, the model card; None writes none.
      dtype, overwrite, progress: as in `hf.save_hf`.
      **kw: base_model and key_style of `peft.save_adapter`.

    Raises:
      FileExistsError: `folder` exists.
      CheckpointError: a part can't be written in any way; or it has adapters, and other leaves in `own`.
    """
    flat = flatten_tree(stack_layers(params))
    plain = {name: x for name, x in flat.items() if not lora.is_factor(name)}
    part_families = families.of_parts(plain, llm)
    adapters = {}
    if specs:
        rules = rules_of(Adapter(specs, {}))
        adapters = _by_part(extract_adapter(rules, unflatten_tree(flat)), part_families)
    own = {*plain} if own is None else {*own} & {*plain}
    between = connectors.rows_of(plain, connector)
    rest = own - {row.path for row in between}
    whole = []
    for part in FOLDERS:
        trained = sorted(name for name in rest if name.startswith(f"{part}/"))
        if trained and part in adapters:
            raise CheckpointError(
                f"{trained[0]} is the run's own, which its adapters can't hold: merge them into the weights (--merge)"
            )
        if trained:
            _check_class(part, part_families, plain)
            whole.append(part)
    dicts, done = dict(img=img, llm=llm), progress or (lambda n: None)
    with files.whole_folder(folder, replaces=(CONNECTOR, *FOLDERS.values()) if overwrite else None) as new:
        for part, one in adapters.items():
            _save_one(os.path.join(new, FOLDERS[part]), part, one, part_families, dict(kw, dtype=dtype))
        for part in whole:
            left = {row.path for row in between}
            tree = unflatten_tree({n: x for n, x in plain.items() if n.startswith(f"{part}/") and n not in left})
            args = {part: dicts[part], "dtype": dtype, "progress": progress}
            write.save_hf(os.path.join(new, FOLDERS[part]), tree, **args)
        if between:
            _save_connector(os.path.join(new, CONNECTOR), plain, between, lazy.dtype_of(dtype), done)
        if card is not None:
            files.write_text(os.path.join(new, CARD), card)


def _check_class(part, part_families, paths):
    if part not in part_families:
        raise CheckpointError(
            f"transformers has no class for this {FOLDERS[part]} that is written here: keep adapters apart (without "
            "--merge), or write --to=npz"
        )
    if missing := sorted({row.path for row in part_families[part].table(paths)} - {*paths}):
        raise CheckpointError(
            f"transformers' {part_families[part].NAME} has {missing[0]}, which this {FOLDERS[part]} hasn't: keep "
            "adapters apart (without --merge), or write --to=npz"
        )


def _save_connector(path, flat, rows, dtype, done):
    sizes = measure({row.path: tuple(np.shape(flat[row.path])) for row in rows})
    plan = write.plan(rows, flat, sizes, dtype)
    with open(path, "wb") as f:
        f.write(tensors.header((t.name, t.dtype, t.shape) for t in plan))
        leaf, held = None, None
        for tensor in plan:
            if tensor.row.path != held:
                leaf = None  # first free the one before
                leaf, held = np.asarray(flat[tensor.row.path]), tensor.row.path
                done(leaf.nbytes)
            write.write_tensor(f, tensor, leaf[tensor.at], sizes[tensor.row.part])
