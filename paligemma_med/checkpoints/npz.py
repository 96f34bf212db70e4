"""big_vision `.npz` weights: reading, writing, and fitting them to a model.

A file holds one array per leaf under a flat key such as `params/img/head/kernel`. Released files
carry the `params/` prefix, others leave it out; both are read. numpy has no bfloat16, so such
leaves lie in the file as 2-byte void (`V2`) and are given their type back here. Nothing in a file
is ever unpickled.

Everything works on numpy arrays in host memory; no function here touches a device.
"""

import math
import os
import re
import secrets
import zipfile
from collections.abc import Mapping

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_VOID2 = np.dtype("V2")
_PREFIX = "params/"
_BLOCK = "encoderblock"
_MAX_LISTED = 20


class CheckpointError(ValueError):
    """Weights that can't be read, or that don't fit the model; the message says which and why."""


# --- trees and flat keys -----------------------------------------------------------------------


def flatten_tree(tree: Mapping, *, sep: str = "/") -> dict:
    """Nested mapping -> {"a/b": leaf}. Keys must be strings without `sep`, subtrees non-empty."""
    flat = {}

    def walk(node, path):
        if not isinstance(node, Mapping):
            flat[sep.join(path)] = node
            return
        if not node:
            raise CheckpointError(f"{sep.join(path) or 'the tree'} is empty: expected arrays in it")
        for key, child in node.items():
            if not isinstance(key, str) or not key or sep in key:
                where = f" under {sep.join(path)}" if path else ""
                raise CheckpointError(
                    f"key {key!r}{where}: expected a non-empty string without {sep!r}"
                )
            walk(child, (*path, key))

    if not isinstance(tree, Mapping):
        raise CheckpointError(f"expected a nested dict of arrays, found {type(tree).__name__}")
    walk(tree, ())
    return flat


def unflatten_tree(flat: Mapping, *, sep: str = "/") -> dict:
    """{"a/b": leaf} -> nested dict; a key that is both a leaf and a folder is an error."""
    tree = {}
    folders = {()}
    leaves = set()
    for key, leaf in flat.items():
        *parents, name = parts = tuple(key.split(sep))
        if "" in parts:
            raise CheckpointError(f"key {key!r} has an empty part between its slashes")
        node = tree
        for depth, part in enumerate(parents, 1):
            if parts[:depth] in leaves:
                raise CheckpointError(f"key {key!r}: {sep.join(parts[:depth])!r} is an array too")
            folders.add(parts[:depth])
            node = node.setdefault(part, {})
        if parts in folders or parts in leaves:
            raise CheckpointError(f"key {key!r} stands for more than one thing")
        leaves.add(parts)
        node[name] = leaf
    return tree


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
    """Reads a big_vision weights file into a nested dict of numpy arrays.

    Args:
      path: the file, or "file.npz:subtree".
      subtree: only this part ("img", "llm/layers"); its own arrays alone are read from disk.

    Returns:
      The tree below `params/` if the file has that prefix (other top-level entries, such as
      optimizer state, are then left alone), else all of it; floats keep the dtype they were saved
      with, in native byte order.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: not an npz file, a damaged or pickled entry, or no such subtree.
    """
    path = os.fspath(path)
    if subtree is None:
        path, subtree = split_spec(path)
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

    with archive:
        keys = list(archive.files)
        if not keys:
            raise CheckpointError(f"{path} holds no arrays")
        if len(set(keys)) < len(keys):
            twice = sorted({k for k in keys if keys.count(k) > 1})
            raise CheckpointError(f"{path} holds these keys twice: {_listed(twice)}")
        prefix = _PREFIX if any(k.startswith(_PREFIX) for k in keys) else ""
        names = {k.removeprefix(prefix): k for k in keys if k.startswith(prefix)}
        if subtree is not None:
            names = _select(names, subtree.strip("/"), path)
        flat = {name: _read_array(archive, key, path) for name, key in names.items()}
    try:
        return unflatten_tree(flat)
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None


