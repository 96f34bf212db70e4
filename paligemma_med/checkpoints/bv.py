"""big_vision's training checkpoints, read and written without big_vision.

    <prefix>-000000300/             a checkpoint; `…-tmp` if the next one replaces it
    <prefix>-000000300/params~img~head~kernel/      one array: zarr, by TensorStore
    <prefix>-LAST                   the suffix of the newest complete one's name, "000000300"

The prefix is `<workdir>/checkpoint.bv` in its trainers (utils.py, `save_checkpoint_ts`). In addition to
`params` a checkpoint has `opt`, the optimizer's state, and `chrono`, its clock; "/" is "~" in file names.
An array has a file for each shard that was written, and TensorStore reads a missing one as zeros: here
that is an error.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, first_line, listed
from paligemma_med.checkpoints.lazy import BFLOAT16, Lazy
from paligemma_med.checkpoints.plain_path import plain_path
from paligemma_med.models.leaves import unflatten_tree
from paligemma_med.pp import json_text

PREFIX = "checkpoint.bv"
LAST = "-LAST"
_NAME = re.compile(r"(.+)-(\d{9,})(?:-tmp)?")
_PARAMS = "params/"
_CHUNK = 2**28  # bytes of an array that are compressed at once


# --- which folder ------------------------------------------------------------------------------


def find(spec: os.PathLike | str) -> tuple[str, str | None] | None:
    """Which checkpoint a path means.

    Args:
      spec: the folder of a checkpoint, its prefix "…/checkpoint.bv", or a big_vision workdir; a suffix
        ":params/llm" or ":llm" means only this part.

    Returns:
      (folder, part or None), or None if `spec` names nothing of the kind. The folder is the newest
      checkpoint's unless `spec` names one itself.

    Raises:
      CheckpointError: the pointer file is damaged, or its checkpoint is missing.
    """
    spec = os.path.expanduser(os.fspath(spec))
    head, colon, part = spec.rpartition(":")
    for path, subtree in [(spec, None), (head, part)][: 1 + bool(head and colon)]:
        if folder := _folder(path):
            if subtree is not None and not subtree.strip("/"):
                raise CheckpointError(f"{spec!r}: expected a part such as 'img' after the colon")
            return folder, subtree
    return None


def _folder(path):
    path = path.rstrip("/") or path
    inner = os.path.join(path, PREFIX)
    for prefix in (path, inner):
        if os.path.isfile(prefix + LAST):
            return _pointed(prefix)
    if not os.path.isdir(path):
        return None
    named = re.fullmatch(re.escape(PREFIX) + r"-\d{9,}(-tmp)?", os.path.basename(path))
    return path if named or any(n.startswith("params~") for n in os.listdir(path)) else None


def _pointed(prefix):
    last = _last(prefix)
    folder = f"{prefix}-{last}"
    if not os.path.isdir(folder):
        raise CheckpointError(f"{prefix}{LAST} names {last!r}, but there is no folder {folder}")
    return folder


def _last(prefix):
    with open(prefix + LAST, "rb") as f:
        text = f.read(100).decode("utf-8", "replace").strip()
    if not re.fullmatch(r"\d{9,}(-tmp)?", text):  # it becomes a part of a path
        raise CheckpointError(f"{prefix}{LAST} holds {text!r}: expected the number of a step, such as '000000300'")
    return text


def pin(spec: str) -> str:
    """ "out/bv" → "out/bv/checkpoint.bv-000000300"; other specs are unchanged.

    A run that started from these weights must find the same ones after that other run has continued.
    """
    checkpoint = find(spec)
    if checkpoint is None:
        return spec
    folder, part = checkpoint
    return f"{folder}:{part}" if part else folder


def pinned_from(spec: str) -> set[str]:
    """The specs that `pin` could have turned into this one, including itself."""
    match = re.fullmatch(r"(.+)-\d{9,}(?:-tmp)?(:[\w/]+)?", spec)
    if not match:
        return {spec}
    prefix, part = match[1], match[2] or ""
    return {spec, prefix + part, os.path.dirname(prefix) + part}


def read_config(spec: os.PathLike | str) -> dict[str, Any]:
    """What the config.json next to a checkpoint says about the model, under our configs' keys.

    Returns:
      dict(model=dict(img=…, llm=…), lora=rules or None); {} if there is no such file, or if the trained
      model isn't ours (model_name "paligemma_med").
    """
    checkpoint = find(spec)
    if checkpoint is None:
        return {}
    path = os.path.join(os.path.dirname(os.path.abspath(checkpoint[0])), "config.json")
    if not os.path.isfile(path):
        return {}
    try:
        config = json_text.read(path, "the config of a run", root=dict, constants=True, error=CheckpointError)
        if config.get("model_name") != "paligemma_med":
            return {}
        model = dict(config.get("model") or {})
        # There, a rule's settings are pairs: [["rank", 8], …].
        rules = [(regex, spec and dict(spec)) for regex, spec in model.get("lora") or ()]
    except CheckpointError:
        raise
    except (ValueError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} is not the config of a run: {e}") from None
    run = ("dtype", "attn_impl", "lora")  # which our configs have outside config.model
    return dict(model={k: v for k, v in model.items() if k not in run}, lora=rules or None)


def _check_whole(folder):
    """Raises CheckpointError for a checkpoint newer than the pointer's, which was never finished."""
    match = _NAME.fullmatch(folder.rstrip("/"))
    if not match or not os.path.isfile(match[1] + LAST):
        return
    if int(match[2]) > int(_last(match[1]).removesuffix("-tmp")):
        raise CheckpointError(
            f"{folder} was not written to its end: {match[1]}{LAST} names step "
            f"{_last(match[1])} as the newest whole one"
        )


