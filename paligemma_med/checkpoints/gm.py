"""Gemma 3 in the names of its own library's Orbax checkpoints (google-deepmind/gemma, gm/ckpts and gm/nn).

Its transformer has our names but for layers that are unrolled, or stacked by the kind of attention, norms of queries
and keys, and the transposed gate; its image tower is big_vision's ViT. `orbax` has opened the checkpoint; here leaves
are renamed, and stay in their file.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.fit import stack_layers
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

_TOWER = r"(?:SigLiPFromPatches_0|vision_encoder)/siglip_encoder/"
# Ours by theirs, the layers stacked; the first that fits counts.
_NAMES = tuple(
    (re.compile(old), new)
    for old, new in (
        (rf"{_TOWER}(.+)", r"img/\1"),
        (r"embedder/mm_input_projection/w", "connector/proj/kernel"),
        (r"embedder/mm_soft_embedding_norm/scale", "connector/norm/scale"),
        (r"embedder/input_embedding", "llm/embedder/input_embedding"),
        (r"final_norm/scale", "llm/final_norm/scale"),
        (r"layer/attn/_(query|key)_norm/scale", lambda m: f"llm/layers/attn/{m[1][0]}_norm/scale"),
        (r"layer/mlp/gating_einsum(?:/w)?", "llm/layers/mlp/gating_einsum"),
        (r"layer/mlp/linear(?:/w)?", "llm/layers/mlp/linear"),
        (r"layer/((?:attn|pre_attention_norm|post_attention_norm|pre_ffw_norm|post_ffw_norm)/.+)", r"llm/layers/\1"),
    )
)
_GATE = "llm/layers/mlp/gating_einsum"
_KIND = re.compile(
    r"stacked_layers/attention_type_(\d{1,3})/(.+)"
)  # of n kinds, the i-th has layers i, i + n, i + 2n …


def is_gm(tree: Mapping[str, Any]) -> bool:
    """Whether a tree has the names of such a checkpoint."""
    begin = re.compile(r"(?:transformer/)?(?:layer_0|stacked_layers/attention_type_0)/attn/")
    return any(map(begin.match, flatten_tree(tree)))


def from_gm(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Such a tree in our names.

    Args:
      tree: nested dict of arrays or `lazy.Lazy`.
      where: the checkpoint, for messages.

    Returns:
      {"llm": …}, and of a model that reads images "img" and "connector", too; Lazy leaves stay so.

    Raises:
      CheckpointError: a leaf is unknown, or layers are missing.
    """
    flat = {name.removeprefix("transformer/"): leaf for name, leaf in flatten_tree(tree).items()}
    flat = _in_order(flat, where)
    try:
        flat, out = flatten_tree(stack_layers(unflatten_tree(flat), name="layer")), {}
    except CheckpointError as e:
        raise CheckpointError(f"{where}: {e}") from None
    for name, leaf in flat.items():
        for old, new in _NAMES:
            if match := old.fullmatch(name):
                out[match.expand(new) if isinstance(new, str) else new(match)] = leaf
                break
        else:
            raise CheckpointError(f"{where}: {name} is no leaf of Gemma 3's that is known here")
    if gate := out.get(_GATE):  # (layers, 2, F, D)
        if len(gate.shape) != 4:
            raise CheckpointError(f"{where}: mlp/gating_einsum has shape {gate.shape[1:]}, expected 3 axes")
        a, b, c, d = gate.shape
        out[_GATE] = lazy.derive(gate, (a, b, d, c), lambda x: x.swapaxes(-1, -2))
    return unflatten_tree(out)


def _in_order(flat, where):
    """The flat tree, with layers that are stacked by kind in their order, under "layer"."""
    out, kinds = {}, {}
    for name, leaf in flat.items():
        if match := _KIND.fullmatch(name):
            kinds.setdefault(f"layer/{match[2]}", {})[int(match[1])] = leaf
        else:
            out[name] = leaf
    count = 1 + max((i for found in kinds.values() for i in found), default=0)
    for name, found in kinds.items():
        shapes = [found[i].shape for i in range(count) if i in found]
        depth = sum(shape[0] if shape else 0 for shape in shapes)
        lengths = [len(range(i, depth, count)) for i in range(count)]
        if [shape[:1] for shape in shapes] != [(n,) for n in lengths] or len({shape[1:] for shape in shapes}) > 1:
            raise CheckpointError(
                f"{where}: {name.removeprefix('layer/')} has {', '.join(map(str, shapes))} in {len(shapes)} of {count} "
                "kinds of layers; expected layers in turn, all of one shape"
            )
        out[name] = _in_turn(found, (depth, *shapes[0][1:]))
    return out


def _in_turn(kinds, shape):
    def read():
        out = np.empty(shape, kinds[0].dtype)
        for i, leaf in kinds.items():
            out[i :: len(kinds)] = np.asarray(leaf)
        return out

    return lazy.Lazy(shape, kinds[0].dtype, read)
