"""Where arrays live: the device mesh, and which axis of it each leaf and each batch is cut along.

A config says `mesh = [("data", -1)]` and `sharding_strategy = [(regex, strategy), ...]`, as in
big_vision. JAX does the distributing; this file only turns those settings into `NamedSharding`s.

Strategies; "|" applies several, each to the dimensions that are still whole:

- `replicate`: a copy on every device.
- `fsdp(axis="data", min_size_to_shard_mb=1, cut="longest")`: the longest dimension that the axis divides, or with
  cut="first" the first one, except the layers and LoRA ranks. Smaller leaves stay whole.
- `shard_dim(axis, dim, ignore_ndim_error=False)`: that dimension.
- `tp(axis)`: by the kind of layer. Attention by heads, MLPs by their inner width, the embedding
  table by vocabulary; everything else stays whole. After Megatron-LM (arXiv 1909.08053).

`tp(axis="model")|fsdp(axis="data")` cuts both ways. Biases and LoRA factors follow their kernel.
"""

import ast
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from paligemma_med.models import lora_targets, regexes
from paligemma_med.models.layers import activations, lora
from paligemma_med.models.leaves import Leaf
from paligemma_med.parallel import chips

DATA_AXIS = "data"


def make_mesh(
    spec: Sequence[tuple[str, int]] = ((DATA_AXIS, -1),),
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """The mesh of `config.mesh`: (axis name, size) pairs; one size may be -1 (the remaining devices).

    devices: the devices to use; by default those of `chips.target`, or all devices of all processes.
    ValueError: duplicate names, a size that isn't a positive integer, or a product that isn't the
    number of devices.
    """
    if devices is None:
        devices = chips.target().devices if chips.target() else jax.devices()
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
            f"mesh={shown}: the sizes given multiply to {known}, which doesn't fit the {len(devices)} devices there are"
        )
    # Auto: the compiler places intermediate arrays, as in big_vision. make_mesh's own default wants
    # every operation to state its sharding.
    return jax.make_mesh(tuple(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows (dimension 0) cut along the axis "data", everything else whole."""
    if DATA_AXIS not in mesh.shape:
        raise ValueError(f'the mesh has axes {list(mesh.shape)}, expected one named "{DATA_AXIS}"')
    return NamedSharding(mesh, PartitionSpec(DATA_AXIS))


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


class Parameter(NamedTuple):
    """What strategies know about a parameter.

    Attributes:
      shape, nbytes: its size.
      letters: one for each dimension, as in `models/leaves.py`: L layers, V vocabulary, R rank…; ""
        if no part describes the parameter.
      kernel: for a LoRA factor that follows a rule for its kernel, the kernel's letters; otherwise the
        parameter's own.
      stacked: whether the first dimension is the layers.
    """

    shape: tuple[int, ...]
    nbytes: int
    letters: str
    kernel: str
    stacked: bool


Spec = list[Any]  # for one leaf: an axis, a tuple of axes or None for each dimension


def _size(axis: str | tuple[str, ...], mesh: Mesh) -> int:
    """How many parts an axis, or several together, cut a dimension into."""
    return math.prod(mesh.shape[a] for a in ((axis,) if isinstance(axis, str) else axis))


def _replicate(spec: Spec, leaf: Parameter, mesh: Mesh) -> tuple[Spec, str]:
    del leaf, mesh
    return spec, ""


def _fsdp(
    spec: Spec,
    leaf: Parameter,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...] = DATA_AXIS,
    min_size_to_shard_mb: float = 1,
    cut: str = "longest",
) -> tuple[Spec, str]:
    if cut not in ("longest", "first"):
        raise ValueError(f"fsdp: cut is {cut!r}, expected 'longest' or 'first'")
    if _size(axis, mesh) == 1 or leaf.nbytes < min_size_to_shard_mb * 2**20:
        return spec, ""
    # With the layers cut, reading one would gather the whole stack; a rank is too short to cut.
    never = {0 if leaf.stacked else -1, leaf.letters.find("R")}
    fits = [
        i
        for i, size in enumerate(leaf.shape)
        if size and size % _size(axis, mesh) == 0 and spec[i] is None and i not in never
    ]
    if not fits:
        return spec, f"no dimension left that {_shown(axis)}={_size(axis, mesh)} divides"
    # Where another than the first dimension of a layer is cut, XLA's compiler for GPUs (0.10.2) keeps a transposed copy
    # of the part of all layers; where heads are, that for TPUs keeps a copy (docs/chips.md).
    return _cut(spec, fits[0] if cut == "first" else max(fits, key=lambda i: (leaf.shape[i], i)), axis), ""


def _shard_dim(
    spec: Spec,
    leaf: Parameter,
    mesh: Mesh,
    *,
    axis: str | tuple[str, ...],
    dim: int,
    ignore_ndim_error: bool = False,
) -> tuple[Spec, str]:
    ndim = len(leaf.kernel) or len(leaf.shape)
    if not -ndim <= dim < ndim:
        if ignore_ndim_error:
            return spec, f"it has no dimension {dim}"
        raise ValueError(f"shard_dim: there is no dimension {dim} in {leaf.shape}")
    if leaf.letters != leaf.kernel:  # a LoRA factor: that dimension, if it has it
        dim = leaf.letters.find(leaf.kernel[dim])
        if dim < 0:
            return spec, ""
    dim %= ndim
    if spec[dim] is not None:
        raise ValueError(f"shard_dim: dimension {dim} of {leaf.shape} is cut already")
    if leaf.shape[dim] % _size(axis, mesh):
        raise ValueError(
            f"shard_dim: {_shown(axis)}={_size(axis, mesh)} doesn't divide dimension {dim} of {leaf.shape}"
        )
    return _cut(spec, dim, axis), ""


def _tp(spec: Spec, leaf: Parameter, mesh: Mesh, *, axis: str | tuple[str, ...]) -> tuple[Spec, str]:
    note = ""
    if _size(axis, mesh) == 1:
        return spec, note
    for i, letter in enumerate(leaf.letters):
        if letter in "NKFV" and spec[i] is None:
            if leaf.shape[i] % _size(axis, mesh) == 0:
                return _cut(spec, i, axis), ""
            note = f"{_shown(axis)}={_size(axis, mesh)} doesn't divide {letter}={leaf.shape[i]}"
    return spec, note


def _cut(spec: Spec, dim: int, axis: str | tuple[str, ...]) -> Spec:
    axes = (axis,) if isinstance(axis, str) else axis
    for used in spec:
        if common := {*axes} & {*((used,) if isinstance(used, str) else used or ())}:
            raise ValueError(f"axis {min(common)!r} would cut two of its dimensions")
    return [*spec[:dim], axes[0] if len(axes) == 1 else tuple(axes), *spec[dim + 1 :]]


def _shown(axis: str | tuple[str, ...]) -> str:
    return axis if isinstance(axis, str) else "×".join(axis)


# Strategy name -> (function, {argument: allowed types}, required arguments).
_STRATEGIES: Mapping[str, tuple[Callable[..., tuple[Spec, str]], Mapping[str, tuple[type, ...]], tuple[str, ...]]] = {
    "replicate": (_replicate, {}, ()),
    "fsdp": (_fsdp, {"axis": (str, tuple), "min_size_to_shard_mb": (int, float), "cut": (str,)}, ()),
    "shard_dim": (
        _shard_dim,
        {"axis": (str, tuple), "dim": (int,), "ignore_ndim_error": (bool,)},
        ("axis", "dim"),
    ),
    "tp": (_tp, {"axis": (str, tuple)}, ("axis",)),
}


def parse_strategy(text: str) -> list[tuple[str, dict[str, Any]]]:
    """'tp(axis="model")|fsdp()' -> [("tp", {"axis": "model"}), ("fsdp", {})]. Never evaluated.

    ValueError: anything but known strategies with literal keyword arguments of their own, or
    `replicate` together with another.
    """
    example = """expected e.g. 'replicate', 'fsdp(axis="data")' or 'tp(axis="model")|fsdp()'"""
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, AttributeError, RecursionError, MemoryError):
        raise ValueError(f"sharding strategy {text!r} can't be parsed; {example}") from None
    nodes: list[ast.expr] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        nodes.insert(0, node.right)
        node = node.left
    out = [_parse_one(n, text, example) for n in (node, *nodes)]
    if len(out) > 1 and any(name == "replicate" for name, _ in out):
        raise ValueError(f"sharding strategy {text!r}: replicate goes with no other; {example}")
    return out


def _parse_one(node: ast.expr, text: str, example: str) -> tuple[str, dict[str, Any]]:
    call = node if isinstance(node, ast.Call) else None
    name_node = call.func if call else node
    if not isinstance(name_node, ast.Name) or name_node.id not in _STRATEGIES:
        raise ValueError(f"sharding strategy {text!r} is not known, there are {list(_STRATEGIES)}; {example}")
    name = name_node.id
    if call and call.args:
        raise ValueError(f"sharding strategy {text!r}: arguments go by name; {example}")
    _, allowed, needed = _STRATEGIES[name]
    kwargs: dict[str, Any] = {}
    for keyword in call.keywords if call else ():
        if keyword.arg not in allowed:
            raise ValueError(
                f"sharding strategy {text!r}: {name} has no argument {keyword.arg!r}, it has {list(allowed)}"
            )
        types = allowed[keyword.arg]
        try:
            value = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, RecursionError, MemoryError):
            value = None
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            raise ValueError(
                f"sharding strategy {text!r}: {keyword.arg} must be a literal {' or '.join(t.__name__ for t in types)}"
            )
        kwargs[keyword.arg] = value
    if missing := [k for k in needed if k not in kwargs]:
        raise ValueError(f"sharding strategy {text!r}: {name} needs {missing}; {example}")
    return name, kwargs


def _leaf_name(path: Sequence[Any]) -> str:
    """A tree path as big_vision names parameters: "llm/layers/mlp/linear"."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _letters(leaves: Mapping[str, Leaf]) -> dict[str, tuple[str, str]]:
    """{name: (letters of its dimensions, letters of its kernel's)} of all parameters and LoRA factors."""
    out = {path: (leaf.axes, leaf.axes) for path, leaf in leaves.items()}
    for leaf in leaves.values():
        for target in lora_targets.targets_of(leaf):
            layers = "L" if target.stacked else ""
            a, b = lora_targets.factor_names([target])
            out[a] = (f"{layers}{target.inputs}R", leaf.axes)
            out[b] = (f"{layers}R{target.outputs}", leaf.axes)
    return out


def _parameter(name: str, x: Any, letters: Mapping[str, tuple[str, str]], by_name: Mapping[str, Leaf]) -> Parameter:
    shape = tuple(x.shape)
    own, kernel = letters.get(name, ("", ""))
    if len(own) != len(shape):
        own = kernel = ""
    stacked = name in by_name and by_name[name].stacked
    return Parameter(shape, math.prod(shape) * x.dtype.itemsize, own, kernel, stacked)


def _read_rules(
    strategy: Sequence[tuple[str, str]], mesh: Mesh
) -> list[tuple[regexes.Pattern, list[tuple[str, dict[str, Any]]]]]:
    """The parsed (regex, strategy) pairs; ValueError if one is wrong."""
    rules = []
    for pair in strategy:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"sharding_strategy: {pair!r} is not a (regex, strategy) pair")
        regex, text = pair
        try:
            pattern = regexes.compile(regex)
        except ValueError as e:
            raise ValueError(f"sharding_strategy: {regex!r:.100} {e}") from None
        ops = parse_strategy(text)
        for op, kwargs in ops:
            axis = kwargs.get("axis", DATA_AXIS if op == "fsdp" else ())
            for a in (axis,) if isinstance(axis, str) else axis:
                if a not in mesh.shape:
                    raise ValueError(
                        f"sharding_strategy: {op}: axis {a!r} is not in the mesh, it has {list(mesh.shape)}"
                    )
        rules.append((pattern, ops))
    return rules


def plan(
    tree: Any, strategy: Sequence[tuple[str, str]], mesh: Mesh, leaves: Mapping[str, Leaf] | None = None
) -> dict[str, tuple[NamedSharding, str]]:
    """{name: (sharding, note)}; arguments and errors are those of `infer_sharding`.

    The note says why a parameter stayed whole although a strategy would cut it; otherwise "".
    """
    rules = _read_rules(strategy, mesh)
    if leaves is None:
        leaves = lora_targets.table_for({_leaf_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)})
    by_name, letters = lora_targets.leaf_by_name(leaves), _letters(leaves)
    unused = {pattern.pattern for pattern, _ in rules} - {".*"}
    uncovered: list[str] = []
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        name = _leaf_name(path)
        kernel = by_name[name].path if lora.is_factor(name) and name in by_name else name
        found = None
        for pattern, ops in rules:
            own = "lora" in pattern.pattern
            if pattern.fullmatch(name if own else kernel):
                unused.discard(pattern.pattern)
                found = found or (ops, own)
        if found is None:
            uncovered.append(name)
            continue
        leaf = _parameter(name, x, letters, by_name)
        if found[1]:
            leaf = leaf._replace(kernel=leaf.letters)
        spec: Spec = [None] * len(leaf.shape)
        notes = []
        for op, kwargs in found[0]:
            try:
                spec, note = _STRATEGIES[op][0](spec, leaf, mesh, **kwargs)
            except ValueError as e:
                raise ValueError(f"sharding_strategy: {name}: {e}") from None
            notes.append(note)
        if not any(spec):
            spec = []
        out[name] = (NamedSharding(mesh, PartitionSpec(*spec)), "; ".join(filter(None, notes)))
    if unused:
        raise ValueError(
            f"sharding_strategy: regex {min(unused)!r} matches no parameter; "
            "a LoRA factor is matched by its kernel's name, unless the regex has 'lora' in it"
        )
    if uncovered:
        raise ValueError(
            f"sharding_strategy: no rule matches {len(uncovered)} leaves, the first is "
            f"{uncovered[0]!r}; end the list with ('.*', 'replicate')"
        )
    return out


