"""Where arrays live: the device mesh, and which axis of it each leaf and each batch is cut along.

A config says `mesh = [("data", -1)]` and `sharding_strategy = [(regex, strategy), ...]`, as in
big_vision. JAX does the distributing; this file only turns those words into `NamedSharding`s.
"""

import ast
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


def make_mesh(
    spec: Sequence[tuple[str, int]] = ((DATA_AXIS, -1),),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of `config.mesh`: (axis name, size) pairs, one size may be -1 (what is left).

    devices: the devices to lay out; all of them by default, of every process.
    ValueError: names given twice, a size that is no positive integer, or a product that is not the
    number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    shown = [(str(name), size) for name, size in spec]
    names = [name for name, _ in shown]
    sizes = [size for _, size in shown]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"mesh={shown}: expected at least one axis, and each name once")
    if any(not isinstance(s, int) or s == 0 or s < -1 for s in sizes) or sizes.count(-1) > 1:
        raise ValueError(f"mesh={shown}: sizes must be positive integers, at most one of them -1")
    known = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ValueError(
            f"mesh={shown}: the sizes given multiply to {known}, "
            f"which doesn't fit the {len(devices)} devices there are"
        )
    # Auto: the compiler places intermediate arrays, as big_vision's jit does. make_mesh's own
    # default asks every operation to state its sharding.
    return jax.make_mesh(
        tuple(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names), devices=devices
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (dimension 0) cut along the axis "data", everything else whole."""
    if DATA_AXIS not in mesh.shape:
        raise ValueError(f'the mesh has axes {list(mesh.shape)}, expected one named "{DATA_AXIS}"')
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def _replicate(shape: tuple[int, ...], nbytes: int, mesh: Mesh) -> PartitionSpec:
    del shape, nbytes, mesh
    return PartitionSpec()


def _fsdp(
    shape: tuple[int, ...],
    nbytes: int,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...] = DATA_AXIS,
    min_size_to_shard_mb: float = 1,
) -> PartitionSpec:
    """Cuts the longest dimension that the axis divides; small or indivisible leaves stay whole."""
    axes = (axis,) if isinstance(axis, str) else tuple(axis)
    missing = [a for a in axes if a not in mesh.shape]
    if missing:
        raise ValueError(f"fsdp: axis {missing[0]!r} is not in the mesh, it has {list(mesh.shape)}")
    parts = math.prod(mesh.shape[a] for a in axes)
    if parts == 1 or nbytes < min_size_to_shard_mb * 2**20:
        return PartitionSpec()
    divisible = [i for i, size in enumerate(shape) if size and size % parts == 0]
    if not divisible:
        return PartitionSpec()
    # Of equally long dimensions the last one: the leading one is the layer axis of a scan, and
    # cutting that would gather the whole stack to read one layer.
    longest = max(divisible, key=lambda i: (shape[i], i))
    spec: list[Any] = [None] * len(shape)
    spec[longest] = axes[0] if len(axes) == 1 else axes
    return PartitionSpec(*spec)


# Strategy name -> (function, {argument: types it may have}).
_STRATEGIES: Mapping[str, tuple[Callable[..., PartitionSpec], Mapping[str, tuple[type, ...]]]] = {
    "replicate": (_replicate, {}),
    "fsdp": (_fsdp, {"axis": (str, tuple), "min_size_to_shard_mb": (int, float)}),
}


def parse_strategy(text: str) -> tuple[str, dict[str, Any]]:
    """'fsdp(axis="data")' -> ("fsdp", {"axis": "data"}). Parsed, never evaluated.

    ValueError: anything but a known strategy name with literal keyword arguments of its own.
    """
    example = """expected 'replicate' or 'fsdp(axis="data", min_size_to_shard_mb=1)'"""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, AttributeError):
        raise ValueError(f"sharding strategy {text!r} can't be parsed; {example}") from None
    call = node if isinstance(node, ast.Call) else None
    name_node = call.func if call else node
    if not isinstance(name_node, ast.Name) or name_node.id not in _STRATEGIES:
        raise ValueError(f"sharding strategy {text!r} is not known; {example}")
    name = name_node.id
    if call and call.args:
        raise ValueError(f"sharding strategy {text!r}: arguments go by name; {example}")
    allowed = _STRATEGIES[name][1]
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords if call else ():
        if keyword.arg not in allowed:
            raise ValueError(
                f"sharding strategy {text!r}: {name} has no argument {keyword.arg!r}, "
                f"it has {list(allowed)}"
            )
        try:
            value = ast.literal_eval(keyword.value)
        except ValueError:
            value = None
        if not isinstance(value, allowed[keyword.arg]) or isinstance(value, bool):
            raise ValueError(
                f"sharding strategy {text!r}: {keyword.arg} must be a literal "
                f"{' or '.join(t.__name__ for t in allowed[keyword.arg])}"
            )
        kwargs[keyword.arg] = value
    return name, kwargs


def _leaf_name(path: Sequence[Any]) -> str:
    """A tree path as big_vision names parameters: "llm/layers/attn/q_einsum/w"."""
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path
    )


def infer_sharding(tree: Any, strategy: Sequence[tuple[str, str]], mesh: Mesh) -> Any:
    """The tree of `NamedSharding` that `config.sharding_strategy` gives the leaves of `tree`.

    tree: leaves have `.shape` and `.dtype` (arrays or `jax.ShapeDtypeStruct`).
    strategy: (regex, strategy) pairs; a regex must match the whole "/"-joined name, and the first
    that does wins. `replicate` keeps a leaf whole on every device.
    `fsdp(axis="data", min_size_to_shard_mb=1)` cuts its longest divisible dimension when it has at
    least that many MiB.
    ValueError: a leaf that no regex matches, or a pair that can't be read.
    """
    rules = []
    for pair in strategy:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"sharding_strategy: {pair!r} is not a (regex, strategy) pair")
        regex, text = pair
        try:
            pattern = re.compile(regex)
        except re.error as e:
            raise ValueError(f"sharding_strategy: regex {regex!r} can't be read: {e}") from None
        name, kwargs = parse_strategy(text)
        rules.append((pattern, _STRATEGIES[name][0], kwargs))

    uncovered: list[str] = []

    def one(path: Sequence[Any], leaf: Any) -> NamedSharding | None:
        name = _leaf_name(path)
        for pattern, function, kwargs in rules:
            if pattern.fullmatch(name):
                shape = tuple(leaf.shape)
                nbytes = math.prod(shape) * leaf.dtype.itemsize
                return NamedSharding(mesh, function(shape, nbytes, mesh, **kwargs))
        uncovered.append(name)
        return None

    out = jax.tree_util.tree_map_with_path(one, tree)
    if uncovered:
        raise ValueError(
            f"sharding_strategy: no rule matches {len(uncovered)} leaves, the first is "
            f"{uncovered[0]!r}; end the list with ('.*', 'replicate')"
        )
    return out
