"""LoRA adapters as separate objects: inserted into a model's parameters, extracted, or merged with them.

Arrays only; for files see `peft`. An adapter has two factors for each projection that it adapts (a
`lora_targets.Target`), and their scale (`lora.Spec`), without which they have no meaning.

Axis letters: L layers, I inputs and O outputs of a projection (heads flattened), R rank.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from paligemma_med.checkpoints.errors import CheckpointError
from paligemma_med.checkpoints.lazy import Lazy
from paligemma_med.models import lora_targets, vlm
from paligemma_med.models.layers import lora
from paligemma_med.models.layers.quantised import SCALE
from paligemma_med.models.leaves import flatten_tree, unflatten_tree

Tree = Mapping[str, Any]  # nested, of arrays or anything else with a shape
Specs = dict[lora_targets.Target, lora.Spec]


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
    """The adapters of a model.

    Attributes:
      specs: {Target: Spec}.
      factors: {Target: (a float[L, I, R], b float[L, R, O])}; L is 1 without an axis of layers.
    """

    specs: Mapping
    factors: Mapping


def rules_of(adapter: Adapter) -> list[tuple[str, dict[str, Any]]]:
    """config.lora for an adapter: [(regex, dict(rank=…, …)), …] of plain Python values, one per target."""
    return [(re.escape(t.name), dataclasses.asdict(s)) for t, s in adapter.specs.items()]


def apply_adapter(
    img: Mapping[str, Any], llm: Mapping[str, Any], params: Tree, adapter: Adapter, **kw
) -> tuple[vlm.Model, dict[str, Any]]:
    """A model with the adapter in place.

    Args:
      img, llm: the two config dicts of `vlm.Model`.
      params: nested dict of a model without adapters, of arrays or anything else with a shape.
      adapter: an Adapter.
      **kw: further attributes of the model (dtype, attn_impl).

    Returns:
      (vlm.Model, nested dict of `params` with the factors, which are numpy arrays).

    Raises:
      CheckpointError: as in `insert_adapter`.
    """
    flat = flatten_tree(params)
    fitted = _fit(flat, adapter)
    model = vlm.Model(img=img, llm=llm, lora=rules_of(fitted), **kw)
    return model, _insert(flat, fitted)


def insert_adapter(params: Tree, adapter: Adapter) -> tuple[dict[str, Any], Specs]:
    """`params` with the adapter's factors, shaped as the model has them.

    Args:
      params: nested dict of a model without adapters, of arrays or anything else with a shape.

    Returns:
      (new nested dict, {Target: Spec}). The targets are the adapter's, with q, k and v in the model's kernels,
      which can't always be told from the adapter.

    Raises:
      CheckpointError: lists every target that is missing or has another shape; or there are adapters already.
    """
    flat = flatten_tree(params)
    fitted = _fit(flat, adapter)
    return _insert(flat, fitted), dict(fitted.specs)


def extract_adapter(rules: Any, params: Tree) -> Adapter:
    """The adapter in `params`.

    Args:
      rules: config.lora, or a model that has it.
      params: nested dict of arrays; factors float[(L,) *inputs, R] and float[(L,) R, *outputs].

    Raises:
      CheckpointError: lists factors that the rules require but that are missing, or the reverse, or that
        have another rank.
    """
    flat = flatten_tree(params)
    specs = resolve(rules, params)
    _check_factors(flat, specs)
    factors = {}
    for target, spec in specs.items():
        a, b = (np.asarray(flat[n]) for n in lora_targets.factor_names([target]))
        layers = a.shape[0] if target.stacked else 1
        factors[target] = a.reshape(layers, -1, spec.rank), b.reshape(layers, spec.rank, -1)
    return Adapter(specs, factors)


def remove_adapter(params: Tree) -> dict[str, Any]:
    """`params` without factors of adapters: the unchanged base, nothing merged."""
    return unflatten_tree({n: x for n, x in flatten_tree(params).items() if not lora.is_factor(n)})


def merge(params: Tree, specs: Specs) -> dict[str, Any]:
    """Plain parameters that compute the same as `params` with adapters: W + s·A·B instead of W.

    Computed in float32, layer by layer, and cast to W's type; in bfloat16 much of a small A·B is
    rounded away there.

    Args:
      params: nested dict of arrays (numpy, jax or Lazy).
      specs: {Target: Spec}, as from `resolve` or `insert_adapter`.

    Returns:
      New nested dict without factors. If W or a factor is Lazy, the merged weight is Lazy too.

    Raises:
      CheckpointError: factors are missing, unexpected or of another shape, or W is quantised.
    """
    flat = flatten_tree(params)
    if codes := next((t.param for t in specs if t.param + SCALE in flat), None):
        raise CheckpointError(
            f"{codes} is quantised; merge into the base's own weights, as tools.convert_checkpoint "
            "does with a run, and quantise the result"
        )
    _check_factors(flat, specs)
    by_param = {}
    for target, spec in specs.items():
        a, b = (flat[n] for n in lora_targets.factor_names([target]))
        by_param.setdefault(target.param, []).append((target, spec, a, b))
    out = {n: x for n, x in flat.items() if not lora.is_factor(n)}
    for name, parts in by_param.items():
        out[name] = _merged(out[name], parts)
    return unflatten_tree(out)


def resolve(rules: Any, params: Tree) -> Specs:
    """{Target: Spec} that `rules` (config.lora, or a model that has it) adapt in `params`."""
    names = [n for n in flatten_tree(params) if not lora.is_factor(n)]
    try:
        return lora_targets.resolve(getattr(rules, "lora", rules), names)
    except ValueError as e:
        raise CheckpointError(str(e)) from None


def _merged(kernel, parts):
    def read():
        w = np.asarray(kernel)
        out = np.array(w)
        for target, spec, a, b in parts:
            a, b = np.asarray(a), np.asarray(b)
            layers = range(w.shape[0]) if target.stacked else [()]
            for i in layers:
                at = (i,) if target.stacked else ()
                delta = _product(target, spec, a[at], b[at])
                at = at if target.index is None else (*at, target.index)
                out[at] = (w[at].astype(np.float32) + delta).astype(w.dtype)
        return out

    leaves = [kernel, *(x for _, _, a, b in parts for x in (a, b))]
    if any(isinstance(x, Lazy) for x in leaves):
        return Lazy(kernel.shape, kernel.dtype, read)
    return read()


def _product(target, spec, a, b):
    """s·A·B of one layer as float32 with the kernel's axes. a: [*inputs, R]; b: [R, *outputs]."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    order = target.inputs + target.outputs
    product = np.tensordot(a * np.float32(spec.scale), b, 1)
    return product.transpose([order.index(c) for c in target.kernel])


