"""Writing Hugging Face directories: our tree → config.json and safetensors files, without PyTorch."""

import math
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, raise_all
from paligemma_med.checkpoints.fit import stack_layers
from paligemma_med.checkpoints.hf import families, tensors
from paligemma_med.checkpoints.hf.config import write_json
from paligemma_med.checkpoints.hf.layout import Row, Sizes, by_path, measure, relayout, shape
from paligemma_med.models.layers import lora
from paligemma_med.models.leaves import flatten_tree

# Names of what a tokenizer and a processor consist of, in any version of transformers.
PROCESSOR = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    row: Row
    at: tuple[int, ...]  # its index in our array
    padding: int  # rows appended to ours, copies of the first

    @property
    def nbytes(self):
        return math.prod(self.shape) * self.dtype.itemsize


def save_hf(
    folder: os.PathLike | str,
    params: Mapping[str, Any],
    *,
    img: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    connector: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 2 * 2**30,
    overwrite: bool = False,
    processor: os.PathLike | str | None = None,
    beside: Callable[[Mapping, Mapping | None], Mapping[str, Mapping | str]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Writes a directory that transformers' `from_pretrained` loads: PaliGemmaForConditionalGeneration's,
    Gemma3ForConditionalGeneration's, or that of a language model or an image tower by itself (Gemma3ForCausalLM,
    LlamaForCausalLM, BloomForCausalLM, ViTModel).

    Names are those of Google's pages, which every version of transformers reads: 4.51.3, 4.53.3, 4.57.1, 5.0.0, 5.8.0
    and 5.23.0 were tried. (All between the first and the last of them leave out Gemma 2's soft-cap of the output,
    which changes logits but no greedy answer.) One leaf is in memory at a time, and the folder appears whole or not at
    all. It doesn't include the tokenizer, unless `beside` does. The image processor's settings are
    Google's but for bilinear resizing, by which it makes the same pixels as `pp` does.

    The embedding of a model with images gets 64 more rows, of which the first is the image token. They are copies of
    row 0 (<pad>), so they have its logit: at a tie argmax takes the lower token, so none of them is ever the greedy
    answer, as rows of zeros would be if all logits were below 0.

    Args:
      folder: the directory to write.
      params: {"img": …, "llm": …} of arrays or `lazy.Lazy`, without adapters.
      img, llm, connector: the model's config dicts, for what shapes don't determine: soft-caps, the scale of queries,
        windows, RoPE, eps of norms. Without `llm`, all but Gemma 1 must have the sizes of a known variant.
      dtype: what tensors are cast to; None keeps each as it is.
      max_shard_bytes: maximum size of each file.
      overwrite: replace an existing directory of this kind.
      processor: a folder whose files of `PROCESSOR` are copied in as they are, in place of ours.
      beside: is given config.json and preprocessor_config.json (None: it has none), and gives further files, or
        others in place of ours, as {name: what becomes JSON, or a text}.
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      FileExistsError: `folder` exists.
      FileNotFoundError: `processor` has no tokenizer.
      CheckpointError: the tree fits no known family, or `img` or `llm` contradict it.
    """
    folder, dtype = os.fspath(folder), lazy.dtype_of(dtype)
    copied = [] if processor is None else _processor_files(processor)
    flat = {
        key: leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
        for key, leaf in flatten_tree(stack_layers(params)).items()
    }
    family, rows = _table_of(flat, llm)
    sizes = measure({path: tuple(np.shape(flat[path])) for path in by_path(rows)})
    config = family.make_config(sizes, flat.keys(), img, llm, connector)
    planned = _plan(family, flat, rows, sizes, dtype)
    config["torch_dtype"] = str(_widest({t.dtype for t in planned}))
    shards = _shards(planned, max_shard_bytes)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    names = names if len(shards) > 1 else [tensors.SINGLE]
    replaces = (tensors.SINGLE, tensors.INDEX) if overwrite else None
    with files.whole_folder(folder, replaces=replaces) as new:
        write_json(os.path.join(new, "config.json"), config)
        tokens = {k: config[k] for k in ("bos_token_id", "eos_token_id", "pad_token_id") if k in config}
        if tokens:
            write_json(os.path.join(new, "generation_config.json"), tokens)
        if processor := family.make_processor(sizes):
            write_json(os.path.join(new, "preprocessor_config.json"), processor)
        for name, content in (beside(config, processor) if beside else {}).items():
            path = os.path.join(new, name)
            files.write_text(path, content) if isinstance(content, str) else write_json(path, content)
        for path in copied:
            shutil.copyfile(path, os.path.join(new, os.path.basename(path)))
        if len(shards) > 1:
            total = sum(t.nbytes for t in planned)
            where = {t.name: name for name, shard in zip(names, shards) for t in shard}
            index = {"metadata": {"total_size": total}, "weight_map": where}
            write_json(os.path.join(new, tensors.INDEX), index)
        _write_shards(new, names, shards, flat, sizes, progress)


def _processor_files(folder):
    """Paths of a folder's files of `PROCESSOR`; FileNotFoundError without a tokenizer among them."""
    folder = os.path.expanduser(os.fspath(folder))
    found = [name for name in PROCESSOR if os.path.isfile(os.path.join(folder, name))]
    if not {"tokenizer.json", "tokenizer.model"} & {*found}:
        raise FileNotFoundError(f"{folder} has no processor: expected tokenizer.json or tokenizer.model, found {found}")
    return [os.path.join(folder, name) for name in found]


def _table_of(flat, llm):
    """(family, its rows) of a tree; CheckpointError if no family fits."""
    factors = [key for key in flat if lora.is_factor(key)]
    if factors:
        raise CheckpointError(
            f"the weights have adapters ({factors[0]} and {len(factors) - 1} more), which a "
            "Hugging Face model has no place for: merge them (--merge), or write them (--to peft)"
        )
    family = families.of_model(flat.keys(), llm)
    if family is None:
        raise CheckpointError(
            "transformers has no class for this tower, connector and language model together: write them as parts "
            "(tools.convert_checkpoint --to=hf)"
        )
    rows = family.table(flat.keys())
    if cut := next((row.name for row in rows if row.piece[1] > 1), None):
        raise CheckpointError(f"{family.NAME} is read, but not written: {cut} holds several of our parameters")
    expected = {row.path for row in rows}
    problems = [f"{p}: missing" for p in sorted(expected - flat.keys())]
    problems += [f"{p}: unexpected, found {np.shape(flat[p])}" for p in sorted(flat.keys() - expected)]
    problems += [
        f"{p}: has dtype {flat[p].dtype}, expected a floating type"
        for p in sorted(expected & flat.keys())
        if not lazy.is_float(np.dtype(flat[p].dtype))
    ]
    raise_all(problems, f"the weights are not {family.NAME}'s", len(expected))
    return family, rows


def _plan(family, flat, rows, sizes, dtype):
    """`plan` under the names that the family publishes."""
    rows = [row._replace(name=families.in_style(family, row.name, family.PUBLISHED)) for row in rows]
    embedding = families.in_style(family, family.EMBEDDING, family.PUBLISHED)
    return plan(rows, flat, sizes, dtype, padding={embedding: family.PADDING})


def plan(
    rows: Iterable[Row],
    flat: Mapping[str, Any],
    sizes: Sizes,
    dtype: np.dtype | None,
    *,
    padding: Mapping[str, int] | None = None,
) -> list[Planned]:
    """All tensors in the order they are written: our parameters one after the other.

    Args:
      rows: with the names to write.
      flat: {path: array}.
      dtype: of all; None keeps each as it is.
      padding: {name: rows to append}.
    """
    out = []
    for path, group in sorted(by_path(rows).items()):
        size, leaf = sizes[group[0].part], group[0].leaf
        kind = dtype or np.dtype(flat[path].dtype)
        for i in range(size["L"]) if leaf.stacked else (None,):
            for row in group:
                length, *rest = shape(row.theirs, size)
                more = (padding or {}).get(row.name, 0)
                at = tuple(n for n in (i, row.index) if n is not None)
                out.append(Planned(row.name_in(i), kind, (length + more, *rest), row, at, more))
    return out


def _shards(planned, most):
    out, used = [[]], 0
    for tensor in planned:
        if out[-1] and used + tensor.nbytes > most:
            out.append([])
            used = 0
        out[-1].append(tensor)
        used += tensor.nbytes
    return out


def _widest(dtypes):
    """The type in which no tensor loses a bit, since transformers loads all tensors as one type."""
    widest = max(dtypes, key=lambda d: d.itemsize)
    return np.dtype("float32") if len(dtypes) > 1 and widest.itemsize == 2 else widest


def _write_shards(folder, names, shards, flat, sizes, progress):
    leaf, path = None, None
    for name, shard in zip(names, shards):
        with open(os.path.join(folder, name), "wb") as f:
            f.write(tensors.header((t.name, t.dtype, t.shape) for t in shard))
            for tensor in shard:
                if tensor.row.path != path:
                    leaf = None  # first free the previous one
                    leaf, path = np.asarray(flat[tensor.row.path]), tensor.row.path
                write_tensor(f, tensor, leaf[tensor.at], sizes[tensor.row.part])
                if progress:
                    progress(leaf[tensor.at].nbytes)


def write_tensor(f: BinaryIO, tensor: Planned, x: np.ndarray, size: Mapping[str, int]) -> None:
    """Appends the bytes of a tensor, made of the piece of our array that it is of."""
    x = relayout(x, tensor.row.ours, tensor.row.theirs, size)
    pieces = [x]
    if tensor.padding:
        pieces.append(np.broadcast_to(x[:1], (tensor.padding, *x.shape[1:])))
    for piece in pieces:
        out = np.asarray(piece.astype(tensor.dtype, copy=False), order="C")
        f.write(out.reshape(-1).view(np.uint8).data)
