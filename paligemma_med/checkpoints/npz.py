"""big_vision `.npz` weights: reading, writing, and fitting them to a model.

A file holds one array per leaf under a flat key such as `params/img/head/kernel`. Released files
carry the `params/` prefix, others leave it out; both are read. numpy has no bfloat16, so such
leaves lie in the file as 2-byte void (`V2`) and are given their type back here. Nothing in a file
is ever unpickled.

Everything works on numpy arrays in host memory, or on `lazy.Lazy` ones that are still in their
file, which stay there; no function here touches a device.
"""

import math
import os
import re
import zipfile
from collections.abc import Mapping

import numpy as np

from paligemma_med import files
from paligemma_med.checkpoints import lazy
from paligemma_med.checkpoints.lazy import BFLOAT16, Lazy
from paligemma_med.models.leaves import TreeError, flatten_tree, unflatten_tree

_VOID2 = np.dtype("V2")
_PREFIX = "params/"
_BLOCK = "encoderblock"
_MAX_LISTED = 20
_PIECE = 2**24  # bytes that are cast and written at once


# Weights that can't be read, or that don't fit the model; the message says which and why.
CheckpointError = TreeError


# --- reading -----------------------------------------------------------------------------------


def split_spec(spec: str) -> tuple[str, str | None]:
    """Splits "x.npz:img" into ("x.npz", "img"), and "x.npz" into ("x.npz", None).

    Only a colon right behind `.npz` splits, so drive letters and URLs keep theirs. A string
    without `.npz` is a path as it stands.
    """
    match = re.fullmatch(r"(.*\.npz)(?::(.*))?", spec, flags=re.DOTALL | re.IGNORECASE)
    if not match:
        return spec, None
    path, subtree = match.groups()
    if subtree is not None and not subtree.strip("/"):
        raise CheckpointError(f"{spec!r}: expected a subtree such as 'img' after the colon")
    return path, subtree


def load_npz(path, subtree: str | None = None) -> dict:
    """Reads a big_vision weights file into a nested dict of numpy arrays; else as `open_npz`."""
    return lazy.read_all(open_npz(path, subtree))


def open_npz(path, subtree: str | None = None) -> dict:
    """Opens a big_vision weights file: a nested dict of `lazy.Lazy`, read one by one when asked.

    Args:
      path: the file, or "file.npz:subtree".
      subtree: only this part ("img", "llm/layers").

    Returns:
      The tree below `params/` if the file has that prefix (other top-level entries, such as
      optimizer state, are then left alone), else all of it; floats keep the dtype they were saved
      with, in native byte order.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: not an npz file, a damaged or pickled entry, or no such subtree. Damage
        within an entry shows when it is read.
    """
    path = os.fspath(path)
    if subtree is None:
        path, subtree = split_spec(path)
    with _open_archive(path) as archive:
        keys = list(archive.files)
        if not keys:
            raise CheckpointError(f"{path} holds no arrays")
        if len(set(keys)) < len(keys):
            twice = sorted({k for k in keys if keys.count(k) > 1})
            raise CheckpointError(f"{path} holds these keys twice: {listed(twice)}")
        prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
        names = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
        if subtree is not None:
            names = _select(names, subtree.strip("/"), path)
        flat = {name: _open_array(archive, key, path) for name, key in names.items()}
    try:
        return unflatten_tree(flat)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _open_archive(path: str):
    if not os.path.isfile(path):
        hint = ": expected a local file" if "://" in path else ""
        raise FileNotFoundError(f"no weights file {path}{hint}")
    try:
        archive = np.load(path, allow_pickle=False)
    except Exception as e:  # numpy's answer depends on the first bytes: many types, one meaning
        size = os.path.getsize(path)
        raise CheckpointError(
            f"{path} ({size:,} bytes) is not a readable .npz file; it may be cut short or "
            f"something else (numpy says: {type(e).__name__}: {_first_line(e)})"
        ) from e
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise CheckpointError(f"{path} holds a single array: expected an .npz file of many")
    return archive