def infer_sharding(
    tree: Any, strategy: Sequence[tuple[str, str]], mesh: Mesh, leaves: Mapping[str, Leaf] | None = None
) -> Any:
    """The `NamedSharding` of each leaf of `tree`, by `config.sharding_strategy`.

    tree: leaves have `.shape` and `.dtype` (arrays or `jax.ShapeDtypeStruct`).
    strategy: (regex, strategy) pairs, strategies as listed at the top of this file; a regex must match
    the whole "/"-joined name, and the first match wins. LoRA factors are matched by their kernel's
    name, so that a rule for the kernel applies to them too: `tp` cuts the same dimensions as in the
    kernel, `shard_dim` the same dimension if they have it, `fsdp` what it would cut of any leaf of
    their size. Only a regex with "lora" in it is matched against their own name.
    leaves: the model's table of leaves, {path: Leaf}; by default PaliGemma's.
    ValueError: a leaf that no regex matches, a regex other than ".*" that matches no leaf, an axis
    that the mesh doesn't have, a dimension that can't be cut, or a pair that can't be read.
    """
    found = plan(tree, strategy, mesh, leaves)
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_leaf_name(path)][0], tree)


def short_spec(sharding: NamedSharding) -> str:
    """The axis that each dimension is cut along, such as "-,-,data,model"; "whole" if none is cut."""
    spec = sharding.spec
    return ",".join("-" if a is None else _shown(a) for a in spec) if any(spec) else "whole"


