"""Reading Hugging Face directories: config.json and safetensors files → our model and our tree, without PyTorch."""

import functools
import os
import re
from typing import Any

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.hf import assemble, config, families, originals, tensors
from paligemma_med.checkpoints.hf.config import Described, read_json
from paligemma_med.checkpoints.hf.layout import by_path
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models import leaves, parts, vlm
from paligemma_med.models.leaves import unflatten_tree

_PIECE = 2**24  # bytes of the two tables to compare at once


def model_config(folder: os.PathLike | str) -> dict[str, Any]:
    """The model of a Hugging Face directory, from its config.json.

    Returns:
      dict(img=…, llm=…), perhaps also connector and image_ar: `vlm.Model(**it)` is that model, with every size given.
      Of a language model by itself dict(llm=…), of an image tower dict(img=…).

    Raises:
      FileNotFoundError: no config.json.
      CheckpointError: it is of an unknown family, or needs something that our model doesn't compute.
    """
    return _describe(folder)[1].model


def check_agrees(folder: os.PathLike | str, model: vlm.Model, part: str | None = None) -> None:
    """Raises CheckpointError if a config.json says that `model` computes something else than the weights were made for,
    in what shapes don't show: an eps, a base of RoPE, a window, a gate. A tower's other eps is only said on stderr.

    Args:
      folder: a Hugging Face directory; nothing is checked for one whose config.json tells nothing, and for PaliGemma.
      part: "img", "llm" or "connector", to look at that alone.
    """
    if originals.is_one(os.fspath(folder)):
        return
    family, described = _describe(folder)
    if family is families.FAMILIES["paligemma"]:
        return
    ours = model.parts
    for name, section in described.model.items():
        if part not in (None, name) or name not in ours:
            continue
        # A tower without a last norm gives what comes out of a middle layer.
        cut = ("depth", "final_norm") if name == "img" and ours[name].final_norm is None else ()
        for key, wanted in section.items():
            found = getattr(ours[name], key, wanted)
            found = found[0] if isinstance(found, tuple) and isinstance(wanted, int) else found
            if not config.same(found, wanted) and key not in (*cut, "variant", "kind", "vocab_size"):
                at = os.path.join(folder, "config.json")
                says = f"{at} says {key}={wanted!r}, but config.model.{name} has {found!r}"
                if name == "img" and key in ("norm_eps", "final_norm"):
                    assemble.tell(
                        f"{says}, which is kept"
                    )  # transformers' default of 1e-12 is in files of other towers
                else:
                    raise CheckpointError(f"{says}: change the one that is wrong")


def _describe(folder):
    path = os.path.join(folder, "config.json")
    whole = read_json(path)
    family = families.of_config(whole, path)
    return family, family.describe(whole, path)


def open_hf(folder: os.PathLike | str) -> dict[str, Any]:
    """Opens a Hugging Face directory, or safetensors of another system: our tree of `lazy.Lazy`, read one by one.

    The embedding's rows from the image token on are left out, and its tied copy `lm_head` must equal it
    exactly, which is checked when it is read.

    Args:
      folder: with config.json and *.safetensors, in one file or several with an index, under the names of any version
        of transformers; or a folder or file of safetensors that `originals` knows, without config.json.

    Returns:
      {"img": …, "llm": …}, or those of the parts "img", "connector" and "llm" that there are; dtypes as stored (layers
      of different types become float32).

    Raises:
      FileNotFoundError: no config.json or weights.
      CheckpointError: a file is damaged, or tensors are missing, unexpected or mis-shaped.
    """
    folder = os.fspath(folder)
    if originals.is_one(folder):
        return originals.open_original(folder)
    family, described = _describe(folder)
    found = _by_canonical_name(family, tensors.open_all(folder))
    rows, sizes = family.table(_paths(described, folder)), described.sizes
    head = None if any(row.name == family.HEAD for row in rows) else found.pop(family.HEAD, None)
    if head and head.shape != found.setdefault(family.EMBEDDING, head).shape:
        raise CheckpointError(
            f"{head.path}: {head.name} has shape {head.shape}, the embedding that it is tied to "
            f"{found[family.EMBEDDING].shape}"
        )
    if (most := max(size.get("L", 0) for size in sizes.values())) > len(found):
        raise CheckpointError(f"{folder} has {len(found)} tensors for {most} layers")
    assemble.check(found, rows, sizes, f"{folder} doesn't fit its config.json")
    flat = {path: assemble.leaf(group, found, sizes[group[0].part]) for path, group in by_path(rows).items()}
    for row in rows:
        if row.name == family.EMBEDDING:
            table = found[row.name]
            wanted = (described.llm["vocab_size"], *table.shape[1:])
            flat[row.path] = Lazy(wanted, table.dtype, functools.partial(_read_embedding, table, head, wanted[0]))
    return unflatten_tree(flat)


def _by_canonical_name(family, found):
    """{canonical name: Tensor} without buffers and what has no place in our models."""
    out, unread = {}, []
    for tensor in found:
        name = family.canonical(tensor.name)
        if any(re.fullmatch(buffer, name) for buffer in family.BUFFERS):
            continue
        if any(re.fullmatch(regex, name) for regex in family.UNREAD):
            unread.append(tensor.name)
            continue
        if name in out:
            raise CheckpointError(f"{tensor.path}: {tensor.name} is the same as {out[name].name} in {out[name].path}")
        if tensor.dtype is None:
            raise CheckpointError(
                f"{tensor.path}: {tensor.name} is no tensor of {', '.join(tensors.TYPES)}; quantised weights are not "
                "read"
            )
        out[name] = tensor
    assemble.tell_unread(os.path.dirname(found[0].path), unread)
    return out


def _paths(described: Described, folder):
    """Paths of the leaves of our model for that description."""
    try:
        if described.img is None:
            return leaves.join(llm=parts.family("llm").Model(**described.llm).leaves).keys()
        if described.llm is None:
            return leaves.join(img=parts.family("img").Model(**described.img).leaves).keys()
        return vlm.Model(**described.model).leaves.keys()
    except ValueError as e:
        raise CheckpointError(f"{folder}/config.json: {e}") from None


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