# --- reading -----------------------------------------------------------------------------------


def open_bv(spec: os.PathLike | str) -> dict[str, Any]:
    """Opens the parameters of a checkpoint: a nested dict of `lazy.Lazy`, read one by one.

    Args:
      spec: as for `find`.

    Returns:
      The tree below `params`, or the requested part of it; dtypes as stored.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointError: it is damaged, unfinished, or has no such part. Damage within an array shows when it
        is read.
    """
    checkpoint = find(spec)
    if checkpoint is None:
        raise FileNotFoundError(f"no checkpoint of big_vision at {spec}")
    folder, part = checkpoint
    part = (part or "").strip("/").removeprefix("params").strip("/")
    inside = _PARAMS + part + "/" if part else _PARAMS
    return unflatten_tree(_open(folder, inside))


def open_state(spec: os.PathLike | str) -> dict[str, Lazy]:
    """All of a checkpoint: {"params/img/head/kernel": `lazy.Lazy`, "opt/1/0/0": …}."""
    return _open(find(spec)[0], "")


def _open(folder, inside):
    _check_whole(folder)
    names = {name.replace("~", "/"): name for name in sorted(os.listdir(folder))}
    if not any(key.startswith(_PARAMS) for key in names):
        raise CheckpointError(f"{folder} holds no parameters: expected folders params~img~…")
    chosen = {key: name for key, name in names.items() if key.startswith(inside)}
    if not chosen:
        part = inside.strip("/").removeprefix(_PARAMS)
        if inside.strip("/") in names:
            raise CheckpointError(f"{folder}:{part} is a single array: expected a part with many")
        top = sorted({k.split("/")[1] for k in names if k.startswith(_PARAMS)})
        raise CheckpointError(f"{folder} has no part {part!r}: found {listed(top)}")
    return {key[len(inside) :]: _open_array(folder, key, name) for key, name in chosen.items()}


def _open_array(folder, key, name):
    store = _store(folder, key, name)
    dtype = np.dtype(store.dtype.numpy_dtype)
    if dtype != BFLOAT16 and dtype.kind not in "fiub":
        raise CheckpointError(f"{folder}: {key} has dtype {dtype}: expected numbers")

    def read():
        store = _store(folder, key, name)
        if (store.shape, store.dtype.numpy_dtype) != (shape, dtype):
            raise CheckpointError(f"{folder}: {key} changed while the checkpoint was in use")
        for what, size in ((key, shape), (f"a piece of {key}", store.chunk_layout.read_chunk.shape or ())):
            lazy.check_room(f"{folder}: {what}", size, dtype)
        try:
            return np.asarray(store.read().result())
        except Exception as e:  # TensorStore has no errors of its own
            raise _unreadable(folder, key, e) from e

    shape = store.shape
    return Lazy(shape, dtype, read)


