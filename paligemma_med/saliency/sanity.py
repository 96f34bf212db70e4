"""Sanity checks: does a map depend on what the model has learned, and on the question?

A map can look good and say nothing in two ways. It may stay the same when the weights are replaced by
noise: then it shows the picture, as an edge detector would, and not the model (Adebayo et al., "Sanity
Checks for Saliency Maps", arXiv 1810.03292: weights are randomised layer by layer from the output
down). Or it may stay the same when another question is asked about the same image.

Maps are compared by rank correlation, which sees order and not scale.

Axis letters: Q questions, P patches.
"""

import itertools
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
import scipy.stats

from paligemma_med.models import lora_targets, parts
from paligemma_med.models.leaves import Leaf, stack_of

# The check fails where the mean rank correlation is above this: ranks that correlate by 0.5 share a
# quarter of their variance, and a larger share would come from something other than the weights.
MAX_AFTER_RANDOMISING = 0.5
# Two questions on one image rightly look at one patient, and often at one organ. 0.9 leaves only a
# fifth of the ranks' variance to the question.
MAX_BETWEEN_QUESTIONS = 0.9


class _Stage(NamedTuple):
    """What is randomised together: some leaves, or one layer of them."""

    name: str
    paths: frozenset[str]
    layer: int | None = None


def stages(params, leaves: dict[str, Leaf] | None = None) -> list[str]:
    """Names of the stages of randomisation, from the output down.

    Part by part, the last one first: the modules after its layers, one by one; its layers from last to
    first; everything before them together. In PaliGemma: the language model's last norm, its layers,
    its embedding table (tied to the output, but the input too, hence below the layers), the tower's
    head and last norm, its layers, its patch and position embeddings.

    Args:
      params: {"img": …, "llm": …} as of `vlm.Model`.
      leaves: the model's table of leaves; by default PaliGemma's.

    Returns:
      list of str, such as "llm/layers/17".
    """
    return [stage.name for stage in _stages(_flat(params), leaves)]


def _stages(flat, leaves):
    table = {path: leaf for path, leaf in (parts.LEAVES if leaves is None else leaves).items() if path in flat}
    out = []
    for part in reversed(dict.fromkeys(path.split("/")[0] for path in table)):
        below, layers, above = [], [], []
        for leaf in table.values():
            if leaf.path.startswith(f"{part}/"):
                (layers if leaf.stacked else above if layers else below).append(leaf)
        if not layers:
            below, above = [], below
        for module in reversed(dict.fromkeys(map(_module, above))):
            out.append(_Stage(module, frozenset(leaf.path for leaf in above if _module(leaf) == module)))
        if layers:
            stack, paths = stack_of(layers), frozenset(leaf.path for leaf in layers)
            depth = len(flat[layers[0].path])
            out += [_Stage(f"{stack}/{i}", paths, i) for i in reversed(range(depth))]
        if below:
            modules = {_module(leaf) for leaf in below}
            name = modules.pop() if len(modules) == 1 else f"{part}/embeddings"
            out.append(_Stage(name, frozenset(leaf.path for leaf in below)))
    return out


def _module(leaf):
    """The module of a leaf, or the leaf itself if it belongs to the part directly."""
    return leaf.folder if "/" in leaf.folder else leaf.path


def _flat(params):
    return {"/".join(str(p.key) for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(params)}


def randomised(params, which, seed: int = 0, leaves: dict[str, Leaf] | None = None) -> dict:
    """`params` with the stages `which` (names from `stages`) replaced by noise.

    Each leaf of a layer becomes normal noise with the leaf's mean and standard deviation: activations
    keep their scale, and what was learned is gone. Noise depends only on seed, leaf and layer. A leaf
    with one value throughout keeps it. Types and devices are kept; untouched leaves are shared.
    Adapters and scales are randomised with the kernel they belong to.

    Raises:
      ValueError: a name that isn't among the stages.
    """
    every = _stages(_flat(params), leaves)
    if unknown := sorted(set(which) - {stage.name for stage in every}):
        raise ValueError(f"There are no stages {unknown}; see sanity.stages.")
    chosen = [stage for stage in every if stage.name in which]
    by_name = lora_targets.leaf_by_name(lora_targets.table_for(_flat(params)) if leaves is None else leaves)

    def of_leaf(path, leaf):
        name = "/".join(str(p.key) for p in path)
        mine = [stage.layer for stage in chosen if by_name[name].path in stage.paths]
        if not mine:
            return leaf
        if mine == [None]:
            return _noise(leaf, (seed, _hash(name), 0))
        out = np.array(leaf)
        for i in mine:
            out[i] = _noise(out[i], (seed, _hash(name), i))
        return _like(out, leaf)

    return jax.tree_util.tree_map_with_path(of_leaf, params)


def cascade(params, seed: int = 0, leaves: dict[str, Leaf] | None = None) -> Iterator[tuple[str, dict]]:
    """Yields (stage, params with this stage and all above it randomised); the last is all noise."""
    for name in stages(params, leaves):
        params = randomised(params, (name,), seed, leaves)  # the stages above keep their noise
        yield name, params


def similarity(a, b) -> float:
    """Spearman's rank correlation of two maps of one size, in [-1, 1]; ties share their mean rank.

    0 where one of the maps is constant and so has no order.

    Raises:
      ValueError: maps of different sizes.
    """
    a, b = np.ravel(a), np.ravel(b)
    if a.size != b.size:
        raise ValueError(f"The maps have {a.size} and {b.size} values; expected as many.")
    a, b = (scipy.stats.rankdata(x) - (x.size + 1) / 2 for x in (a, b))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else 0.0


def between_questions(maps, images, questions, max_pairs: int = 2000, seed: int = 0) -> dict[str, list]:
    """How alike maps of different questions are, on the same image and on different images.

    Different images show what all maps share (the centre, a corner that collects attention); the
    figure on the same image should be nearer to theirs than to 1.

    Args:
      maps: float[Q, P].
      images, questions: Q ids or texts each.
      max_pairs: of each kind; drawn by `seed` if there are more.

    Returns:
      dict(same_image=list of (image, similarity), other_image=list of similarities).
    """
    pairs = [(i, j) for i, j in itertools.combinations(range(len(maps)), 2) if questions[i] != questions[j]]
    same = [(i, j) for i, j in pairs if images[i] == images[j]]
    other = [(i, j) for i, j in pairs if images[i] != images[j]]
    rng = np.random.default_rng(seed)
    same, other = (
        [x[k] for k in sorted(rng.choice(len(x), min(len(x), max_pairs), replace=False))] for x in (same, other)
    )
    return dict(
        same_image=[(images[i], similarity(maps[i], maps[j])) for i, j in same],
        other_image=[similarity(maps[i], maps[j]) for i, j in other],
    )


def _noise(leaf, key):
    x = np.asarray(leaf, np.float32)
    noise = np.random.default_rng(key).standard_normal(x.shape, np.float32)
    return _like(noise * x.std() + x.mean(), leaf)


def _like(array, leaf):
    array = array.astype(leaf.dtype)
    return jax.device_put(array, leaf.sharding) if isinstance(leaf, jax.Array) else array


def _hash(name):
    return zlib.crc32(name.encode())