def rules(config: Mapping[str, Any], mesh: Mesh) -> contextlib.AbstractContextManager[None]:
    """A context in which activations are sharded as `config.sharding_rules` says.

    sharding_rules: (name, mesh axis, axes or None) pairs, names as in `models/layers/activations.py`; the
    first that fits wins. The default, [("act_batch", "data")] as in big_vision, is what makes `fsdp`
    work as its name says: from the weights alone the compiler would infer to cut activations along
    "data" by width, and to gather the batch instead of a layer's weights.
    [("act_vocab", "data"), ("act_batch", "data")] cuts logits by vocabulary: then the few rows of
    logits are communicated, not the embedding table.
    Functions must be traced and called within the context. With an empty list, or a mesh of one
    device, it does nothing.
    ValueError: a pair that can't be read, an unknown name, an axis that the mesh doesn't have.
    """
    pairs = config.get("sharding_rules")
    found = []
    for pair in [("act_batch", DATA_AXIS)] if pairs is None else pairs:
        if isinstance(pair, str) or len(pair) != 2:
            raise ValueError(f"sharding_rules: {pair!r} is not a (name, mesh axes) pair")
        name, axes = pair
        if name not in activations.NAMES:
            raise ValueError(f"sharding_rules: there is no {name!r}, expected one of {list(activations.NAMES)}")
        if axes is not None and not isinstance(axes, str):
            axes = tuple(axes)
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            if axis not in mesh.shape:
                raise ValueError(f"sharding_rules: {name}: axis {axis!r} is not in the mesh, it has {list(mesh.shape)}")
        found.append((name, axes))
    if not found or mesh.size == 1:
        return contextlib.nullcontext()
    return activations.active((mesh, tuple(found)))