def _store(folder, key, name):
    import tensorstore  # here, so that reading other forms does not pay for it

    path = os.path.join(plain_path(folder), name)
    spec = dict(_spec(path), fill_missing_data_reads=False)
    try:
        return tensorstore.open(spec, open=True, read=True).result()
    except Exception as e:
        raise _unreadable(folder, key, e) from e


def _spec(path):
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": path}}


def _unreadable(folder, key, error):
    # TensorStore's message ends with the whole specification, after what went wrong.
    text = str(error).splitlines()[0].split(" [")[0][:300] if str(error) else "nothing"
    return CheckpointError(
        f"{folder}: {key} can't be read; the checkpoint may be damaged or not whole (TensorStore "
        f"says: {text.rstrip('. ')})"
    )


# --- writing -----------------------------------------------------------------------------------


def save_bv(
    prefix: os.PathLike | str,
    step: int,
    state: Mapping[str, Any],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a big_vision checkpoint, and makes its trainers resume from it.

    One leaf is in memory at a time. The folder appears whole or not at all, and the pointer after it.

    Args:
      prefix: "<workdir>/checkpoint.bv"; missing folders are created.
      step: int, in the folder's name.
      state: {"params": …, "opt": …, "chrono": …}, trees of mappings, tuples and arrays (numpy, jax or
        `lazy.Lazy`), named by `flatten`.
      dtype: floating parameters are cast to this; None keeps each as it is. Other leaves aren't cast.
      overwrite: replace an existing checkpoint of this step.
      progress: called with the number of bytes (of `state`, before the cast) just written.

    Raises:
      FileExistsError: there is a checkpoint of this step, or a newer one that the pointer names.
      CheckpointError: a leaf is not an array of numbers, or a name holds "~".
    """
    prefix, flat, dtype = os.fspath(prefix), flatten(state), lazy.dtype_of(dtype)
    for key in flat:
        if "~" in key:
            raise CheckpointError(f"{key!r} holds a '~', which stands for '/' in big_vision's files")
    folder = f"{prefix}-{step:09d}"
    if os.path.isfile(prefix + LAST):
        last = _last(prefix)
        if int(last.removesuffix("-tmp")) > step:
            raise FileExistsError(f"{prefix}{LAST} names a newer checkpoint, of step {last}")
    replaces = [key.replace("/", "~") for key in flat] if overwrite else None
    with files.whole_folder(folder, replaces=replaces) as new:
        for key, leaf in flat.items():
            array = lazy.numbers(key, leaf)
            cast = dtype is not None and key.startswith(_PARAMS) and lazy.is_float(array.dtype)
            path = os.path.join(plain_path(new), key.replace("/", "~"))
            _write(path, array.astype(dtype, copy=False) if cast else array)
            if progress:
                progress(array.nbytes)
            del array
    with files.whole_file(prefix + LAST) as f:
        f.write(f"{step:09d}".encode())


def flatten(tree: Any) -> dict[str, Any]:
    """{name: leaf} of nested mappings, lists and tuples with big_vision's names: keys and indices joined by
    "/"; named tuples count as tuples; None and empty containers are left out."""
    if tree is None:
        return {}
    if isinstance(tree, Mapping):
        children = tree.items()
    elif isinstance(tree, list | tuple):
        children = enumerate(tree)
    else:
        return {"": tree}
    return {f"{key}/{name}".rstrip("/"): leaf for key, child in children for name, leaf in flatten(child).items()}


def _write(path, array):
    import tensorstore

    chunks = [max(1, n) for n in array.shape]
    if chunks:  # whole rows of the first axis
        row = max(1, array.nbytes // chunks[0])
        chunks[0] = max(1, min(chunks[0], _CHUNK // row))
    # As `jax.experimental.array_serialization` writes it.
    metadata = dict(compressor={"id": "zstd"}, shape=list(array.shape), chunks=chunks)
    spec = dict(_spec(path), metadata=metadata, dtype=array.dtype.name)
    try:
        store = tensorstore.open(spec, create=True, open=True).result()
        store.write(array).result()
    except Exception as e:  # TensorStore has no errors of its own
        raise CheckpointError(f"{path} can't be written (TensorStore says: {first_line(e)}); is the disk full?") from e