def _select(names: dict, subtree: str, path: str) -> dict:
    inside = {n[len(subtree) + 1 :]: k for n, k in names.items() if n.startswith(subtree + "/")}
    if inside:
        return inside
    if subtree in names:
        raise CheckpointError(f"{path}:{subtree} is a single array: expected a folder of arrays")
    top = sorted({n.split("/")[0] for n in names})
    raise CheckpointError(f"{path} has no subtree {subtree!r}: found {listed(top)}")


def _open_array(archive, key: str, path: str) -> Lazy:
    """From the entry's header alone."""
    try:
        shape, dtype = _read_header(archive, key)
    except Exception as e:  # zlib, zipfile, header parsing, ...
        raise _unreadable(path, key, e) from e
    if dtype is None:
        raise CheckpointError(f"{path}: entry {key!r} is not an array")
    if dtype.hasobject:
        raise _unreadable(path, key, ValueError("it holds Python objects"))
    if dtype != _VOID2 and dtype.kind not in "fiubc":
        raise CheckpointError(f"{path}: entry {key!r} has dtype {dtype}: expected numbers, or bfloat16 as V2")
    dtype = BFLOAT16 if dtype == _VOID2 else dtype.newbyteorder("=")
    return Lazy(shape, dtype, lambda: _read_array(path, key, shape, dtype))


def _read_header(archive, key: str):
    names = set(archive.zip.namelist())
    with archive.zip.open(f"{key}.npy" if f"{key}.npy" in names else key) as f:
        if f.peek(len(np.lib.format.MAGIC_PREFIX))[:6] != np.lib.format.MAGIC_PREFIX:
            return None, None
        # Version 3 differs from 2 in the names of fields, which no array of numbers has.
        first = np.lib.format.read_magic(f) == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(f)
    return shape, dtype


def _read_array(path: str, key: str, shape, dtype) -> np.ndarray:
    # Opened anew each time: a handle that stays open would have to be shared, and closed by whom?
    with _open_archive(path) as archive:
        try:
            array = archive[key]
        except Exception as e:
            raise _unreadable(path, key, e) from e
    if dtype == BFLOAT16 and array.dtype == _VOID2:
        array = array.view(BFLOAT16)
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.shape != shape or array.dtype != dtype:
        raise CheckpointError(f"{path}: entry {key!r} changed while the file was in use")
    return array


def _unreadable(path: str, key: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path}: entry {key!r} can't be read; it may be damaged or hold a pickled object, which "
        f"is never loaded (numpy says: {type(error).__name__}: {_first_line(error)})"
    )


# --- writing -----------------------------------------------------------------------------------


