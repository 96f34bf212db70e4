"""The forms of weights and adapters on disk: which one a path holds, and reading and writing any of them.

A new form of weights is a file in this folder, and a line in `kind_of`, `open_params` and `save_params`; a new form
of adapters is a file with `is_adapter`, `load_adapter` and `save_adapter`, and a line in `ADAPTERS`.
"""

import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paligemma_med.checkpoints import bv, compose, finite, gm, hf, hub, in_parts, lazy, minigpt, npz, peft
from paligemma_med.checkpoints.adapter import Adapter
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.fit import stack_layers
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

ADAPTERS = {"peft": peft}
_READ_ONLY = (in_parts, minigpt)  # folders of several adapters, and those that no one writes any more
_MOVED = "; if they were moved, --base=PATH says where they are now"

_FORMS = (
    "a big_vision file 'x.npz' or a part of one 'x.npz:img', a Hugging Face directory, a file of safetensors, "
    "an Orbax checkpoint, a workdir of this project (or one 'workdir@step' of its checkpoints), or "
    "a training checkpoint of big_vision's (folder, prefix 'x/checkpoint.bv' or workdir)"
)


def kind_of(spec: os.PathLike | str) -> str:
    """Which form of weights `spec` names: "npz", "hf", "orbax", "workdir" or "big_vision".

    Raises:
      FileNotFoundError: the path doesn't exist.
      CheckpointError: it is none of them.
    """
    spec = os.path.expanduser(hub.located(os.fspath(spec)))
    if os.path.isdir(spec):
        entries = set(os.listdir(spec))
        if {"config.json", "checkpoints"} <= entries:
            if bv.PREFIX + bv.LAST in entries:
                raise CheckpointError(
                    f"{spec} holds checkpoints of this project and of big_vision's: name "
                    f"{spec}@step, or {os.path.join(spec, bv.PREFIX)}"
                )
            return "workdir"
        if form := _adapter_form(spec):
            raise CheckpointError(
                f"{spec} holds a {form.NAME} adapter, not weights of a model: name it where adapters are "
                "taken (config.adapter_init, --adapter)"
            )
        if any(e.endswith((".safetensors", ".safetensors.index.json")) for e in entries):
            return "hf"
        if "_METADATA" in entries:
            return "orbax"
        if bv.find(spec):
            return "big_vision"
        if any(e.endswith((".bin", ".pt", ".pth")) for e in entries):
            raise CheckpointError(
                f"{spec} holds PyTorch pickles, which are never read: save it with safe_serialization=True, or make "
                "safetensors of them with tools.torch_to_safetensors"
            )
        raise CheckpointError(f"{spec} is a folder without weights: expected {_FORMS}")
    if "@" in spec:
        from paligemma_med.checkpoints import workdir  # here and below: it needs Orbax, which is slow to import

        if workdir.split_spec(spec):
            return "workdir"
    path, _ = npz.split_spec(spec)
    if path.lower().endswith(".npz"):
        return "npz"
    if spec.endswith(".safetensors") and os.path.isfile(spec):
        return "hf"
    if bv.find(spec):
        return "big_vision"
    if not os.path.exists(path):
        raise FileNotFoundError(f"no weights at {spec}: expected {_FORMS}{hub.hint(spec)}")
    raise CheckpointError(f"{spec} is not a form of weights known here: expected {_FORMS}")