# --- fitting to parameters ---------------------------------------------------------------------


def _fit(flat, adapter):
    """The adapter for these parameters: with their targets, shapes checked."""
    if first := next((n for n in flat if lora.is_factor(n)), None):
        raise CheckpointError(
            f"the parameters have adapters already, the first of which is {first}: merge them, or take them out"
        )
    if set(adapter.specs) != set(adapter.factors):
        odd = sorted(t.name for t in set(adapter.specs) ^ set(adapter.factors))
        raise CheckpointError(f"the adapter has a spec or factors, but not both, for {odd}")
    specs, factors, problems = {}, {}, []
    for target, spec in adapter.specs.items():
        a, b = adapter.factors[target]
        twin = lora_targets.TWINS.get(target)
        if target.param not in flat and twin is not None and twin.param in flat:
            target = twin
        if target.param not in flat:
            problems.append(f"{target.name}: the parameters have no {target.param}")
            continue
        want = _flat_shapes(target, spec, np.shape(flat[target.param]))
        found = tuple(np.shape(a)), tuple(np.shape(b))
        if want != found:
            problems.append(f"{target.name}: expected A and B of shapes {want}, found {found}")
        specs[target], factors[target] = spec, (a, b)
    if problems:
        raise CheckpointError(
            f"the adapter doesn't fit the parameters: {len(problems)} of {len(adapter.specs)} "
            "targets differ\n  " + "\n  ".join(problems)
        )
    return Adapter(specs, factors)


def _insert(flat, fitted):
    out = dict(flat)
    for target, spec in fitted.specs.items():
        shapes = lora_targets.factor_shapes(target, spec, np.shape(flat[target.param]))
        for name, shape, x in zip(lora_targets.factor_names([target]), shapes, fitted.factors[target]):
            out[name] = np.asarray(x).reshape(shape)
    return unflatten_tree(out)


def _flat_shapes(target, spec, kernel_shape):
    """((L, I, R), (L, R, O)), or None if the kernel itself has another form."""
    try:
        a, b = lora_targets.factor_shapes(target, spec, kernel_shape)
    except ValueError:
        return None
    if not target.stacked:
        a, b = (1, *a), (1, *b)
    inputs, outputs = int(np.prod(a[1:-1])), int(np.prod(b[2:]))
    return (a[0], inputs, spec.rank), (b[0], spec.rank, outputs)


def _check_factors(flat, specs):
    """Raises CheckpointError unless `flat` has exactly the factors of `specs`."""
    problems, expected = [], set()
    for target, spec in specs.items():
        if target.param not in flat:
            problems.append(f"{target.param}: missing, expected a kernel to adapt")
            continue
        shapes = lora_targets.factor_shapes(target, spec, np.shape(flat[target.param]))
        for name, shape in zip(lora_targets.factor_names([target]), shapes):
            expected.add(name)
            if name not in flat:
                problems.append(f"{name}: missing, expected {shape}")
            elif tuple(np.shape(flat[name])) != shape:
                problems.append(f"{name}: expected {shape}, found {np.shape(flat[name])}")
    others = [n for n in flat if lora.is_factor(n) and n not in expected]
    problems += [f"{n}: unexpected, no rule adapts it" for n in others]
    if problems:
        raise CheckpointError("the adapters don't fit their rules\n  " + "\n  ".join(problems))