def save_npz(path, params: Mapping, *, dtype=None, prefix: str = _PREFIX, progress=None) -> None:
    """Writes a tree as a big_vision weights file, one leaf in memory at a time.

    The file appears whole or not at all: it is written beside `path` under another name, flushed
    to disk and moved into place. Equal trees give equal bytes.

    Args:
      path: where to; must end in `.npz`. Missing folders are made.
      params: nested mapping of arrays (numpy, jax, `lazy.Lazy`, or anything `np.asarray` takes).
      dtype: floating leaves are cast to this ("bfloat16", "float16", "float32", ...); None keeps
        each as it is. Integers and booleans stay.
      prefix: in front of each key; "" writes bare keys.
      progress: called with the number of bytes (of `params`, before the cast) just written.

    Raises:
      CheckpointError: a leaf is not an array of numbers, or a key can't be written.
    """
    path = os.fspath(path)
    if not path.lower().endswith(".npz"):
        raise CheckpointError(f"{path}: expected a file name that ends in .npz")
    dtype = lazy.dtype_of(dtype)
    flat = flatten_tree(params)
    with (
        files.whole_file(path) as f,
        zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
        for key in sorted(flat):
            # A ZipInfo of our own has a fixed date, which a fresh entry would not.
            entry = zipfile.ZipInfo(f"{prefix}{key}.npy")
            entry.external_attr = 0o644 << 16
            with archive.open(entry, "w", force_zip64=True) as out:
                _write_array(out, numbers(key, flat[key]), dtype, progress)


def numbers(key: str, leaf) -> np.ndarray:
    """`leaf` as an array; CheckpointError if it isn't one of numbers."""
    array = np.asarray(leaf)
    if array.dtype != BFLOAT16 and array.dtype.kind not in "fiubc":
        raise CheckpointError(
            f"{key}: expected an array of numbers, found {type(leaf).__name__} of dtype {array.dtype}"
        )
    return array


def _write_array(out, array: np.ndarray, dtype, progress) -> None:
    """As np.lib.format.write_array does, always in C order, cast piece by piece."""
    if dtype is None or not lazy.is_float(array.dtype):
        dtype = array.dtype
    # numpy itself describes bfloat16 as void.
    header = dict(
        descr=np.lib.format.dtype_to_descr(dtype),
        fortran_order=False,
        shape=array.shape,
    )
    np.lib.format.write_array_header_1_0(out, header)
    flat = array.reshape(-1)
    step = max(1, _PIECE // array.dtype.itemsize)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        out.write(piece.astype(dtype, copy=False).tobytes())
        if progress:
            progress(piece.nbytes)


# --- fitting to a model ------------------------------------------------------------------------


def resample_posemb(old, new_n: int) -> np.ndarray:
    """Resamples learned position embeddings [1, N, D] to [1, new_n, D]; N, new_n are squares.

    Linear interpolation over the square grid with the corner points kept, as big_vision does with
    `scipy.ndimage.zoom(order=1)`. Computed in float32, returned in the dtype of `old`; Lazy if
    `old` is.
    """
    old = old if isinstance(old, Lazy) else np.asarray(old)
    if old.ndim != 3 or old.shape[0] != 1:
        raise CheckpointError(f"position embeddings: expected shape (1, N, D), found {old.shape}")
    if old.shape[1] == new_n:
        return old
    side_old, side_new = math.isqrt(old.shape[1]), math.isqrt(max(new_n, 0))
    if side_old**2 != old.shape[1] or side_new**2 != new_n or not side_old or not side_new:
        raise CheckpointError(
            f"position embeddings: can only resample square grids, found {old.shape[1]} positions and {new_n} expected"
        )
    return lazy.derive(old, (1, new_n, old.shape[2]), lambda x: _zoom(x, side_old, side_new))


def _zoom(old: np.ndarray, side_old: int, side_new: int) -> np.ndarray:
    import scipy.ndimage  # here, so that reading a file does not pay for it

    grid = old.astype(np.float32).reshape(side_old, side_old, -1)
    scale = side_new / side_old
    # mode="nearest": with the default, a corner that rounds to just outside the grid would read 0.
    grid = scipy.ndimage.zoom(grid, (scale, scale, 1), order=1, mode="nearest")
    return grid.reshape(1, side_new**2, -1).astype(old.dtype)


def stack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """Unrolled layers `{name}_0 … {name}_{n-1}` -> one `{name}` with a leading layer axis.

    Works at any depth of the tree; a tree without such layers comes back as it is (as a new dict).
    Lazy layers give a Lazy stack.
    """
    pattern = re.compile(rf"(?:(.*)/)?{re.escape(name)}_(0|[1-9]\d*)/(.+)")
    flat, layers = {}, {}
    for key, leaf in flatten_tree(params).items():
        if match := pattern.fullmatch(key):
            parent, number, rest = match.groups()
            stacked = f"{parent}/{name}/{rest}" if parent else f"{name}/{rest}"
            layers.setdefault(parent or "", {}).setdefault(stacked, {})[int(number)] = leaf
        else:
            flat[key] = leaf
    for parent, stacks in layers.items():
        depth = 1 + max(max(by_number) for by_number in stacks.values())
        for key, by_number in stacks.items():
            if len(by_number) < depth:
                gap = next(i for i in range(depth) if i not in by_number)
                raise CheckpointError(
                    f"{key}: layer {gap} is missing, the last one under {parent or 'the tree'} is {depth - 1}"
                )
            shapes = {i: np.shape(by_number[i]) for i in range(depth)}
            for i, shape in shapes.items():
                if shape != shapes[0]:
                    raise CheckpointError(
                        f"{key}: layer {i} has shape {shape}, layer 0 has {shapes[0]}: expected the same"
                    )
            if key in flat:
                raise CheckpointError(f"{key}: the tree holds both stacked and unrolled layers")
            flat[key] = lazy.stack(by_number[i] for i in range(depth))
    return unflatten_tree(flat)


def unstack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """The reverse of `stack_layers`: `{name}` becomes `{name}_0 … {name}_{n-1}`.

    Layers of a Lazy stack are Lazy; each of them, when asked for, reads the whole stack.
    """
    pattern = re.compile(rf"(?:(.*)/)?{re.escape(name)}/(.+)")
    flat, depths = {}, {}
    for key, leaf in flatten_tree(params).items():
        match = pattern.fullmatch(key)
        if not match:
            flat[key] = leaf
            continue
        parent, rest = match.groups()
        base = f"{parent}/{name}" if parent else name
        shape = np.shape(leaf)
        if not shape or depths.setdefault(base, shape[0]) != shape[0]:
            found = f"shape {shape}" if not shape else f"{shape[0]} layers"
            raise CheckpointError(f"{key}: found {found}, expected a leading axis of {depths.get(base, 'n')} layers")
        for i in range(shape[0]):
            layer = lazy.derive(leaf, shape[1:], lambda x, i=i: x[i])
            flat[f"{base}_{i}/{rest}"] = layer
    return unflatten_tree(flat)


def extend_vocab(embedding, rows: int, *, seed: int = 0) -> np.ndarray:
    """Embedding table [V, D] -> [rows, D]; new rows are normal with standard deviation 0.02.

    For a language model on its own (256,000 rows) that PaliGemma's 257,152 tokens shall use; the
    0.02 is big_vision's. Never done silently: `match_params` reports the mismatch instead.
    """
    embedding = embedding if isinstance(embedding, Lazy) else np.asarray(embedding)
    missing, width = rows - embedding.shape[0], embedding.shape[1]
    if missing < 0:
        raise CheckpointError(f"embedding table: found {embedding.shape[0]} rows, can't shrink it to {rows}")

    def extend(table):
        new = np.random.default_rng(seed).standard_normal((missing, width), np.float32)
        return np.concatenate([table, (0.02 * new).astype(table.dtype)])

    return lazy.derive(embedding, (rows, width), extend)


def match_params(params: Mapping, expected: Mapping) -> dict:
    """Fits loaded weights to the tree a model expects, or says everything that doesn't fit.

    Position embeddings (`…/pos_embedding`) of another length are resampled, and ViT layers are
    stacked or unrolled as `expected` has them. Dtypes are left alone, and Lazy leaves unread.

    Args:
      params: nested dict of arrays or `lazy.Lazy`.
      expected: nested dict whose leaves have a `.shape` (arrays, or `jax.ShapeDtypeStruct`).

    Returns:
      A new nested dict with the keys of `expected`.

    Raises:
      CheckpointError: one message with each missing, unexpected or mis-shaped key, and the shapes
        expected and found.
    """
    want = {key: tuple(leaf.shape) for key, leaf in flatten_tree(expected).items()}
    unrolled = any(re.search(rf"(^|/){_BLOCK}_\d+/", key) for key in want)
    have = flatten_tree((unstack_layers if unrolled else stack_layers)(params))

    problems = []
    matched = {}
    for key, shape in want.items():
        if key not in have:
            problems.append(f"{key}: missing, expected {shape}")
            continue
        leaf = have[key]
        found = tuple(np.shape(leaf))
        if _is_posemb(key) and _differ_in_length(found, shape):
            try:
                leaf = resample_posemb(leaf, shape[1])
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


def raise_all(problems: list, what: str, total: int) -> None:
    """One CheckpointError that lists `problems`, one a line; none if there are none."""
    if not problems:
        return
    shown = "\n  ".join(problems[:_MAX_LISTED])
    rest = len(problems) - _MAX_LISTED
    more = f"\n  … and {rest} more" if rest > 0 else ""
    raise CheckpointError(f"{what}: {len(problems)} of {total} keys differ\n  {shown}{more}")


def _is_posemb(key: str) -> bool:
    return key.rsplit("/", 1)[-1] == "pos_embedding"


def _differ_in_length(found: tuple, shape: tuple) -> bool:
    return len(found) == len(shape) == 3 and found[0] == shape[0] == 1 and found[1] != shape[1] and found[2] == shape[2]


def _first_line(error: Exception) -> str:
    return (str(error) or "no message").splitlines()[0][:200]


def listed(items) -> str:
    """ "a, b, c and 7 more"."""
    items = [str(i) for i in items]
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
