"""Quantises frozen weights to 8 or 4 bits: config.frozen_dtype = "int8" or "nf4".

- int8: one float32 scale for each output of a kernel, 1/127.5 of the largest weight on its
  inputs.
- nf4 (QLoRA, arXiv 2305.14314): two codes in a byte along the kernel's last input axis, and one
  bfloat16 scale, the largest weight, for each block of up to 64 along that axis.

Quantised are the kernels that adapters can have, and the vocabulary table: that is int8 by rows in
either case, since its errors are the logits' own. Biases, norms, position embeddings and the patch
kernel are 0.05 % of PaliGemma, and stay in bfloat16. What is trained is never quantised.

Codes and scales equal those of the library qwix, with which the tests compare them. The library
itself isn't used: its model-wide providers replace the products that a module calls, and handle
neither a look-up in the table (whose transpose gives the logits) nor a kernel of several projections
that is indexed before use; and its `quantize` compiles a program for each shape, which took four
times as long for nf4 as the few lines here. `models/layers/quantised.py` reads codes.
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from paligemma_med.models import parts
from paligemma_med.models.layers.quantised import NF4, SCALE
from paligemma_med.models.leaves import Leaf

KINDS = ("int8", "nf4")
REST = "bfloat16"  # what isn't quantised
BLOCK = 64
_ROWS = 2**14  # rows of the table to process at a time

_BORDERS = (np.array(NF4[1:], np.float32) + np.array(NF4[:-1], np.float32)) / 2  # of codes


def kind_of(name: str, shape, wanted: str, leaves: Mapping[str, Leaf] | None = None) -> str | None:
    """Which of KINDS the parameter `name` is stored as if config.frozen_dtype is `wanted`.

    Args:
      leaves: the model's table of leaves, {path: Leaf}; by default PaliGemma's.

    Returns:
      `wanted`; "int8" for the table, and for what doesn't fit in pairs; None if not quantised.
    """
    leaf = _table(leaves).get(name)
    if leaf is None or leaf.role not in ("product", "table"):
        return None
    odd = shape[leaf.input_axes[-1]] % 2
    return "int8" if leaf.role == "table" or odd else wanted


def _table(leaves):
    return parts.LEAVES if leaves is None else leaves


def stored(name: str, x, kind: str, leaves: Mapping[str, Leaf] | None = None) -> dict[str, jax.ShapeDtypeStruct]:
    """What a parameter becomes when stored in `kind`.

    Args:
      x: has the dense parameter's shape, and its sharding (or None). Codes and scales are cut in the same
        way as far as possible.
      leaves: as for `kind_of`.

    Returns:
      {name: codes, name of the scales: scales}, of jax.ShapeDtypeStruct.
    """
    codes, scale = list(x.shape), list(x.shape)
    axes = _table(leaves)[name].input_axes
    if kind == "int8":
        for i in axes:
            scale[i] = 1
        types = jnp.int8, jnp.float32
    else:
        codes[axes[-1]] //= 2
        scale[axes[-1]] //= _block(x.shape[axes[-1]])
        types = jnp.uint8, jnp.bfloat16
    return {
        n: jax.ShapeDtypeStruct(shape, dtype, sharding=_cut(x.sharding, shape))
        for n, shape, dtype in zip((name, name + SCALE), (codes, scale), types)
    }


def _block(size):
    """How many weights of an axis of `size` share a scale: its largest divisor up to BLOCK."""
    return next(n for n in range(min(size, BLOCK), 0, -1) if size % n == 0)


def _cut(where, shape):
    """The sharding, without the axes that don't divide `shape`."""
    if not isinstance(where, NamedSharding):
        return where
    mesh = where.mesh.shape

    def parts(axes):
        return math.prod(mesh[a] for a in ((axes,) if isinstance(axes, str) else axes or ()))

    spec = [axes if n % parts(axes) == 0 else None for axes, n in zip(where.spec, shape)]
    return NamedSharding(where.mesh, PartitionSpec(*spec))


def quantise(name: str, array, kind: str, leaves: Mapping[str, Leaf] | None = None) -> dict[str, np.ndarray]:
    """Codes and scales of a parameter, as numpy arrays, made layer by layer.

    Args:
      array: float[…], on the host.
      kind: of `kind_of`.
      leaves: as for `kind_of`.

    Returns:
      {name: codes, name of the scales: scales}, shapes and dtypes as in `stored`.

    Raises:
      ValueError: a weight isn't finite.
    """
    leaf = _table(leaves)[name]
    shapes = stored(name, jax.ShapeDtypeStruct(array.shape, jnp.float32), kind, leaves)
    out = {n: np.empty(x.shape, x.dtype) for n, x in shapes.items()}
    for i in _pieces(leaf, array.shape[0]):
        layer = np.asarray(array[i], np.float32)
        if not np.isfinite(layer).all():
            raise ValueError(f"{name} has weights that aren't finite, and can't be quantised.")
        for n, x in zip(out, _quantise(layer, kind, leaf.input_axes)):
            out[n][i] = x
    return out


def _pieces(leaf, length):
    """Indices along the first axis: layer by layer, or some rows of the table at a time."""
    if leaf.stacked:
        return range(length)
    step = _ROWS if leaf.role == "table" else length
    return [slice(i, i + step) for i in range(0, length, step)]


def _quantise(layer, kind, axes):
    """(codes, scales) of float32[…], whose inputs are on `axes`."""
    if kind == "int8":
        scale = _or_one(np.max(np.abs(layer), axes, keepdims=True) / np.float32(127.5))
        return np.clip(np.rint(layer / scale), -128, 127), scale
    # The axis of blocks and, behind it, that of the weights in each.
    axis = axes[-1] % layer.ndim
    size = _block(layer.shape[axis])
    split = (*layer.shape[:axis], -1, size, *layer.shape[axis + 1 :])
    blocks = layer.reshape(split)
    scale = _or_one(np.max(np.abs(blocks), axis + 1, keepdims=True))
    blocks = blocks / scale
    codes = np.zeros(blocks.shape, np.uint8)
    for border in _BORDERS:
        codes += blocks > border
    codes = np.moveaxis(codes.reshape(layer.shape), axis, -1)
    pairs = codes[..., ::2] | codes[..., 1::2] << 4
    return np.moveaxis(pairs, -1, axis), np.squeeze(scale, axis + 1)


def _or_one(scale):
    """Scales of zeros are 1."""
    return np.where(scale > 0, scale, np.float32(1))