def open_params(
    spec: os.PathLike | str,
    *,
    base: str | None = None,
    allow_nonfinite: bool = False,
    runs: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Opens weights of any form: a nested dict with big_vision's names.

    Args:
      spec: "x.npz", "x.npz:img", a Hugging Face directory or a file of safetensors (`hf.open_hf`), the name of such a
        directory on the Hub that is in its cache ("hf:owner/name@revision", `hub`), an Orbax checkpoint, a workdir or
        "workdir@step", or a big_vision training checkpoint, as for `bv.find`; or several sources,
        "img=a,connector=b,llm=c".
      base: of a workdir: where the weights that it started from are, if they aren't where its config.json says.
      allow_nonfinite: whether weights may be NaN or infinite.
      runs: folders of the runs that started from this one.

    Returns:
      {"img": …, "llm": …} (or the requested subtree), layers stacked on a leading axis; dtypes as
      stored. Leaves are `Lazy`, which np.asarray reads, or already arrays. Fit the tree to a model with
      `match_params`, which reads no leaf.

    Raises:
      FileNotFoundError: the path doesn't exist.
      CheckpointError: it is none of the accepted forms, or is damaged; a leaf isn't of floats. Numbers that aren't
        finite show when a leaf is read.
    """
    spec = os.fspath(spec)
    if several := compose.parts_of(spec):
        return compose.open_parts(several, lambda path: open_params(path, allow_nonfinite=allow_nonfinite, runs=runs))
    spec = os.path.expanduser(hub.located(spec))
    kind = kind_of(spec)
    if kind == "workdir":
        return _open_run(spec, base, allow_nonfinite, runs)
    if kind == "npz":
        found = npz.open_npz(spec)
    elif kind == "hf":
        return finite.checked(hf.open_hf(spec), spec, allow_nonfinite)
    elif kind == "orbax":
        from paligemma_med.checkpoints import orbax

        found = orbax.open_orbax(spec)
        found = gm.from_gm(found, spec) if gm.is_gm(found) else found
    else:
        found = bv.open_bv(spec)
    return stack_layers(finite.checked(found, spec, allow_nonfinite))


def _open_run(spec, base, allow_nonfinite, runs):
    """The weights of a run: those that it started from, with the run's own leaves replacing theirs."""
    from paligemma_med.checkpoints import workdir

    config, leaves = workdir.open_leaves(spec)
    init, base = config.get("model_init"), base or config.get("base")
    if (folder := os.path.realpath(workdir.split_spec(spec)[0])) in runs:
        raise CheckpointError(f"{folder} says in its config.json that it started from itself: model_init is {init!r}")
    flat = {}
    if init:
        try:
            kw = dict(allow_nonfinite=allow_nonfinite, runs=(*runs, folder))
            found = open_init(init, base=base, may_be_moved=True, **kw)
            flat = flatten_tree(found)  # of any form, even another run's
        except (FileNotFoundError, CheckpointError) as e:
            raise type(e)(
                f"the weights that {workdir.split_spec(spec)[0]} started from (model_init in its config.json) can't be "
                f"read: {e}"
            ) from e
    return unflatten_tree({**flat, **flatten_tree(finite.checked(unflatten_tree(leaves), spec, allow_nonfinite))})


def load_params(spec: os.PathLike | str, **kw) -> dict[str, Any]:
    """`open_params` with all leaves read into numpy arrays."""
    return lazy.read_all(open_params(spec, **kw))


def open_init(
    spec: os.PathLike | str | Mapping[str, str], *, base: str | None = None, may_be_moved: bool = False, **kw
) -> dict[str, Any]:
    """`config.model_init`: one spec for `open_params`, or a mapping img=spec, llm=spec, perhaps connector=spec.

    A source may hold other parts besides the one that it is named for.

    Args:
      base: as for `open_params`.
      may_be_moved: whether `base` stands for `spec` itself, too, if there is nothing at `spec`.
    """
    if not isinstance(spec, str | os.PathLike | Mapping):
        raise ValueError(
            f"model_init is {spec!r}: expected a path, or a path for each of {' and '.join(compose.PARTS)}"
        )
    if several := compose.parts_of(spec):
        return compose.open_parts(several, lambda path: open_params(path, **kw))
    try:
        return open_params(spec, base=base, **kw)
    except FileNotFoundError as e:
        if base is None or not may_be_moved:
            is_told = not may_be_moved or _MOVED in str(e)  # by the run that this one started from
            raise FileNotFoundError(f"{e}{'' if is_told else _MOVED}") from None
    return open_params(base, **kw)


def load_init(spec: os.PathLike | str | Mapping[str, str], **kw) -> dict[str, Any]:
    """`open_init` with all leaves read into numpy arrays."""
    return lazy.read_all(open_init(spec, **kw))


def save_params(
    path: os.PathLike | str,
    params: Mapping[str, Any],
    form: str,
    *,
    img: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    connector: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    processor: str | None = None,
    beside: Callable | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes weights whole or not at all, one leaf in memory at a time.

    Args:
      path: file or folder to write.
      params: nested mapping of arrays or `lazy.Lazy`, without adapters for "hf".
      form: "npz" (big_vision's), "hf" or "orbax".
      img, llm, connector: the model's config dicts, which "hf" needs if the shapes don't determine everything.
      dtype: floating leaves are cast to this; None keeps each as it is.
      overwrite: replace a folder of that form; a file is always replaced.
      processor, beside: as in `hf.save_hf`, for "hf".
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False, or it has another form.
      CheckpointError: the weights can't be written in that form.
    """
    if lazy.dtype_of(dtype) == "float16":
        params = _fitting(params, dtype)
    if form == "npz":
        npz.save_npz(path, params, dtype=dtype, progress=progress)
    elif form == "hf":
        model = dict(img=img, llm=llm, connector=connector)
        kw = dict(dtype=dtype, overwrite=overwrite, processor=processor, beside=beside, progress=progress)
        hf.save_hf(path, params, **model, **kw)
    elif form == "orbax":
        from paligemma_med.checkpoints import orbax

        orbax.save_orbax(path, params, dtype=dtype, overwrite=overwrite, progress=progress)
    else:
        raise ValueError(f"weights are not written as {form!r}; expected npz, hf or orbax")


def _fitting(params, dtype):
    """The tree, whose leaves are checked when they are read: that their numbers fit a type."""
    flat = flatten_tree(params)
    for key, leaf in flat.items():
        leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        if lazy.is_float(np.dtype(leaf.dtype)):
            flat[key] = lazy.derive(leaf, leaf.shape, lambda x, key=key: (finite.cast(x, dtype, key), x)[1])
    return unflatten_tree(flat)


# --- adapters ----------------------------------------------------------------------------------


def _adapter_form(path):
    return next((form for form in (*ADAPTERS.values(), *_READ_ONLY) if form.is_adapter(path)), None)


def load_adapter(path: os.PathLike | str, *, allow_nonfinite: bool = False) -> Adapter:
    """Reads an adapter in any of the forms in `ADAPTERS`, or one in a checkpoint of MiniGPT-v2's or PeFoMed's.

    Args:
      allow_nonfinite: whether factors may be NaN or infinite.

    Raises:
      FileNotFoundError: there is none.
      CheckpointError: it is damaged, or the model can't represent it.
    """
    path = os.path.expanduser(hub.located(os.fspath(path)))
    form = _adapter_form(path) or peft  # whose error says what is missing
    return form.load_adapter(path, allow_nonfinite=allow_nonfinite)


def save_adapter(path: os.PathLike | str, adapter: Adapter, *, form: str = "peft", **kw) -> None:
    """Writes an adapter whole or not at all.

    Args:
      form: one of `ADAPTERS`.
      **kw: arguments of its `save_adapter`; all have `dtype` and `overwrite`.

    Raises:
      FileExistsError: `path` exists and `overwrite` is False, or it isn't an adapter.
      CheckpointError: the adapter is empty, or can't be expressed in that form.
    """
    ADAPTERS[form].save_adapter(path, adapter, **kw)
