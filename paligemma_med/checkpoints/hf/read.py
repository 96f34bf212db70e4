"""Reading Hugging Face directories: config.json and safetensors files → our model and our tree, without PyTorch."""

import functools
import os
import re
from typing import Any

import numpy as np

from paligemma_med.checkpoints.errors import CheckpointError, raise_all
from paligemma_med.checkpoints.hf import families, tensors
from paligemma_med.checkpoints.hf.config import Described, read_json
from paligemma_med.checkpoints.hf.layout import by_path, leaf_shape, relayout
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models import leaves, parts, vlm
from paligemma_med.models.leaves import unflatten_tree

_PIECE = 2**24  # bytes of the two tables to compare at once


def model_config(folder: os.PathLike | str) -> dict[str, Any]:
    """The model of a Hugging Face directory, from its config.json.

    Returns:
      dict(img=…, llm=…), perhaps also connector and image_ar: `vlm.Model(**it)` is that model, with every size given.
      Of a language model by itself dict(llm=…).

    Raises:
      FileNotFoundError: no config.json.
      CheckpointError: it is of an unknown family, or needs something that our model doesn't compute.
    """
    return _describe(folder)[1].model


def _describe(folder):
    path = os.path.join(folder, "config.json")
    whole = read_json(path)
    family = families.of_config(whole, path)
    return family, family.describe(whole, path)


def open_hf(folder: os.PathLike | str) -> dict[str, Any]:
    """Opens a Hugging Face directory: our tree of `lazy.Lazy`, read one by one.

    The embedding's rows from the image token on are left out, and its tied copy `lm_head` must equal it
    exactly, which is checked when it is read.

    Args:
      folder: with config.json and *.safetensors, in one file or several with an index, under the
        names of any version of transformers.

    Returns:
      {"img": …, "llm": …}; dtypes as stored (layers of different types become float32).

    Raises:
      FileNotFoundError: no config.json or weights.
      CheckpointError: a file is damaged, or tensors are missing, unexpected or mis-shaped.
    """
    folder = os.fspath(folder)
    family, described = _describe(folder)
    found = _by_canonical_name(family, tensors.open_all(folder))
    rows = family.table(_paths(described, folder))
    head = None if any(row.name == family.HEAD for row in rows) else found.pop(family.HEAD, None)
    if head and head.shape != found.setdefault(family.EMBEDDING, head).shape:
        raise CheckpointError(
            f"{head.path}: {head.name} has shape {head.shape}, the embedding that it is tied to "
            f"{found[family.EMBEDDING].shape}"
        )
    _check(found, rows, described, folder)
    flat = {path: _leaf(group, found, described.sizes[group[0].part]) for path, group in by_path(rows).items()}
    for row in rows:
        if row.name == family.EMBEDDING:
            table = found[row.name]
            wanted = (described.llm["vocab_size"], *table.shape[1:])
            flat[row.path] = Lazy(wanted, table.dtype, functools.partial(_read_embedding, table, head, wanted[0]))
    return unflatten_tree(flat)


def _by_canonical_name(family, found):
    """{canonical name: Tensor} without buffers."""
    out = {}
    for tensor in found:
        name = family.canonical(tensor.name)
        if any(re.fullmatch(buffer, name) for buffer in family.BUFFERS):
            continue
        if name in out:
            raise CheckpointError(f"{tensor.path}: {tensor.name} is the same as {out[name].name} in {out[name].path}")
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is no tensor of {', '.join(tensors.TYPES)}; quantised weights are not "
                "read"
            )
        out[name] = tensor
    return out


def _paths(described: Described, folder):
    """Paths of the leaves of our model for that description."""
    try:
        if described.img is None:
            llm = parts.family("llm").Model(**described.llm)
            return leaves.join(llm=llm.leaves).keys()
        return vlm.Model(**described.model).leaves.keys()
    except ValueError as e:
        raise CheckpointError(f"{folder}/config.json: {e}") from None


def _check(found, rows, described, folder):
    """One error for everything that is missing, unexpected or of another shape."""
    sizes = described.sizes
    if (most := max(size.get("L", 0) for size in sizes.values())) > len(found):
        raise CheckpointError(f"{folder} has {len(found)} tensors for {most} layers")
    expected = {}
    for row in rows:
        for i in _layers(row, sizes[row.part]):
            expected[row.name_in(i)] = row.tensor_shape(sizes[row.part])
    problems = []
    for name, wanted in expected.items():
        if name not in found:
            problems.append(f"{name}: missing, expected {wanted}")
        elif found[name].shape != wanted:
            problems.append(f"{name}: expected {wanted}, found {found[name].shape}")
    for name in sorted(found.keys() - expected.keys()):
        problems.append(f"{name}: unexpected, found {found[name].shape}")
    raise_all(problems, f"{folder} doesn't fit its config.json", len(expected))


def _layers(row, size):
    return range(size["L"]) if row.leaf.stacked else (None,)


def _leaf(rows, found, size):
    """Our leaf, made from the tensors of all its rows in all layers."""
    pieces = []  # (where in our array, tensor, row)
    for row in rows:
        for i in _layers(row, size):
            at = tuple(n for n in (i, row.index) if n is not None)
            pieces.append((at, found[row.name_in(i)], row))
    whole = leaf_shape(rows[0].leaf, size)
    dtypes = {tensor.dtype for _, tensor, _ in pieces}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype("float32")
    return Lazy(whole, dtype, functools.partial(_fill, whole, dtype, pieces, size))


def _fill(whole, dtype, pieces, size):
    out = np.empty(whole, dtype)
    for at, tensor, row in pieces:
        j, n = row.piece
        rows = tensor.shape[0] // n
        x = tensor.read() if n == 1 else tensor.read(j * rows, (j + 1) * rows)
        out[at] = relayout(x, row.theirs, row.ours, size)
    return out


def _read_embedding(embedding, head, rows):
    if head and head != embedding:
        step = max(1, _PIECE // max(1, embedding.shape[1] * embedding.dtype.itemsize))
        for start in range(0, embedding.shape[0], step):
            stop = min(start + step, embedding.shape[0])
            a, b = (t.read(start, stop) for t in (embedding, head))
            if a.tobytes() != b.tobytes():
                raise CheckpointError(
                    f"{head.path}: {head.name} differs from {embedding.name} within rows {start} "
                    f"to {stop}: this model's output is tied to its embedding"
                )
    return embedding.read(0, rows)
