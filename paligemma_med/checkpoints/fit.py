"""Fitting weights to a model: layers stacked or unrolled, positions of another resolution, a larger vocabulary.

The parts' own tables say what a leaf is (`models.parts`). Nothing is read: a `lazy.Lazy` leaf gives a Lazy one.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.errors import CheckpointError, raise_all
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models import parts
from paligemma_med.models.leaves import flatten_tree, stack_of, unflatten_tree

# The folder of the image tower's layers. big_vision's tower has one folder per layer unless it is scanned, as its
# language models always are.
_BLOCK = stack_of(leaf for path, leaf in parts.LEAVES.items() if path.startswith("img/")).rpartition("/")[2]


# How position embeddings are resampled.
RESAMPLING = ("linear", "bicubic")


def match_params(params: Mapping, expected: Mapping, *, resampling: str = RESAMPLING[0]) -> dict:
    """Fits loaded weights to the tree a model expects, or lists everything that doesn't fit.

    Position embeddings of another length are resampled, and the image tower's layers are stacked or unrolled like
    `expected`. Dtypes are unchanged, and Lazy leaves stay unread.

    Args:
      params: nested dict of arrays or `lazy.Lazy`.
      expected: nested dict whose leaves have a `.shape` (arrays, or `jax.ShapeDtypeStruct`).
      resampling: as in `resample_posemb`.

    Returns:
      A new nested dict with the keys of `expected`.

    Raises:
      CheckpointError: one message with every missing, unexpected or mis-shaped key, and the shapes expected
        and found.
    """
    want = {key: tuple(leaf.shape) for key, leaf in flatten_tree(expected).items()}
    unrolled = any(_unrolled(_BLOCK).fullmatch(key) for key in want)
    have = flatten_tree((unstack_layers if unrolled else stack_layers)(params))

    problems = []
    matched = {}
    for key, shape in want.items():
        if key not in have:
            problems.append(f"{key}: missing, expected {shape}")
            continue
        leaf = have[key]
        found = tuple(np.shape(leaf))
        if _is_positions(key) and _differ_in_length(found, shape):
            try:
                leaf = resample_posemb(leaf, shape[1], method=resampling)
                found = leaf.shape
            except CheckpointError as e:
                problems.append(f"{key}: {e}")
                continue
        if found != shape:
            problems.append(f"{key}: expected {shape}, found {found}")
        matched[key] = leaf
    for key in have:
        if key not in want:
            problems.append(f"{key}: unexpected, found {tuple(np.shape(have[key]))}")
    raise_all(problems, "the weights don't fit the model", len(want.keys() | have.keys()))
    return unflatten_tree(matched)


# --- layers ------------------------------------------------------------------------------------


def stack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """Unrolled layers `{name}_0 … {name}_{n-1}` -> one `{name}` with a leading layer axis.

    Works at any depth of the tree; a tree without such layers is returned unchanged (as a new dict). Lazy
    layers give a Lazy stack.
    """
    pattern = _unrolled(name)
    flat, folders = {}, {}
    for key, leaf in flatten_tree(params).items():
        if match := pattern.fullmatch(key):
            folder, layer, rest = match.groups()
            folders.setdefault(folder, {}).setdefault(rest, {})[int(layer)] = leaf
        else:
            flat[key] = leaf
    for folder, leaves in folders.items():
        depth = 1 + max(max(by_layer) for by_layer in leaves.values())
        for rest, by_layer in leaves.items():
            key = f"{folder}/{rest}"
            if key in flat:
                raise CheckpointError(f"{key}: the tree holds both stacked and unrolled layers")
            flat[key] = _stack(key, by_layer, depth)
    return unflatten_tree(flat)


def _unrolled(name):
    """Matches the path of a leaf in one of several layers: (folder of the stack, layer, rest)."""
    return re.compile(rf"((?:.*/)?{re.escape(name)})_(0|[1-9]\d*)/(.+)")


def _stack(key, by_layer, depth):
    for i in range(depth):
        if i not in by_layer:
            raise CheckpointError(f"{key}: layer {i} is missing, the last one there is {depth - 1}")
        if (shape := np.shape(by_layer[i])) != np.shape(by_layer[0]):
            raise CheckpointError(
                f"{key}: layer {i} has shape {shape}, layer 0 has {np.shape(by_layer[0])}: expected the same"
            )
    return lazy.stack(by_layer[i] for i in range(depth))


def unstack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """The reverse of `stack_layers`: `{name}` becomes `{name}_0 … {name}_{n-1}`.

    Layers of a Lazy stack are Lazy; reading any of them reads the whole stack.
    """
    pattern = re.compile(rf"((?:.*/)?{re.escape(name)})/(.+)")
    flat, depths = {}, {}
    for key, leaf in flatten_tree(params).items():
        match = pattern.fullmatch(key)
        if not match:
            flat[key] = leaf
            continue
        (folder, rest), shape = match.groups(), np.shape(leaf)
        if not shape or depths.setdefault(folder, shape[0]) != shape[0]:
            found = f"shape {shape}" if not shape else f"{shape[0]} layers"
            raise CheckpointError(f"{key}: found {found}, expected a leading axis of {depths.get(folder, 'n')} layers")
        for i in range(shape[0]):
            flat[f"{folder}_{i}/{rest}"] = lazy.derive(leaf, shape[1:], lambda x, i=i: x[i])
    return unflatten_tree(flat)


# --- position embeddings -----------------------------------------------------------------------


def _is_positions(key: str) -> bool:
    # The tree may be a single part's, whose leaves don't begin with the part's name.
    return any(leaf.role == "positions" and f"/{leaf.path}".endswith(f"/{key}") for leaf in parts.LEAVES.values())


def _differ_in_length(found: tuple, shape: tuple) -> bool:
    return len(found) == len(shape) == 3 and found[0] == shape[0] == 1 and found[1] != shape[1] and found[2] == shape[2]


def resample_posemb(old, new_n: int, *, method: str = RESAMPLING[0]) -> np.ndarray:
    """Resamples learned position embeddings [1, N, D] to [1, new_n, D]; N, new_n are squares, or both squares plus one:
    then the first is a class token's, which stays as it is.

    Args:
      method: "linear": over the square grid with the corner points kept, as big_vision does with
        `scipy.ndimage.zoom(order=1)`; "bicubic": as PyTorch's `interpolate(align_corners=False)` does, with which
        EVA's tower is brought to 448 px (LAVIS, models/eva_vit.py).

    Returns:
      Computed in float32, in the dtype of `old`; Lazy if `old` is.

    Raises:
      CheckpointError: they aren't embeddings of a square grid.
    """
    old = old if isinstance(old, Lazy) else np.asarray(old)
    if old.ndim != 3 or old.shape[0] != 1:
        raise CheckpointError(f"position embeddings: expected shape (1, N, D), found {old.shape}")
    if method not in RESAMPLING:
        raise ValueError(f"resampling is {method!r}; expected one of {RESAMPLING}")
    if old.shape[1] == new_n:
        return old
    first = int(_has_class_token(old.shape[1]) and _has_class_token(new_n))
    side_old, side_new = math.isqrt(old.shape[1] - first), math.isqrt(max(new_n - first, 0))
    if side_old**2 + first != old.shape[1] or side_new**2 + first != new_n or not side_old or not side_new:
        raise CheckpointError(
            f"position embeddings: can only resample square grids, found {old.shape[1]} positions and {new_n} expected"
        )
    zoom = _zoom if method == "linear" else _bicubic

    def resample(x):
        return np.concatenate([x[:, :first], zoom(x[:, first:], side_old, side_new)], axis=1)

    return lazy.derive(old, (1, new_n, old.shape[2]), resample)


def _has_class_token(count):
    return count > 1 and math.isqrt(count) ** 2 != count and math.isqrt(count - 1) ** 2 == count - 1


def _zoom(old: np.ndarray, side_old: int, side_new: int) -> np.ndarray:
    import scipy.ndimage  # here, so that reading a file does not pay for it

    grid = old.astype(np.float32).reshape(side_old, side_old, -1)
    scale = side_new / side_old
    # mode="nearest": with the default, a corner that rounds to just outside the grid would read 0.
    grid = scipy.ndimage.zoom(grid, (scale, scale, 1), order=1, mode="nearest")
    return grid.reshape(1, side_new**2, -1).astype(old.dtype)


def _bicubic(old: np.ndarray, side_old: int, side_new: int) -> np.ndarray:
    """Cubic convolution with PyTorch's coefficient, which no resampling of scipy or JAX has; edges are repeated."""
    at = (np.arange(side_new) + 0.5) * side_old / side_new - 0.5
    taps = np.floor(at).astype(int)[:, None] + np.arange(-1, 3)
    t, a = np.abs(at[:, None] - taps), -0.75
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    weights = np.zeros((side_new, side_old), np.float32)
    rows = np.arange(side_new)[:, None]
    np.add.at(weights, (rows, taps.clip(0, side_old - 1)), np.where(t <= 1, near, far))
    grid = old.astype(np.float32).reshape(side_old, side_old, -1)
    grid = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, optimize=True)
    return grid.reshape(1, side_new**2, -1).astype(old.dtype)


# --- vocabulary --------------------------------------------------------------------------------


def extend_vocab(embedding, rows: int, *, seed: int = 0) -> np.ndarray:
    """Embedding table [V, D] -> [rows, D]; new rows are normal with standard deviation 0.02.

    For a pure language model (256,000 rows) to be used with PaliGemma's 257,152 tokens; the 0.02 is
    big_vision's. Never done silently: `match_params` reports the mismatch instead.
    """
    embedding = embedding if isinstance(embedding, Lazy) else np.asarray(embedding)
    missing, width = rows - embedding.shape[0], embedding.shape[1]
    if missing < 0:
        raise CheckpointError(f"embedding table: found {embedding.shape[0]} rows, can't shrink it to {rows}")

    def extend(table):
        new = np.random.default_rng(seed).standard_normal((missing, width), np.float32)
        return np.concatenate([table, (0.02 * new).astype(table.dtype)])

    return lazy.derive(embedding, (rows, width), extend)