def _select(names: dict, subtree: str, path: str) -> dict:
    inside = {n[len(subtree) + 1 :]: k for n, k in names.items() if n.startswith(subtree + "/")}
    if inside:
        return inside
    if subtree in names:
        raise CheckpointError(f"{path}:{subtree} is a single array: expected a folder of arrays")
    top = sorted({n.split("/")[0] for n in names})
    raise CheckpointError(f"{path} has no subtree {subtree!r}: found {_listed(top)}")


def _read_array(archive, key: str, path: str) -> np.ndarray:
    try:
        array = archive[key]
    except Exception as e:  # zlib, zipfile, header parsing, refused pickles, ...
        raise CheckpointError(
            f"{path}: entry {key!r} can't be read; it may be damaged or hold a pickled object, "
            f"which is never loaded (numpy says: {type(e).__name__}: {_first_line(e)})"
        ) from e
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"{path}: entry {key!r} is not an array")
    if array.dtype == _VOID2:
        return array.view(BFLOAT16)
    if array.dtype.kind not in "fiubc":
        raise CheckpointError(
            f"{path}: entry {key!r} has dtype {array.dtype}: expected numbers, or bfloat16 as V2"
        )
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


# --- writing -----------------------------------------------------------------------------------


def save_npz(path, params: Mapping, *, dtype=None, prefix: str = _PREFIX) -> None:
    """Writes a tree as a big_vision weights file.

    The file appears whole or not at all: it is written beside `path` under another name, flushed
    to disk and moved into place. Equal trees give equal bytes.

    Args:
      path: where to; must end in `.npz`. Missing folders are made.
      params: nested mapping of arrays (numpy, jax, or anything `np.asarray` takes).
      dtype: floating leaves are cast to this ("bfloat16", "float16", "float32", ...); None keeps
        each as it is. Integers and booleans stay.
      prefix: in front of each key; "" writes bare keys.

    Raises:
      CheckpointError: a leaf is not an array of numbers, or a key can't be written.
    """
    path = os.fspath(path)
    if not path.lower().endswith(".npz"):
        raise CheckpointError(f"{path}: expected a file name that ends in .npz")
    if dtype is not None:
        dtype = BFLOAT16 if str(dtype) == "bfloat16" else np.dtype(dtype)
    flat = flatten_tree(params)

    folder, name = os.path.split(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as f:
            with zipfile.ZipFile(f, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
                for key in sorted(flat):
                    array = _to_writable(key, flat[key], dtype)
                    # A ZipInfo of our own has a fixed date, which a fresh entry would not.
                    entry = zipfile.ZipInfo(f"{prefix}{key}.npy")
                    entry.external_attr = 0o644 << 16
                    with archive.open(entry, "w", force_zip64=True) as out:
                        np.lib.format.write_array(out, array, allow_pickle=False)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    _sync_folder(folder)


def _to_writable(key: str, leaf, dtype) -> np.ndarray:
    array = np.asarray(leaf)
    is_bf16 = array.dtype == BFLOAT16
    if not is_bf16 and array.dtype.kind not in "fiubc":
        raise CheckpointError(
            f"{key}: expected an array of numbers, found {type(leaf).__name__} of dtype "
            f"{array.dtype}"
        )
    if dtype is not None and (is_bf16 or array.dtype.kind == "f"):
        array = array.astype(dtype, copy=False)
    return array  # numpy itself writes bfloat16 as void


def _sync_folder(folder: str) -> None:
    # Makes the rename itself durable. Windows and some network drives can't, and need not.
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


# --- fitting to a model ------------------------------------------------------------------------


def resample_posemb(old, new_n: int) -> np.ndarray:
    """Resamples learned position embeddings [1, N, D] to [1, new_n, D]; N, new_n are squares.

    Linear interpolation over the square grid with the corner points kept, as big_vision does with
    `scipy.ndimage.zoom(order=1)`. Computed in float32, returned in the dtype of `old`.
    """
    old = np.asarray(old)
    if old.ndim != 3 or old.shape[0] != 1:
        raise CheckpointError(f"position embeddings: expected shape (1, N, D), found {old.shape}")
    if old.shape[1] == new_n:
        return old
    side_old, side_new = math.isqrt(old.shape[1]), math.isqrt(max(new_n, 0))
    if side_old**2 != old.shape[1] or side_new**2 != new_n or not side_old or not side_new:
        raise CheckpointError(
            f"position embeddings: can only resample square grids, found {old.shape[1]} "
            f"positions and {new_n} expected"
        )
    import scipy.ndimage  # here, so that reading a file does not pay for it

    grid = old.astype(np.float32).reshape(side_old, side_old, -1)
    scale = side_new / side_old
    # mode="nearest": with the default, a corner that rounds to just outside the grid would read 0.
    grid = scipy.ndimage.zoom(grid, (scale, scale, 1), order=1, mode="nearest")
    return grid.reshape(1, new_n, -1).astype(old.dtype)


def stack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """Unrolled layers `{name}_0 … {name}_{n-1}` -> one `{name}` with a leading layer axis.

    Works at any depth of the tree; a tree without such layers comes back as it is (as a new dict).
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
                    f"{key}: layer {gap} is missing, the last one under "
                    f"{parent or 'the tree'} is {depth - 1}"
                )
            shapes = {i: np.shape(by_number[i]) for i in range(depth)}
            for i, shape in shapes.items():
                if shape != shapes[0]:
                    raise CheckpointError(
                        f"{key}: layer {i} has shape {shape}, layer 0 has {shapes[0]}: expected "
                        "the same"
                    )
            if key in flat:
                raise CheckpointError(f"{key}: the tree holds both stacked and unrolled layers")
            flat[key] = np.stack([np.asarray(by_number[i]) for i in range(depth)])
    return unflatten_tree(flat)


def unstack_layers(params: Mapping, *, name: str = _BLOCK) -> dict:
    """The reverse of `stack_layers`: `{name}` becomes `{name}_0 … {name}_{n-1}`."""
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
            raise CheckpointError(
                f"{key}: found {found}, expected a leading axis of {depths.get(base, 'n')} layers"
            )
        for i in range(shape[0]):
            flat[f"{base}_{i}/{rest}"] = leaf[i]
    return unflatten_tree(flat)


def extend_vocab(embedding, rows: int, *, seed: int = 0) -> np.ndarray:
    """Embedding table [V, D] -> [rows, D]; new rows are normal with standard deviation 0.02.

    For a language model on its own (256,000 rows) that PaliGemma's 257,152 tokens shall use; the
    0.02 is big_vision's. Never done silently: `match_params` reports the mismatch instead.
    """
    embedding = np.asarray(embedding)
    missing = rows - embedding.shape[0]
    if missing < 0:
        raise CheckpointError(
            f"embedding table: found {embedding.shape[0]} rows, can't shrink it to {rows}"
        )
    new = np.random.default_rng(seed).standard_normal((missing, embedding.shape[1]), np.float32)
    return np.concatenate([embedding, (0.02 * new).astype(embedding.dtype)])


def match_params(params: Mapping, expected: Mapping) -> dict:
    """Fits loaded weights to the tree a model expects, or says everything that doesn't fit.

    Position embeddings (`…/pos_embedding`) of another length are resampled, and ViT layers are
    stacked or unrolled as `expected` has them. Dtypes are left alone.

    Args:
      params: nested dict of arrays.
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
    if problems:
        shown = "\n  ".join(problems[:_MAX_LISTED])
        rest = len(problems) - _MAX_LISTED
        more = f"\n  … and {rest} more" if rest > 0 else ""
        raise CheckpointError(
            f"the weights don't fit the model: {len(problems)} of {len(want.keys() | have.keys())}"
            f" keys differ\n  {shown}{more}"
        )
    return unflatten_tree(matched)


def _is_posemb(key: str) -> bool:
    return key.rsplit("/", 1)[-1] == "pos_embedding"


def _differ_in_length(found: tuple, shape: tuple) -> bool:
    return (
        len(found) == len(shape) == 3
        and found[0] == shape[0] == 1
        and found[1] != shape[1]
        and found[2] == shape[2]
    )


def _first_line(error: Exception) -> str:
    return (str(error) or "no message").splitlines()[0][:200]


def _listed(items) -> str:
    items = [str(i) for i in items]
    more = f" and {len(items) - _MAX_LISTED} more" if len(items) > _MAX_LISTED else ""
    return ", ".join(items[:_MAX_LISTED]) + more
